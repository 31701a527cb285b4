"""CLIP, a small one of two Transformers: training steps and vectors, against open_clip with the same weights.

    pip install --no-deps --target peers open_clip_torch ftfy wcwidth
    PYTHONPATH=peers python benchmarks/image_text.py [--save]

The sizes of clip-tiny: pictures of 96 pixels in patches of 12, texts of 32 tokens, and GELU as open_clip has it. "like for
like": float32, clipped, fused AdamW, the peer's ClipLoss in a plain loop. "defaults": ours with its recipe and the precision
that `fit` chooses by timing, against plain AdamW.
"""

from __future__ import annotations

import torch
from common import Pair, Run, check_equal, compare, describe_sizes, make_parser, parse_options
from loops import LIKE, read_recipe, repeat_batches, run_inference, run_plain_steps, run_trainer
from torch import Tensor, nn

import tv  # noqa: F401   open_clip needs torchvision
from fieldguide import create
from fieldguide.checkpoints import weights
from fieldguide.objectives import Contrastive

try:
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP
except ImportError as error:
    raise SystemExit(f"{error}: install open_clip first (see the top of this file)") from None

SIZE, BATCH = "clip-tiny", 32


def build_network() -> nn.Module:
    return create(SIZE)


def build_peer() -> nn.Module:
    with torch.device("meta"):
        c = build_network().config
    return CLIP(
        c.embed,
        {"image_size": c.image, "patch_size": c.patch, "width": c.dim, "layers": c.depth, "head_width": c.dim // c.heads},
        {
            "context_length": c.length,
            "vocab_size": c.vocab_size,
            "width": c.text_dim,
            "heads": c.text_heads,
            "layers": c.text_depth,
        },
        quick_gelu=c.quick,
        output_dict=True,
    )


def batch(shortest: int = 32) -> dict[str, Tensor]:
    """Return a batch. The last real token ends the text and has the highest id, which is where open_clip reads."""
    chance = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, 33, (BATCH, 1), generator=chance)
    place = torch.arange(32)
    tokens = torch.randint(1, 8191, (BATCH, 32), generator=chance).masked_fill(place == lengths - 1, 8191)
    mask = place < lengths
    return {"image": torch.randn(BATCH, 3, 96, 96, generator=chance), "tokens": tokens * mask, "mask": mask}


def train(**settings: object) -> Run:
    b = batch()
    return run_trainer(Contrastive(build_network()), repeat_batches(b), 1, **settings)


def peer(**settings: object) -> Run:
    model, loss = build_peer(), ClipLoss()

    def compared(b: dict[str, Tensor]) -> Tensor:
        output = model(b["image"], b["tokens"])
        return loss(output["image_features"], output["text_features"], output["logit_scale"])

    return run_plain_steps(model, compared, [batch()], **settings)


def answer(model: nn.Module) -> Run:
    b = batch()
    if isinstance(model, CLIP):
        return run_inference(
            model, lambda: (model.encode_image(b["image"], normalize=True), model.encode_text(b["tokens"], normalize=True))
        )
    return run_inference(model, lambda: (model.encode_image(b["image"]), model.encode_text(b["tokens"], b["mask"])))


@torch.inference_mode()
def check() -> str:
    model, peer, b = build_network().eval(), build_peer().eval(), batch(6)
    assert not weights.load(model, peer.state_dict())
    return " ".join(
        [
            describe_sizes(model, peer),
            check_equal("vectors of pictures", model.encode_image(b["image"]), peer.encode_image(b["image"], normalize=True)),
            check_equal(
                "vectors of texts", model.encode_text(b["tokens"], b["mask"]), peer.encode_text(b["tokens"], normalize=True)
            ),
        ]
    )


def main() -> None:
    options = parse_options(make_parser(__doc__.splitlines()[0], steps=2, rounds=4))
    torch.manual_seed(0)
    compare(
        f"CLIP, {SIZE}, batch {BATCH}",
        "pairs",
        "open_clip",
        [
            Pair(
                "training, like for like", lambda: train(precision="float32", **LIKE), lambda: peer(fused=True, **LIKE), BATCH
            ),
            Pair("training, defaults", lambda: train(**read_recipe(SIZE)), lambda: peer(lr=5e-4), BATCH),
            Pair("vectors", lambda: answer(build_network()), lambda: answer(build_peer()), BATCH),
        ],
        options,
        check,
    )


if __name__ == "__main__":
    main()

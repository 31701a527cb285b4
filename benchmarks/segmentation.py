"""U-Net over a ResNet-34 on 256 x 256 pictures: training steps and maps, against segmentation_models_pytorch.

    python benchmarks/segmentation.py [--rounds 4] [--save]

Five classes, cross-entropy and soft Dice together, the same weights. "like for like": float32, clipped, fused AdamW, the
peer's DiceLoss beside torch's cross-entropy in a plain loop. "defaults": ours with its recipe and the precision and layout
that `fit` chooses by timing, against plain AdamW.
"""

from __future__ import annotations

import torch
from common import Pair, Run, check_equal, compare, describe_sizes, make_parser, parse_options
from loops import LIKE, read_recipe, repeat_batches, run_inference, run_plain_steps, run_trainer
from torch import Tensor, nn

from fieldguide import create
from fieldguide.checkpoints import weights
from fieldguide.objectives.segmentation import Segmentation
from tv import smp

SIDE, BATCH, CLASSES = 256, 4, 5


def batch() -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(BATCH, 3, SIDE, SIDE, generator=chance),
        "target": torch.randint(CLASSES, (BATCH, SIDE, SIDE), generator=chance),
    }


def build_network() -> nn.Module:
    return create("unet-resnet34", num_classes=CLASSES)


def build_peer() -> nn.Module:
    return smp.Unet("resnet34", encoder_weights=None, classes=CLASSES)


def train(**settings: object) -> Run:
    return run_trainer(Segmentation(build_network(), CLASSES), repeat_batches(batch()), 1, **settings)


def peer(**settings: object) -> Run:
    model, dice = build_peer(), smp.losses.DiceLoss("multiclass")

    def loss(b: dict[str, Tensor]) -> Tensor:
        logits = model(b["image"])
        return nn.functional.cross_entropy(logits, b["target"]) + dice(logits, b["target"])

    return run_plain_steps(model, loss, [batch()], **settings)


def answer(model: nn.Module) -> Run:
    x = batch()["image"]
    return run_inference(model, lambda: model(x).argmax(1))


def check() -> str:
    model, peer, b = build_network(), build_peer(), batch()
    assert not weights.load(model, peer.state_dict())
    with torch.inference_mode():
        model.train()(b["image"]), peer.train()(b["image"])  # both take up the same statistics
        notes = [describe_sizes(model, peer), check_equal("logits", model.eval()(b["image"]), peer.eval()(b["image"]))]
    return " ".join(notes)


def main() -> None:
    options = parse_options(make_parser(__doc__.splitlines()[0], steps=1, rounds=3))
    torch.manual_seed(0)
    compare(
        f"U-Net over ResNet-34, {SIDE} x {SIDE}, batch {BATCH}",
        "pictures",
        "smp",
        [
            Pair(
                "training, like for like", lambda: train(precision="float32", **LIKE), lambda: peer(fused=True, **LIKE), BATCH
            ),
            Pair("training, defaults", lambda: train(**read_recipe("unet-resnet34")), lambda: peer(lr=1e-3), BATCH),
            Pair("maps", lambda: answer(build_network()), lambda: answer(build_peer()), BATCH),
        ],
        options,
        check,
    )


if __name__ == "__main__":
    main()

"""GPT-2: training steps, and greedy answers with a cache, against transformers' GPT2LMHeadModel with the same weights.

    python benchmarks/generation.py [--only gpt2-mini] [--rounds 3] [--save]

32 tokens are asked for after 32. "like for like": rows of 128 tokens, float32, clipped, fused AdamW, ours in our loop, the
peer's own loss (`labels=`) in a plain one. "defaults": 16 rows of 256 tokens, as `fit` takes, of a network that it would
train on a CPU; ours with its recipe (Muon, whose step costs more than AdamW's and of which fewer are needed) and the
precision that `fit` chooses by timing, against plain AdamW.
"""

from __future__ import annotations

import math

import torch
from common import Pair, Run, check_equal, compare, describe_sizes, make_parser, parse_options
from loops import LIKE, read_recipe, repeat_batches, run_inference, run_ours, run_plain_steps
from torch import nn

from fieldguide import create
from fieldguide.checkpoints import weights
from fieldguide.models.generation import Sampling, generate
from fieldguide.objectives import NextToken
from tv import transformers

PROMPT, MOST = 32, 32
SIZES = {"gpt2-mini": (4, 128), "gpt2": (2, 128)}  # rows and tokens of a training batch


def build_peer(size: str) -> nn.Module:
    with torch.device("meta"):
        c = create(size).config
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.length,
            n_embd=c.dim,
            n_layer=c.depth,
            n_head=c.heads,
            resid_pdrop=c.dropout,
            embd_pdrop=c.dropout,
            attn_pdrop=c.dropout,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def make_tokens(rows: int, length: int, vocab: int = 8192) -> torch.Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(0))


def compute_output(model: nn.Module, prompts: torch.Tensor) -> torch.Tensor:
    """Return greedy completions by the network of either side."""
    if isinstance(model, transformers.GPT2LMHeadModel):
        return model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=MOST, do_sample=False, pad_token_id=0
        )[:, PROMPT:]
    return torch.stack(list(generate(model, prompts.tolist(), MOST, sampling=Sampling(temperature=0.0))), 1)


def check() -> str:
    notes, prompts = [], make_tokens(2, PROMPT)
    for size in SIZES:
        peer, model = build_peer(size).eval(), create(size).eval()
        assert not weights.load(model, peer.state_dict())
        with torch.inference_mode():
            notes.append(f"{size}: {describe_sizes(model, peer)} {check_equal('logits', model(prompts), peer(prompts).logits)}")
        assert torch.equal(compute_output(model, prompts), compute_output(peer, prompts)), "other tokens are generated"
    return "\n".join([*notes, "The tokens generated are the same."])


def train(size: str, shape: tuple[int, int], **settings: object) -> Run:
    model = create(size)
    x = make_tokens(shape[0], shape[1] + 1, model.config.vocab_size)
    return run_ours(
        model,
        ("tokens",),
        repeat_batches({"tokens": x[:, :-1], "target": x[:, 1:]}),
        1,
        NextToken(model, ("tokens",)),
        **settings,
    )


def peer(size: str, shape: tuple[int, int], **settings: object) -> Run:
    model = build_peer(size)
    return run_plain_steps(model, lambda x: model(x, labels=x).loss, [make_tokens(*shape, model.config.vocab_size)], **settings)


def answer(model: nn.Module, rows: int) -> Run:
    return run_inference(model, lambda: compute_output(model, make_tokens(rows, PROMPT)))


def pairs(size: str, shape: tuple[int, int]) -> list[Pair]:
    return [
        Pair(
            f"{size}, training, like for like",
            lambda: train(size, shape, precision="float32", **LIKE),
            lambda: peer(size, shape, fused=True, **LIKE),
            math.prod(shape),
        ),
        *(
            Pair(
                f"{size}, generation, {many} at a time",
                lambda many=many: answer(create(size), many),
                lambda many=many: answer(build_peer(size), many),
                many * MOST,
            )
            for many in (1, 8)
        ),
    ]


def main() -> None:
    options = parse_options(make_parser(__doc__.splitlines()[0], steps=1, rounds=3))
    torch.manual_seed(0)
    small, shape = "gpt2-micro", (16, 256)
    compare(
        "GPT-2 in training and in use",
        "tokens",
        "transformers",
        [
            *(pair for size in SIZES for pair in pairs(size, SIZES[size])),
            Pair(
                f"{small}, training, defaults",
                lambda: train(small, shape, **read_recipe(small)),
                lambda: peer(small, shape, lr=1e-3),
                math.prod(shape),
            ),
        ],
        options,
        check,
    )


if __name__ == "__main__":
    main()

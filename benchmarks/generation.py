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
from common import Pair, Run, agree, arguments, begin, compare, count
from loops import LIKE, answers, fixed, ours, recipe, stepped
from torch import nn

from fieldguide import create
from fieldguide.checkpoints import weights
from fieldguide.models.generation import Sampling, generate
from fieldguide.objectives import NextToken
from tv import transformers

PROMPT, MOST = 32, 32
SIZES = {"gpt2-mini": (4, 128), "gpt2": (2, 128)}  # rows and tokens of a training batch


def theirs(size: str) -> nn.Module:
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


def tokens(rows: int, length: int, vocab: int = 8192) -> torch.Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(0))


def said(model: nn.Module, prompts: torch.Tensor) -> torch.Tensor:
    """Greedy, by either side."""
    if isinstance(model, transformers.GPT2LMHeadModel):
        return model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=MOST, do_sample=False, pad_token_id=0
        )[:, PROMPT:]
    return torch.stack(list(generate(model, prompts.tolist(), MOST, sampling=Sampling(temperature=0.0))), 1)


def check() -> str:
    notes, prompts = [], tokens(2, PROMPT)
    for size in SIZES:
        peer, model = theirs(size).eval(), create(size).eval()
        assert not weights.load(model, peer.state_dict())
        with torch.inference_mode():
            notes.append(f"{size}: {count(model, peer)} {agree('logits', model(prompts), peer(prompts).logits)}")
        assert torch.equal(said(model, prompts), said(peer, prompts)), "other tokens are generated"
    return "\n".join([*notes, "The tokens generated are the same."])


def train(size: str, shape: tuple[int, int], **settings: object) -> Run:
    model = create(size)
    x = tokens(shape[0], shape[1] + 1, model.config.vocab_size)
    return ours(
        model, ("tokens",), fixed({"tokens": x[:, :-1], "target": x[:, 1:]}), 1, NextToken(model, ("tokens",)), **settings
    )


def peer(size: str, shape: tuple[int, int], **settings: object) -> Run:
    model = theirs(size)
    return stepped(model, lambda x: model(x, labels=x).loss, [tokens(*shape, model.config.vocab_size)], **settings)


def answer(model: nn.Module, rows: int) -> Run:
    return answers(model, lambda: said(model, tokens(rows, PROMPT)))


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
                lambda many=many: answer(theirs(size), many),
                many * MOST,
            )
            for many in (1, 8)
        ),
    ]


def main() -> None:
    options = begin(arguments(__doc__.splitlines()[0], steps=1, rounds=3))
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
                lambda: train(small, shape, **recipe(small)),
                lambda: peer(small, shape, lr=1e-3),
                math.prod(shape),
            ),
        ],
        options,
        check,
    )


if __name__ == "__main__":
    main()

"""GPT-2: training steps, and greedy answers with a cache, against transformers' GPT2LMHeadModel with the same weights.

    python benchmarks/generation.py [--only 124M] [--rounds 3] [--save]

Rows of 128 tokens; 32 tokens are asked for after 32. "like for like": float32, clipped, fused AdamW, ours in our loop, the
peer's own loss (`labels=`) in a plain one. "defaults": ours with its recipe (Muon, whose step costs more than AdamW's and
of which fewer are needed) and the precision that `fit` chooses by timing, against plain AdamW.
"""

from __future__ import annotations

import torch
from common import Pair, Run, agree, arguments, begin, compare, count
from loops import LIKE, answers, fixed, ours, recipe, stepped
from torch import nn

from fieldguide import create, weights
from fieldguide.generation import Sampling, generate
from fieldguide.objectives import NextToken
from tv import transformers

T, PROMPT, MOST = 128, 32, 32
SIZES = {"gpt2-mini": 4, "gpt2": 2}                      # and rows of a training batch


def theirs(size: str) -> nn.Module:
    with torch.device("meta"):
        c = create(size).config
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab, n_positions=c.length, n_embd=c.dim, n_layer=c.depth, n_head=c.heads, resid_pdrop=c.dropout,
        embd_pdrop=c.dropout, attn_pdrop=c.dropout, bos_token_id=None, eos_token_id=None, pad_token_id=None))


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(8192, (rows, length), generator=torch.Generator().manual_seed(0))


def said(model: nn.Module, prompts: torch.Tensor) -> torch.Tensor:
    """Greedy, by either side."""
    if isinstance(model, transformers.GPT2LMHeadModel):
        return model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=MOST, do_sample=False,
                              pad_token_id=0)[:, PROMPT:]
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


def pairs(size: str, rows: int) -> list[Pair]:
    x = tokens(rows, T + 1)

    def train(**settings: object) -> Run:
        model, batch = create(size), {"tokens": x[:, :-1], "target": x[:, 1:]}
        return ours(model, ("tokens",), fixed(batch), 1, NextToken(model, ("tokens",)), **settings)

    def peer(**settings: object) -> Run:
        model = theirs(size)
        return stepped(model, lambda x: model(x, labels=x).loss, [x[:, :-1]], **settings)

    def answer(model: nn.Module, rows: int) -> Run:
        return answers(model, lambda: said(model, tokens(rows, PROMPT)))

    return [
        Pair(f"{size}, training, like for like", lambda: train(precision="float32", **LIKE), lambda: peer(fused=True, **LIKE),
             rows * T),
        Pair(f"{size}, training, defaults", lambda: train(**recipe(size)), lambda: peer(lr=1e-3), rows * T),
        *(Pair(f"{size}, generation, {many} at a time", lambda many=many: answer(create(size), many),
               lambda many=many: answer(theirs(size), many), many * MOST, steps=1) for many in (1, 8))]


def main() -> None:
    options = begin(arguments(__doc__.splitlines()[0], steps=2, rounds=3))
    torch.manual_seed(0)
    compare("GPT-2 in training and in use", "tokens", "transformers",
            [pair for size, rows in SIZES.items() for pair in pairs(size, rows)], options, check)


if __name__ == "__main__":
    main()

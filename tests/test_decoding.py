"""Incremental decoding with a cache equals one forward pass; public files of language models."""

from __future__ import annotations

import pytest
import torch

from fieldguide.checkpoints import weights
from fieldguide.core.errors import DataError
from fieldguide.models.registry import create
from test_models import tiny
from tv import transformers

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("padded", ["none", "left", "right"])
@pytest.mark.parametrize("pieces", [(9,), (5, 1, 1, 1, 1), (1,) * 9, (4, 3, 2)], ids=str)
@torch.no_grad()
def test_gpt2_with_cache_equals_the_whole_row(pieces, padded):
    model, tokens = tiny("gpt2"), torch.randint(30, (3, 9))
    length = torch.tensor([9, 2, 5])[:, None]
    mask = {"none": None, "right": torch.arange(9) < length, "left": torch.arange(9) >= 9 - length}[padded]
    cache, parts = model.new_cache(3), []
    for piece in zip(tokens.split(pieces, 1), [None] * len(pieces) if mask is None else mask.split(pieces, 1)):
        parts.append(model(*piece, cache=cache))
    got = torch.cat(parts, 1)
    for row in range(3):  # each row alone, without padding
        real = slice(None) if mask is None else mask[row]
        torch.testing.assert_close(got[row, real], model(tokens[row, real][None])[0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_gpt2_padded_prompts_and_reordered_beams(side):
    """Prompts padded on either side, then tokens without a mask, then reordered rows."""
    model, tokens = tiny("gpt2"), torch.randint(30, (3, 8))
    length = torch.tensor([5, 1, 3])[:, None]
    mask = torch.arange(5) < length if side == "right" else torch.arange(5) >= 5 - length
    cache = model.new_cache(3, 8)
    model(tokens[:, :5], mask, cache)
    order = torch.tensor([2, 2, 0])
    cache.select(order)
    for step in (5, 6, 7):
        got = model(tokens[:, step : step + 1], cache=cache)[:, 0]
        for row, source in enumerate(order.tolist()):
            whole = torch.cat([tokens[source, :5][mask[source]], tokens[row, 5 : step + 1]])
            torch.testing.assert_close(got[row], model(whole[None])[0, -1], **CLOSE)
    with pytest.raises(IndexError, match="8 positions"):
        model(tokens[:, :1], cache=cache)


@torch.no_grad()
def test_gpt2_rejects_sequences_that_are_too_long():
    model = tiny("gpt2")
    with pytest.raises(DataError, match="13 tokens"):
        model(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize("bare", [False, True], ids=["saved by transformers", "as on the hub"])
@torch.no_grad()
def test_gpt2_huggingface_files(tmp_path, bare):
    """The first files have no prefix and hold causal masks; no file holds the tied head."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=12, n_embd=8, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    theirs, ours, tokens = transformers.GPT2LMHeadModel(config).eval(), create("gpt2-test").eval(), torch.randint(30, (2, 9))
    theirs.save_pretrained(tmp_path)
    assert "lm_head.weight" not in weights.read(tmp_path)
    state = weights.read(tmp_path)
    if bare:
        state = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
        state["h.0.attn.bias"] = torch.ones(1, 1, 12, 12)
    assert weights.load(ours, state) == []
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-6)
    back = weights.read(weights.save(ours, tmp_path / "back" / "model.safetensors", "huggingface"))
    assert back.keys() == weights.read(tmp_path).keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in weights.read(tmp_path).items())


def test_gpt2_nanogpt_files(tmp_path):
    """The same names with untransposed linear layers and the tied head under both names."""
    ours, other = tiny("gpt2", torch.float32), create("gpt2-test")
    state = weights.read(weights.save(ours, tmp_path / "model.safetensors", "nanogpt"))
    state["lm_head.weight"] = state["transformer.wte.weight"]
    assert state["transformer.h.0.attn.c_attn.weight"].shape == (24, 8)
    assert weights.load(other, state, "nanogpt") == []
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), ours.state_dict().values()))

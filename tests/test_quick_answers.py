"""Faster generation on a CPU: int8 weights and small batches, against the same products in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fieldguide
from fieldguide import create
from fieldguide.core.errors import SettingsError
from fieldguide.models.generation import Sampling, generate
from fieldguide.models.generation.few_row_linear import MAX_ROWS, MIN_ROWS, FewRows, few_rows_mode
from fieldguide.models.generation.quantization import MAX_INT8_ROWS, Int8, quantize_int8


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Round each row to 255 values between minus and plus its largest absolute value."""
    weight = weight.double()
    step = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (weight / step).round() * step


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, MAX_INT8_ROWS, MAX_INT8_ROWS + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_int8_products_equal_rounded_weights(rows, bias):
    torch.manual_seed(rows)
    weight, x = torch.randn(37, 96) * torch.rand(37, 1) * 3, torch.randn(rows, 96) * 10
    b = torch.randn(37) if bias else None
    want = F.linear(x.double(), rounded(weight), None if b is None else b.double())
    got = F.linear(x[:, None], Int8.quantize(weight), b)[:, 0]
    assert got.dtype == torch.float32 and (got - want).abs().max() < 0.02 * want.std()
    few = (got - want).abs().max() > 1e-5 * want.std()  # bfloat16 in the product of few rows alone
    assert few == (rows <= MAX_INT8_ROWS)


@torch.no_grad()
def test_int8_fallback_for_unsupported_widths():
    torch.manual_seed(0)
    for width in (1, 12, 33, 48):
        weight, x = torch.randn(5, width), torch.randn(2, width)
        torch.testing.assert_close(F.linear(x, Int8.quantize(weight)), (x.double() @ rounded(weight).T).float())


def test_other_operations_use_the_dequantized_matrix():
    torch.manual_seed(0)
    weight, at = torch.randn(6, 4), torch.tensor([[5, 0]])
    weight[2] = 0  # a row without a scale
    held, want = Int8.quantize(weight), rounded(weight).float()
    assert held.shape == (6, 4) and held.dtype == torch.float32 and held.device.type == "cpu" and "6, 4" in repr(held)
    assert held.scale.min() > 0
    torch.testing.assert_close(F.embedding(at, held), want[at])
    torch.testing.assert_close(held.T @ held, want.T @ want)
    torch.testing.assert_close(torch.cat([held.split([2, 4])[1], held[:2]]), torch.cat([want[2:], want[:2]]))


@pytest.mark.parametrize("size, changes", [("gpt2-test", {}), ("llama-test", {}), ("llama-test", {"tie_embeddings": True})])
def test_int8_network_equals_rounded_weights(size, changes):
    torch.manual_seed(0)
    network = create(size, dim=64, vocab_size=100, **changes).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=0.3)
    peer, prompts = copy.deepcopy(network), [[1, 2, 3], [4]]
    with torch.no_grad():
        for m in {id(m.weight): m for m in peer.modules() if isinstance(m, nn.Linear | nn.Embedding)}.values():
            m.weight.copy_(rounded(m.weight))
    before = sum(p.numel() for p in network.parameters())
    assert quantize_int8(network) is network
    held = [p for p in network.parameters() if isinstance(p, Int8)]
    assert sum(p.numel() for p in network.parameters()) == before  # what was one tensor is one
    assert sum(p.numel() for p in held) > 0.9 * before and not any(p.requires_grad for p in network.parameters())
    assert all(isinstance(m.weight, Int8) for m in network.modules() if isinstance(m, nn.Linear))
    if size == "llama-test":
        assert (network.head.weight is network.embed.weight) == bool(changes)
    x = torch.randint(100, (5, 12))  # more rows than `FEW`: in floats throughout
    with torch.inference_mode():
        want = peer(x)
        # Scales are applied before or after the sum, which rounds differently.
        torch.testing.assert_close(network(x), want, rtol=1e-4, atol=1e-3 * want.std().item())
        first, other = network.last(x[:2, :3]), peer.last(x[:2, :3])
    assert (first - other).abs().max() < 0.1 * other.std()
    said = torch.stack(list(generate(network, prompts, 6, sampling=Sampling(temperature=0.0))), 1)
    assert said.shape == (2, 6) and said.min() >= 0 and said.max() < 100


def test_network_without_linear_layers_is_rejected():
    with pytest.raises(SettingsError, match="no linear layers"):
        quantize_int8(nn.Sequential(nn.Embedding(3, 2)))


@pytest.mark.parametrize("rows", [1, MIN_ROWS, MAX_ROWS, MAX_ROWS + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_few_row_linear_equals_linear(rows, bias, monkeypatch):
    calls = []
    for name, plain in (("mm", torch.mm), ("addmm", torch.addmm)):
        monkeypatch.setattr(torch, name, lambda *a, name=name, plain=plain: (calls.append(name), plain(*a))[1])
    torch.manual_seed(0)
    layer, x = nn.Linear(500, 1000, bias=bias), torch.randn(rows, 1, 500)
    with torch.no_grad():
        want = layer(x)
        with FewRows():
            got = layer(x)
    assert got.shape == want.shape == (rows, 1, 1000)
    torch.testing.assert_close(got, want)
    assert calls == ([] if rows in (1, MAX_ROWS + 1) else ["addmm" if bias else "mm"])
    with torch.no_grad(), FewRows():
        assert nn.Linear(40, 50)(torch.randn(rows, 40)).shape == (rows, 50) and len(calls) <= 1  # small ones as ever
    assert isinstance(few_rows_mode(rows, x.device), FewRows) == (
        MIN_ROWS <= rows <= MAX_ROWS and torch.backends.mkl.is_available()
    )


def test_batched_generation_equals_single_prompts(monkeypatch):
    monkeypatch.setattr("fieldguide.models.generation.few_row_linear.MIN_WEIGHT_NUMBERS", 1)
    torch.manual_seed(0)
    network = create("gpt2-test", dim=32).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=0.3)
    prompts = torch.randint(30, (9, 3)).tolist()
    say = lambda rows: torch.stack(list(generate(network, rows, 8, sampling=Sampling(temperature=0.0))), 1)
    assert torch.equal(say(prompts), torch.cat([say([p]) for p in prompts]))


def test_int8_as_a_load_option(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from fieldguide.cli.commands import app
    from fieldguide.inference.text_generation import TextGenerator
    from test_speaker import bpe

    torch.manual_seed(0)
    tokenizer = bpe()
    network = create("llama-test", vocab_size=tokenizer.get_vocab_size(), dim=64, length=64)
    fieldguide.save(network, tmp_path, "hf")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    run = lambda weights: CliRunner().invoke(
        app, ["predict", str(tmp_path), "the cat", "--set", f"weights={weights}", "--set", "temperature=0", "--set", "tokens=8"]
    )
    shrunk = []
    monkeypatch.setattr(
        "fieldguide.inference.text_generation.quantize_int8",
        lambda network: (shrunk.append(network), quantize_int8(network))[1],
    )
    for weights in ("float32", "int8"):
        speaker = TextGenerator.load(tmp_path, weights=weights)
        assert isinstance(speaker.network.head.weight, Int8) == (weights == "int8")
        said = speaker.generate(["the cat"], tokens=8, temperature=0.0)
        assert run(weights).stdout.rstrip("\n") == said[0].rstrip("\n")
        assert len(shrunk) == (2 if weights == "int8" else 0)
    assert "weights='int4' is not one of float32, int8" in str(run("int4").exception)

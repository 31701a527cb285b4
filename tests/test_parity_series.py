"""PatchTST and DLinear: names of the authors' files, and invalid inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fieldguide.checkpoints import weights
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.registry import create
from test_models import batch, tiny


def linear(inputs: int, outputs: int) -> dict[str, Tensor]:
    return {"weight": torch.randn(outputs, inputs), "bias": torch.randn(outputs)}


def patchtst_of_the_authors(dim: int, hidden: int, patch: int, patches: int, depth: int, horizon: int) -> dict[str, Tensor]:
    """Return tensors with the names of the authors' `Model` without decomposition; each layer stores its scale."""
    parts = {"model.backbone.W_P": linear(patch, dim), "model.head.linear": linear(dim * patches, horizon)}
    single = {"model.backbone.W_pos": torch.randn(patches, dim)}
    for i in range(depth):
        layer = f"model.backbone.encoder.layers.{i}"
        parts |= {f"{layer}.self_attn.{name}": linear(dim, dim) for name in ("W_Q", "W_K", "W_V", "to_out.0")}
        parts |= {f"{layer}.ff.0": linear(dim, hidden), f"{layer}.ff.3": linear(hidden, dim)}
        parts |= {f"{layer}.{name}.1": dict(nn.BatchNorm1d(dim).state_dict()) for name in ("norm_attn", "norm_ffn")}
        single[f"{layer}.self_attn.sdp_attn.scale"] = torch.tensor(0.5)
    return single | {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.items()}


@torch.no_grad()
def test_patchtst_author_files(tmp_path):
    model = create("patchtst-test", values=1).eval()
    c = model.config
    state = patchtst_of_the_authors(c.dim, c.hidden, c.patch, len(model.pos), c.depth, c.horizon)
    assert weights.load(model, state) == []
    keys = state["model.backbone.encoder.layers.1.self_attn.W_K.weight"]
    assert torch.equal(model.blocks[1].qkv.weight[c.dim : 2 * c.dim], keys)
    back = weights.read(weights.save(model, tmp_path / "model.safetensors", "official"))
    assert back.keys() == {key for key in state if not key.endswith("scale")}
    assert all(torch.equal(tensor, state[key]) for key, tensor in back.items())


def test_patchtst_has_the_authors_number_of_parameters():
    """Including the constants: 81,731 for ETTh1."""
    state = patchtst_of_the_authors(16, 128, 16, 42, 3, 96)
    count = sum(x.numel() for key, x in state.items() if "running" not in key and "tracked" not in key)
    assert count == 81_731 == sum(p.numel() for p in create("patchtst-etth1").parameters()) + 3


def test_dlinear_author_files():
    model, c = create("dlinear-test", values=1), create("dlinear-test").config
    state = {
        f"{name}.{key}": x for name in ("Linear_Seasonal", "Linear_Trend") for key, x in linear(c.length, c.horizon).items()
    }
    assert weights.load(model, state) == []
    assert torch.equal(model.trend.bias, state["Linear_Trend.bias"])


@torch.no_grad()
def test_patchtst_follows_the_level_and_scale_of_its_past():
    """RevIN: level and scale of a series affect only its own forecast."""
    model, (series,) = tiny("patchtst"), batch("patchtst")
    before = model(100 * series)
    moved = 100 * series
    moved[:, :, 1] = 3 * moved[:, :, 1] + 7
    after = model(moved)
    torch.testing.assert_close(after[:, :, 1], 3 * before[:, :, 1] + 7, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after[:, :, 0::2], before[:, :, 0::2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["patchtst", "dlinear"])
def test_past_of_another_length_is_rejected(name):
    with pytest.raises(DataError, match="11 steps"):
        tiny(name)(torch.zeros(2, 11, 3, dtype=torch.float64))


def test_invalid_settings_are_rejected():
    with pytest.raises(SettingsError, match="odd"):
        create("dlinear-test", window=4)
    with pytest.raises(SettingsError, match="divisible by heads=3"):
        create("patchtst-test", heads=3)
    with pytest.raises(SettingsError, match=r"must not exceed length=.*the length of the past"):
        create("patchtst-test", patch=14)

"""The names of FLUX.1 and Stable Diffusion 3 in the authors' files, against the conversion of diffusers."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fieldguide
from fieldguide.checkpoints.weights import get_tables, translate
from fieldguide.core.card import Size
from fieldguide.core.errors import WeightsError
from fieldguide.models.mapping.key_rules import Joined, Swapped
from fieldguide.models.registry import card, create
from fieldguide.tasks.latent_diffusion.single_file_pipeline import choose_layout
from test_models import batch, tiny

FLUX = {"dim": 3072, "heads": 24, "axes": (16, 56, 56), "depth": 1, "single": 1}  # the width that diffusers splits by
CHANGES = {"sd3": [{}, {"normed": False, "dual": 0}], "flux": [{}, {"guidance": False}]}
CASES = [(name, i) for name, changes in CHANGES.items() for i in range(len(changes))]


def official(model) -> dict[str, torch.Tensor]:
    return translate(model.state_dict(), get_tables(model)["official"], reverse=True)


def converted(name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what diffusers makes of a file."""
    importlib.import_module("tv")  # before diffusers
    module = importlib.import_module("diffusers.loaders.single_file_utils")
    return getattr(module, f"convert_{name}_transformer_checkpoint_to_diffusers")(dict(state))


@functools.cache
def small_flux():
    """Return a FLUX of few layers on the meta device, as wide as the published one."""
    with torch.device("meta"):
        return create("flux-test", **FLUX)


def test_flux_names_and_shapes_equal_those_of_diffusers():
    model = small_flux()
    found = converted("flux", official(model))
    expected = translate(model.state_dict(), get_tables(model)["diffusers"], reverse=True)
    assert {key: x.shape for key, x in found.items()} == {key: x.shape for key, x in expected.items()}


def test_flux_values_equal_those_of_diffusers(monkeypatch):
    """Its function has a fixed width, which is replaced by that of a tiny network."""
    model = tiny("flux", torch.float32)
    plain = torch.split
    width = model.config.dim

    def split(tensor, sizes, dim=0):
        return plain(tensor, tuple(size * width // 3072 for size in sizes), dim)

    monkeypatch.setattr(torch, "split", split)
    found = converted("flux", official(model))
    expected = translate(model.state_dict(), get_tables(model)["diffusers"], reverse=True)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], x) for key, x in expected.items())


@pytest.mark.parametrize("i", range(2))
def test_sd3_values_equal_those_of_diffusers(i):
    model = tiny("sd3", torch.float32, **CHANGES["sd3"][i])
    found = converted("sd3", official(model))
    expected = translate(model.state_dict(), get_tables(model)["diffusers"], reverse=True)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], x) for key, x in expected.items())


@torch.no_grad()
@pytest.mark.parametrize(("name", "i"), CASES)
def test_files_are_recognized(name, i, tmp_path, monkeypatch):
    """Without being told what they are; the size of the test stands for the published ones."""
    model, inputs = tiny(name, torch.float32, **CHANGES[name][i]), batch(name, 2, torch.float32)
    state = official(model)
    found = card(name)
    overrides = {**found.sizes[found.tiny].overrides, **CHANGES[name][i]}
    monkeypatch.setitem(found.sizes, f"{name}-file", Size(**overrides))
    save_file({key: x.contiguous() for key, x in state.items()}, tmp_path / "model.safetensors")
    loaded = fieldguide.load(tmp_path / "model.safetensors")
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded(*inputs), model(*inputs))
    back = official(loaded)
    assert back.keys() == state.keys() and all(torch.equal(back[key], x) for key, x in state.items())


@pytest.mark.parametrize("size", ["flux1-dev", "flux1-schnell", "sd3-medium", "sd3.5-medium", "sd3.5-large"])
def test_published_sizes_are_written_and_read(size):
    with torch.device("meta"):
        model = create(size)
    state = official(model)
    assert ("guidance_in.in_layer.weight" in state) == (size == "flux1-dev")
    if size.startswith("sd3"):
        assert choose_layout(Path("model.safetensors"), state).denoiser == size
    table = get_tables(model)["official"]
    assert {k: x.shape for k, x in translate(state, table).items()} == {k: x.shape for k, x in model.state_dict().items()}


def test_joined_and_swapped_tensors():
    table = {"qkv.*": Joined(("q.*", "k.*", "up.*"), (1, 1, 2)), "mod.*": Swapped("condition.*")}
    theirs = {"qkv.weight": torch.arange(16.0).view(8, 2), "mod.bias": torch.arange(4.0)}
    ours = translate(theirs, table)
    assert [len(ours[f"{name}.weight"]) for name in ("q", "k", "up")] == [2, 2, 4]
    assert torch.equal(ours["up.weight"], theirs["qkv.weight"][4:]) and ours["condition.bias"].tolist() == [2, 3, 0, 1]
    back = translate(ours, table, reverse=True)
    assert back.keys() == theirs.keys() and all(torch.equal(back[key], x) for key, x in theirs.items())
    with pytest.raises(WeightsError, match=r"qkv.weight \(7x2\) cannot be divided in parts of \(1, 1, 2\)"):
        translate({"qkv.weight": torch.zeros(7, 2)}, table)
    with pytest.raises(WeightsError, match=r"qkv.weight is built from 3 tensors, but there are only 2"):
        translate({"q.weight": torch.zeros(2, 2), "k.weight": torch.zeros(2, 2)}, table, reverse=True)

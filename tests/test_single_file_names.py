"""The names of FLUX.1, Stable Diffusion 3 and PixArt in the authors' files, against the conversion of diffusers or name by name."""

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
CHANGES = {
    "sd3": [{}, {"normed": False, "dual": 0}],
    "flux": [{}, {"guidance": False}],
    "pixart": [{}, {"sizes": 0}],
}
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


@pytest.mark.parametrize("i", range(2))
def test_pixart_values_equal_those_of_the_authors(i):
    """Their names, and which of their matrices are joined, one by one. diffusers' library has no conversion."""
    model = tiny("pixart", torch.float32, **CHANGES["pixart"][i])
    state = translate(model.state_dict(), get_tables(model)["diffusers"], reverse=True)
    emb, expected = "adaln_single.emb.", {}
    sizes = {"csize_embedder": "resolution_embedder", "ar_embedder": "aspect_ratio_embedder"} if i == 0 else {}
    for kind in ("weight", "bias"):
        take = lambda *names, kind=kind: torch.cat([state.pop(f"{name}.{kind}") for name in names])
        expected[f"x_embedder.proj.{kind}"] = take("pos_embed.proj")
        expected[f"t_block.1.{kind}"] = take("adaln_single.linear")
        expected[f"final_layer.linear.{kind}"] = take("proj_out")
        for k in (1, 2):
            expected[f"y_embedder.y_proj.fc{k}.{kind}"] = take(f"caption_projection.linear_{k}")
            for theirs, name in {"t_embedder": "timestep_embedder", **sizes}.items():
                expected[f"{theirs}.mlp.{2 * k - 2}.{kind}"] = take(f"{emb}{name}.linear_{k}")
        for block in range(model.config.depth):
            here, there = f"blocks.{block}", f"transformer_blocks.{block}"
            first, second = ([f"{there}.attn{k}.to_{name}" for name in "qkv"] for k in (1, 2))
            expected[f"{here}.attn.qkv.{kind}"] = take(*first)
            expected[f"{here}.attn.proj.{kind}"] = take(f"{there}.attn1.to_out.0")
            expected[f"{here}.cross_attn.q_linear.{kind}"] = take(second[0])
            expected[f"{here}.cross_attn.kv_linear.{kind}"] = take(*second[1:])
            expected[f"{here}.cross_attn.proj.{kind}"] = take(f"{there}.attn2.to_out.0")
            expected[f"{here}.mlp.fc1.{kind}"] = take(f"{there}.ff.net.0.proj")
            expected[f"{here}.mlp.fc2.{kind}"] = take(f"{there}.ff.net.2")
    for block in range(model.config.depth):
        expected[f"blocks.{block}.scale_shift_table"] = state.pop(f"transformer_blocks.{block}.scale_shift_table")
    expected["final_layer.scale_shift_table"] = state.pop("scale_shift_table")
    found = official(model)
    assert not state and found.keys() == expected.keys()
    assert all(torch.equal(found[key], x) for key, x in expected.items())
    extra = {"pos_embed": torch.zeros(1, 16, 24), "y_embedder.y_embedding": torch.zeros(12, 10)}
    again = translate({**found, **extra}, get_tables(model)["official"])
    assert again.keys() == model.state_dict().keys() and all(torch.equal(again[k], x) for k, x in model.state_dict().items())


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

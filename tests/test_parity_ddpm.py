"""The DDPM U-Net of published size against diffusers, and its files, those of 2022 too."""

from __future__ import annotations

import pytest
import torch

from cases import diffusers_unet
from fieldguide import weights
from fieldguide.errors import DataError
from fieldguide.registry import create
from test_models import batch, tiny


@pytest.mark.parametrize("size", ["ddpm-cifar10", "ddpm-256", "ddpm-28"])
def test_names_and_shapes_of_published_sizes(size):
    with torch.device("meta"):
        model = create(size)
        peer, rename = diffusers_unet(model)
    renamed, theirs = rename(model.state_dict()), peer.state_dict()
    assert {key: x.shape for key, x in renamed.items()} == {key: x.shape for key, x in theirs.items()}


@torch.no_grad()
@pytest.mark.parametrize("shape", [
    {}, {"attend": (16, 8), "image": 16, "growth": (1, 2, 1), "classes": 0, "depth": 2}], ids=["tiny", "three levels"])
def test_files_of_diffusers(tmp_path, shape):
    """Under today's names and those of the hub's old files; the network is found by its names."""
    ours = tiny("ddpm-unet", torch.float32, **shape)
    peer, rename = diffusers_unet(ours)
    peer.load_state_dict(rename(ours.state_dict()))
    image, time, label = torch.randn(2, 2, 16, 16), torch.tensor([0.0, 999.0]), torch.tensor([0, min(1, ours.config.classes)])
    torch.testing.assert_close(ours(image, time, label), peer.eval()(image, time, label), rtol=1e-4, atol=1e-4)
    state = peer.peer.state_dict()
    old = {key.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace("to_out.0", "proj_attn"): x
           for key, x in state.items()}
    assert old.keys() != state.keys()
    for form, origin in ((state, "diffusers"), (old, "diffusers-2022")):
        other = create("ddpm-unet-test", **shape)
        assert weights.load(other, form) == []
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), ours.state_dict().values()))
        back = weights.read(weights.save(ours, tmp_path / f"{origin}.safetensors", origin))
        assert back.keys() == form.keys() and all(torch.equal(back[key], x) for key, x in form.items())


@torch.no_grad()
def test_no_label_is_label_zero():
    model, (image, time, label) = tiny("ddpm-unet"), batch("ddpm-unet", 3)
    torch.testing.assert_close(model(image, time), model(image, time, torch.zeros_like(label)))
    assert not torch.allclose(model(image, time), model(image, time, label))
    assert not torch.allclose(model(image, time), model(image, time + 1))


def test_refuses_sides_that_cannot_be_halved():
    with pytest.raises(DataError, match="multiples of 2"):
        tiny("ddpm-unet")(torch.zeros(1, 2, 8, 9, dtype=torch.float64), torch.zeros(1))

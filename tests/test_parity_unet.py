"""U-Nets: output sizes, both paddings over several levels, and files of segmentation-models-pytorch."""

from __future__ import annotations

import pytest
import torch

import references
from cases import equations
from fieldguide.checkpoints import weights
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.registry import create
from tv import smp


def test_unet_sizes_of_the_paper():
    with torch.device("meta"):
        model = create("unet-2015").eval()
        assert model(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)
        assert create("unet-same").eval()(torch.zeros(1, 1, 100, 77)).shape == (1, 2, 100, 77)


@pytest.mark.parametrize(("padding", "size"), [("valid", (47, 58)), ("same", (13, 22)), ("same", (16, 8))])
@torch.no_grad()
def test_unet_of_three_levels_equals_its_equations(padding, size):
    torch.manual_seed(0)
    model = create("unet-test", widths=(2, 3, 4), padding=padding).double().eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    peer, rename = equations(references.unet(padding))(model)
    peer.double().load_state_dict(rename(model.state_dict()))
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    assert (model(x).shape[2:] == size) is (padding == "same")
    torch.testing.assert_close(model(x), peer(x), rtol=1e-9, atol=1e-11)


def test_unet_rejects_images_that_are_too_small():
    with torch.device("meta"):
        for padding, smallest in (("valid", 188), ("same", 16)):
            model = create("unet-2015", padding=padding)
            model(torch.zeros(1, 1, smallest, smallest))
            with pytest.raises(DataError, match="too small"):
                model(torch.zeros(1, 1, 200, smallest - 1))
    with pytest.raises(SettingsError, match="padding"):
        create("unet-test", padding="reflect")


@torch.no_grad()
def test_unet_resnet_equals_segmentation_models_pytorch(tmp_path):
    """The smallest published size of that package, loaded and saved."""
    torch.manual_seed(0)
    theirs, ours = (
        smp.Unet("resnet18", encoder_weights=None, classes=4).eval(),
        create("unet-resnet18", num_classes=4).eval(),
    )
    assert weights.load(ours, theirs.state_dict()) == []
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    back = weights.read(weights.save(ours, tmp_path / "model.safetensors", "smp"))
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, back[key]) for key, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_unet_resnet_parameter_counts(name):
    with torch.device("meta"):
        theirs, ours = smp.Unet(name, encoder_weights=None), create(f"unet-{name}")
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())

"""StyleGAN 3: filters, moved inputs, measured equivariance, and NVIDIA's files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor, nn

import stylegans
from fieldguide import create
from fieldguide.automl.build_plan import configure_part
from fieldguide.automl.fit import fit
from fieldguide.checkpoints import weights
from fieldguide.core.errors import SettingsError
from fieldguide.data import samples
from fieldguide.metrics import equivariance
from fieldguide.models.adversarial.stylegan3 import nvidia, plan_bands
from fieldguide.models.initialization import make_on_meta
from fieldguide.models.layers.lowpass import compute_bessel, design_lowpass
from fieldguide.models.registry import card, find
from references import Equations
from test_models import tiny


@pytest.mark.parametrize("radial", [False, True])
@pytest.mark.parametrize(
    ("taps", "cutoff", "width", "rate"),
    [(12, 2.0, 12.0, 64.0), (24, 16.0, 3.0, 128.0), (6, 5.0, 1.0, 32.0), (12, 8.0, 9.0, 32.0)],
)
def test_filters_equal_scipy(taps, cutoff, width, rate, radial):
    """Windows of every case of Kaiser's formula; the response is half at the cutoff."""
    ours = design_lowpass(taps, cutoff, width, rate, radial=radial)
    np.testing.assert_allclose(ours.numpy(), stylegans.kaiser_filter(taps, cutoff, width, rate, radial), rtol=0, atol=1e-15)
    if taps == 24:
        _, response = scipy.signal.freqz(ours.sum(0) if radial else ours, worN=[cutoff], fs=rate)
        assert abs(response[0]) == pytest.approx(0.5, abs=0.1)


def test_bessel_function_is_exact():
    x = torch.linspace(0, 79, 1001, dtype=torch.float64)
    np.testing.assert_allclose(compute_bessel(x).numpy(), stylegans.scipy.special.j1(x.numpy()), rtol=0, atol=1e-13)


def test_maps_of_ffhq_are_the_published_ones():
    """Sides and channels are in the names of the published files; rates and cutoffs are those of figure 4."""
    bands = plan_bands(card("stylegan3").resolve_config("stylegan3-t-1024"))
    assert [(b.side, b.channels) for b in bands] == [
        (36, 512), (36, 512), (52, 512), (52, 512), (84, 512), (148, 512), (148, 512), (276, 323), (276, 203), (532, 128),
        (1044, 81), (1044, 51), (1044, 32), (1024, 32), (1024, 3),
    ]  # fmt: skip
    assert bands[0].cutoff == 2 and bands[12].cutoff == bands[14].cutoff == pytest.approx(512)
    assert bands[0].rate == 16 and bands[14].rate == 1024
    bands = plan_bands(card("stylegan3").resolve_config("stylegan3-r-1024"))
    assert (bands[0].side, bands[0].channels, bands[14].channels) == (36, 1024, 3)


def test_filters_of_r_are_symmetric_in_all_directions():
    """Except at the last two layers and that to the image; convolutions read one pixel."""
    model = create("stylegan3-r-mini")
    layers = list(model.synthesis.layers)
    assert [layer.down_taps.ndim for layer in layers if layer.down > 1] == [2, 2, 2, 2, 1, 1]
    taps = layers[1].down_taps
    torch.testing.assert_close(taps, taps.T)
    torch.testing.assert_close(taps, taps.flip(0))
    assert {layer.weight.shape[-1] for layer in layers} == {1}
    assert {layer.weight.shape[-1] for layer in create("stylegan3-mini").synthesis.layers} == {3, 1}


def test_moved_inputs_equal_their_equations():
    model = tiny("stylegan3")
    torch.manual_seed(1)
    motion = torch.eye(3, dtype=torch.float64) + 0.2 * torch.randn(3, 3, 3, dtype=torch.float64)
    motion[:, 2] = torch.tensor([0.0, 0.0, 1.0])
    z = torch.randn(3, 8, dtype=torch.float64)
    peer = Equations(model, stylegans.stylegan3(model.config, motion)).double().eval()
    peer.load_state_dict(Equations.translate(model.state_dict()))
    ours = model.synthesis(model.map_styles(z), motion)
    torch.testing.assert_close(ours, peer(z), rtol=1e-9, atol=1e-10)
    assert (ours - model(z)).abs().max() > 1e-2


def test_magnitudes_follow_the_inputs():
    """In training a thousandth of the way at each step; in evaluation they stay."""
    model = tiny("stylegan3").train()
    for layer in model.synthesis.layers:
        layer.magnitude.fill_(1.0)
    model(torch.randn(4, 8, dtype=torch.float64))
    sizes = [layer.magnitude.item() for layer in model.synthesis.layers]
    assert all(0.999 <= size != 1 for size in sizes)
    model.eval()(torch.randn(4, 8, dtype=torch.float64))
    assert [layer.magnitude.item() for layer in model.synthesis.layers] == sizes


# ---------------------------------------------------------------------------------------------- equivariance


def waves(rows: Tensor, columns: Tensor) -> Tensor:
    """Evaluate a band-limited image at places in pixels."""
    return (torch.sin(0.9 * columns + 0.4 * rows + 1) + torch.cos(1.1 * rows - 0.5 * columns))[None, None] / 2


def grid(side: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    return axis[:, None].expand(side, side), axis[None].expand(side, side)


def test_measures_find_movements_of_a_function():
    """Exact movements have more than 50 dB, the opposite ones less than 12; a known error its own number."""
    rows, columns = grid(48)
    image = waves(rows, columns)
    for right, down in ((3.0, -2.0), (1.3, 0.6), (-4.5, 2.25)):
        moved = waves(rows - down, columns - right)
        shift = torch.tensor([[right, down]])
        assert equivariance.measure_translation(image, moved, shift) > 50
        assert equivariance.measure_translation(image, moved, -shift) < 12
        assert equivariance.measure_translation(image, moved + 0.02, shift) == pytest.approx(40, abs=0.3)  # 2 / 0.02
    for angle in (0.3, math.pi / 2, -2.0):
        c, s = math.cos(angle), math.sin(angle)
        turned = waves(c * rows - s * columns, c * columns + s * rows)
        assert equivariance.measure_rotation(image, turned, torch.tensor([angle])) > 50
        assert equivariance.measure_rotation(image, turned, torch.tensor([-angle])) < 16
        assert equivariance.measure_rotation(image, turned + 0.2, torch.tensor([angle])) == pytest.approx(20, abs=0.3)
    with pytest.raises(ValueError, match="no pixel"):
        equivariance.measure_translation(image, image, torch.tensor([[60.0, 0.0]]))
    assert equivariance.measure_translation(image, image, torch.zeros(1, 2)) > 200


SIDE, SHIFT, COUNT = 64, 5.3, 4


def moved_images(model: nn.Module, motion: Tensor) -> tuple[Tensor, Tensor]:
    """Return images of StyleGAN 3, and those of the moved input."""
    styles = model.map_styles(torch.randn(COUNT, 32, generator=torch.Generator().manual_seed(2)))
    return model.synthesis(styles), model.synthesis(styles, motion)


def moved_images_2(model: nn.Module, motion: Tensor) -> tuple[Tensor, Tensor]:
    """Return images of StyleGAN 2 without noise, of an input of the same kind of waves, and of the moved waves."""
    styles, images = model.map_styles(torch.randn(COUNT, 32, generator=torch.Generator().manual_seed(2))), []
    source, first = torch.Generator().manual_seed(3), model.synthesis.blocks[0]
    dim = len(first.const)
    freqs, phases = 1.4 * torch.randn(dim, 2, generator=source), torch.rand(dim, generator=source)
    for matrix in (torch.eye(3), motion[0]):
        axis = (torch.arange(4) - 1.5) / 4
        place = torch.stack([axis.expand(4, 4), axis[:, None].expand(4, 4), torch.ones(4, 4)], -1) @ matrix[:2].T
        first.const.data = torch.sin(2 * math.pi * (place @ freqs.T + phases)).permute(2, 0, 1)
        images.append(model.synthesis(styles))
    return images[0], images[1]


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "2": ("stylegan2-mini", {"dim": 24, "base": 1536}),
        "t": ("stylegan3-mini", {"dim": 24, "base": 1536, "layers": 10, "margin": 10}),
        "r": ("stylegan3-r-mini", {"dim": 48, "base": 3072, "layers": 10, "margin": 10}),
    }
    name, config = sizes[kind]
    return create(name, image=SIDE, noise=32, style=32, channels=1, **config).eval()


@torch.no_grad()
def measure_db(kind: str) -> dict[str, float]:
    """Return EQ-T and EQ-R of a network with random weights, of images of deviation 0.5."""
    make, model = (moved_images_2 if kind == "2" else moved_images), build(kind)
    out = {}
    for right, down, angle in ((SHIFT, -SHIFT, 0.0), (0.0, 0.0, 0.5)):
        c, s = math.cos(angle), math.sin(angle)
        back = torch.tensor([[c, s, -right / SIDE], [-s, c, -down / SIDE], [0, 0, 1]]).expand(COUNT, 3, 3)
        images, changed = make(model, back)
        scale = 0.5 / images.std()
        images, changed = images * scale, changed * scale
        if angle:
            out["R"] = equivariance.measure_rotation(images, changed, torch.full((COUNT,), angle))
        else:
            out["T"] = equivariance.measure_translation(images, changed, torch.tensor([[right, down]]).expand(COUNT, 2))
    return out


def test_images_move_and_turn_with_the_input():
    """At random weights: T follows translations, R also rotations, StyleGAN 2 neither."""
    two, t, r = (measure_db(kind) for kind in ("2", "t", "r"))
    print(two, t, r)
    assert t["T"] > two["T"] + 20 and r["T"] > two["T"] + 20
    assert r["R"] > two["R"] + 15 and r["R"] > t["R"] + 8


# ---------------------------------------------------------------------------------------------- files and training


def names_of_nvidia(places: list[tuple[int, int]]) -> set[str]:
    """Return the parameters' and buffers' names in `G_ema.state_dict()` of a T network, written down from the repository."""
    names = {f"mapping.fc{i}.{part}" for i in (0, 1) for part in ("weight", "bias")} | {"mapping.w_avg"}
    names |= {f"synthesis.input.{part}" for part in ("weight", "freqs", "phases", "affine.weight", "affine.bias")}
    parts = ("weight", "bias", "magnitude_ema", "affine.weight", "affine.bias")
    return names | {f"synthesis.L{i}_{side}_{dim}.{part}" for i, (side, dim) in enumerate(places) for part in parts}


def test_files_of_nvidia_load_and_are_written(tmp_path):
    torch.manual_seed(0)
    model = create("stylegan3-mini").train()
    model(torch.randn(4, 64))
    state = weights.read(weights.save(model.eval(), tmp_path / "model.safetensors", "nvidia"))
    places = [(24, 64), (24, 64), (40, 64), (40, 54), (40, 32), (32, 32), (32, 3)]
    assert set(state) == names_of_nvidia(places)
    extra = {"synthesis.input.transform": torch.eye(3), "synthesis.L0_24_64.up_filter": torch.ones(12)}
    extra |= {"synthesis.L2_40_64.down_filter": torch.ones(12)}
    other, z = create("stylegan3-mini").eval(), torch.randn(2, 64)
    assert weights.load(other, state | extra) == [] and torch.equal(other(z), model(z))
    for name, known in (("stylegan3-t-1024", (512, 512, 3, 3)), ("stylegan3-r-1024", (1024, 1024, 1, 1))):
        made, size = find(name)
        config = made.resolve_config(size)
        full = weights.translate(make_on_meta(made, config).state_dict(), nvidia(config), reverse=True)
        assert full[f"synthesis.L0_36_{known[0]}.weight"].shape == known and "synthesis.L14_1024_3.bias" in full


@pytest.mark.parametrize("config", [{"image": 48}, {"image": 8}, {"layers": 2}, {"noise": 3, "num_classes": 3}])
def test_impossible_generators_are_refused(config):
    with pytest.raises(SettingsError, match="must be"):
        create("stylegan3-mini", **config)


def test_critic_has_the_ending_of_the_size():
    dims = {"image": 32, "channels": 1, "num_classes": 0}
    for size, found in (
        ("stylegan3-r-mini", "stylegan2-discriminator-mini"),
        ("stylegan3-t-1024", "stylegan2-discriminator-1024"),
    ):
        assert configure_part("stylegan2-discriminator", dims, card("stylegan3"), size)[1] == found


@pytest.mark.slow
def test_stylegan3_trains_on_figures(tmp_path):
    """A few steps bring the images much nearer to real ones: the distance of thumbnails is 23 after 10 steps, and 6 after 150."""
    run = fit(
        samples.path("figures"),
        task="image-generation",
        model="stylegan3-mini",
        out=tmp_path / "run",
        settings={
            "steps": 150,
            "batch": 16,
            "evaluate": 50,
            "ema": 0.9,
            "lr": 0.005,
            "penalty_weight": 0.1,
            "minutes": 0,
            "precision": "float32",
            "task.side": 16,
            "model.dim": 32,
            "model.base": 512,
        },
    )
    assert run.record["model"]["parts"]["critic"]["size"] == "stylegan2-discriminator-mini"
    assert run.scores["held_out_loss"] < 10

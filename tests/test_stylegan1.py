"""StyleGAN 1: published counts, the published orientation of large kernels, truncation, growing, and training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import stylegans
from fieldguide import create
from fieldguide.automl.fit import fit
from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import samples
from fieldguide.models.adversarial.stylegan1 import double
from fieldguide.models.initialization import make_on_meta
from fieldguide.models.registry import card, find
from fieldguide.objectives import build_adversarial
from references import Equations
from test_models import tiny

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def count(name: str) -> int:
    made, size = find(name)
    return sum(p.numel() for p in make_on_meta(made, made.resolve_config(size)).parameters())


def test_counts_differ_from_mmagic_by_known_terms():
    """mmagic has one strength of noise per layer, where the paper has one per map, and no bias at the constant."""
    for name, theirs, widths in (
        ("stylegan1-1024", 26_214_045, [512] * 4 + [256, 128, 64, 32, 16]),
        ("stylegan1-256", 26_080_739, [512] * 4 + [256, 128, 64]),
    ):
        assert count(name) - theirs == 2 * sum(widths) - 2 * len(widths) + 512
    assert count("stylegan1-discriminator-1024") == 23_087_249


@pytest.mark.parametrize("side", [5, 63, 64])
def test_doubling_is_repetition_and_a_convolution(side):
    """Up to 127 pixels a correlation; from 128 on the kernel is that of a transposed convolution, as in the authors' code."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, side, side, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(double(x, weight), stylegans.enlarge(x, weight, side == 64), **EXACT)
    assert not torch.allclose(double(x, weight), stylegans.enlarge(x, weight, side != 64))


def test_truncation_moves_the_coarse_layers_only():
    torch.manual_seed(0)
    model = create("stylegan1-test", truncated=3).double().train()
    model(torch.randn(16, 8, dtype=torch.float64))
    model.eval()
    z = torch.randn(4, 8, dtype=torch.float64)
    w, less, center = model.map_styles(z), model.map_styles(z, 0.4), model.mapping.average
    assert torch.equal(less[:, 3:], w[:, 3:]) and model.layers == 6
    torch.testing.assert_close(less[:, :3], 0.4 * w[:, :3] + 0.6 * center.expand(4, 3, -1), **EXACT)
    assert card("stylegan1").resolve_config("stylegan1-1024").truncated == 8


def test_scale_and_shift_are_those_of_the_style():
    """The maps of an image have the mean and the deviation that its style asks for."""
    torch.manual_seed(0)
    maps = tiny("stylegan1").synthesis.maps1
    x, w = torch.randn(3, 6, 5, 5, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    scale, shift = maps.style(w).chunk(2, 1)
    y = maps(x, w)
    torch.testing.assert_close(y.mean((2, 3)), shift, **EXACT)
    torch.testing.assert_close(y.var((2, 3), unbiased=False).sqrt(), (1 + scale).abs(), rtol=1e-6, atol=1e-8)


def test_growing_blends_two_resolutions():
    torch.manual_seed(0)
    model = create("stylegan1-test", grows=True, num_classes=0).double().eval()
    critic = create("stylegan1-discriminator-test", grows=True, num_classes=0, image=20).double().eval()
    styles = model.map_styles(torch.randn(4, 8, dtype=torch.float64))
    small, large, whole = (model.synthesis(styles, growth) for growth in (0, 1, 2))
    assert [x.shape[-1] for x in (small, large, whole)] == [5, 10, 20]
    torch.testing.assert_close(model.synthesis(styles), whole, **EXACT)
    mixed = model.synthesis(styles, 0.25)
    torch.testing.assert_close(mixed, 0.75 * F.interpolate(small, scale_factor=2.0) + 0.25 * large, **EXACT)
    torch.testing.assert_close(critic.judge(whole, 2), critic(whole), **EXACT)
    for growth, image in ((0, small), (1, large)):
        assert critic.judge(image, growth).shape == (4, 1)
    near, half, far = (critic.judge(large, growth) for growth in (1e-9, 0.5, 1))
    torch.testing.assert_close(near, critic.judge(F.avg_pool2d(large, 2), 0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(far, critic.judge(large, 1 - 1e-9), rtol=1e-5, atol=1e-6)
    assert (half - near).abs().max() > 1e-6 and (half - far).abs().max() > 1e-6
    for call in (lambda: model.synthesis(styles, 3), lambda: create("stylegan1-test").synthesis(styles.float(), 1)):
        with pytest.raises(SettingsError, match="grows=True"):
            call()


@pytest.mark.parametrize("rows", [8, 6])
def test_critic_compares_the_images_of_a_group(rows):
    model = tiny("stylegan1-discriminator", group=4)
    peer = Equations(model, stylegans.stylegan1_discriminator(model.config)).double()
    peer.load_state_dict(Equations.translate(model.state_dict()))
    torch.manual_seed(1)
    x = torch.randn(rows, 5, 17, 17, dtype=torch.float64)
    torch.testing.assert_close(model(x), peer(x), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model(x[:, :2]), peer(torch.cat([x[:, :2], 0 * x[:, 2:]], 1)), rtol=1e-9, atol=1e-11)


def test_recipe_trains_with_mixed_styles_and_r1():
    nets = (
        create("stylegan1-test", image=16, channels=1, noise=11),
        create("stylegan1-discriminator-test", image=16, channels=1),
    )
    recipe = Settings().with_(card("stylegan1").recipe)
    objective = build_adversarial(*nets, recipe, noise=8, real="image", num_classes=3)
    batch = {"image": torch.randn(4, 1, 16, 16), "label": torch.tensor([1, 2, 3, 0])}
    losses = objective(batch, "critic")
    losses["loss"].backward()
    assert "penalty" in losses and objective.style_mixing == 0.9 and recipe.penalty_weight is None
    objective(batch, "generator")["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters())


@pytest.mark.slow
def test_stylegan1_learns_figures(tmp_path):
    """A CNN that is trained on generated digits of each class alone recognizes real ones (chance: 0.1)."""
    run = fit(
        samples.path("figures"),
        task="image-generation",
        model="stylegan1-mini",
        out=tmp_path / "run",
        settings={"steps": 700, "batch": 64, "evaluate": 100, "ema": 0.98, "lr": 0.01, "penalty_weight": 0.1, "minutes": 0,
                  "style_mixing": 0, "precision": "float32"},
    )  # fmt: skip
    assert run.scores["classifier_accuracy"] > 0.7

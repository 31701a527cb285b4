"""Adaptive augmentation of what a critic sees: transformations against their equations, derivatives, and the probability."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fieldguide import create
from fieldguide.core.settings import Settings
from fieldguide.models.layers.upfirdn import upfirdn
from fieldguide.objectives import build_adversarial
from fieldguide.objectives import critic_augmentation as ada
from test_gan import pictures


def test_filter_is_an_orthogonal_wavelet_with_six_vanishing_moments():
    h = np.array(ada.SYM6)
    assert h.sum() == pytest.approx(math.sqrt(2), abs=1e-10) and (h @ h) == pytest.approx(1, abs=1e-10)
    assert [h[: -2 * k] @ h[2 * k :] for k in range(1, 6)] == pytest.approx([0] * 5, abs=1e-10)
    alternating = h * (-1.0) ** np.arange(12)
    assert [(alternating * np.arange(12.0) ** k).sum() / 12.0**k for k in range(6)] == pytest.approx([0] * 6, abs=1e-8)


def motion(*rows: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor([[*rows, (0.0, 0.0, 1.0)]], dtype=torch.float64)


def test_pixel_movements_are_exact():
    """Without movement nothing changes; shifts, quarter turns and mirrors move pixels, mirrored at the border."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 20, 20, dtype=torch.float64)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(ada.resample(x, motion((1, 0, 0), (0, 1, 0))), x, **close)
    shifted = ada.resample(x, motion((1, 0, -2), (0, 1, 3)))
    torch.testing.assert_close(
        shifted[..., :17, 2:], torch.nn.functional.pad(x, (0, 0, 0, 3), "reflect")[..., 3:20, :-2], **close
    )
    axis = torch.arange(20, dtype=torch.float64)
    wave = smooth(axis[None], axis[:, None])[None, None]
    mirrored = torch.nn.functional.pad(wave, (5, 0, 0, 9), "reflect")[..., 9:, :-5]
    near = {"rtol": 0, "atol": 0.06}
    torch.testing.assert_close(ada.resample(wave, motion((1, 0, -5), (0, 1, 9))), mirrored, **near)
    torch.testing.assert_close(ada.resample(wave, motion((-1, 0, 0), (0, 1, 0))), wave.flip(-1), **near)
    torch.testing.assert_close(ada.resample(wave, motion((0, 1, 0), (-1, 0, 0))), wave.rot90(-1, (2, 3)), **near)


def smooth(right: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return torch.sin(right / 6 + 0.3) * torch.cos(down / 5)


@pytest.mark.parametrize("angle, scale, across, along", [(0.4, 1.0, 0.3, -0.2), (-2.0, 1.15, 0.0, 0.5), (0.0, 0.9, 1.7, 0.0)])
def test_movements_of_a_smooth_image_are_those_of_its_function(angle, scale, across, along):
    """The new image at (x, y) is the old one at the matrix times (x, y, 1), from the center, in pixels."""
    axis = torch.arange(32, dtype=torch.float64) - 15.5
    down, right = torch.meshgrid(axis, axis, indexing="ij")
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    made = ada.resample(smooth(right, down)[None, None], motion((c, s, across), (-s, c, along)))
    want = smooth(c * right + s * down + across, -s * right + c * down + along)
    torch.testing.assert_close(made[0, 0, 9:23, 9:23], want[9:23, 9:23], rtol=0, atol=0.03)


def test_reduction_removes_what_would_alias():
    """A checkerboard is beyond what the reduced image can show: it is enlarged and averaged, not sampled."""
    board = (-1.0) ** (torch.arange(32)[:, None] + torch.arange(32)).double()
    half = ada.resample(board[None, None], motion((2, 0, 0.5), (0, 2, 0.5)))  # every second pixel, half a pixel beside
    assert half[0, 0, 12:20, 12:20].abs().max() < 0.2


def slow_colors(kinds: dict[str, float], x: np.ndarray) -> np.ndarray:
    """Apply appendix B's changes of color to (3, N): brightness, contrast, luma, hue, saturation."""
    v = np.ones(3) / math.sqrt(3)
    x = math.exp(kinds["contrast"]) * (x + kinds["brightness"])
    x = x - 2 * kinds["luma"] * np.outer(v, v) @ x
    t = kinds["hue"]
    cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    x = (math.cos(t) * np.eye(3) + math.sin(t) * cross + (1 - math.cos(t)) * np.outer(v, v)) @ x  # Rodrigues
    gray = np.outer(v, v) @ x
    return gray + math.exp(kinds["saturation"]) * (x - gray)


def test_colors_equal_their_equations(monkeypatch):
    """With the random numbers in the order in which they are drawn."""
    drawn, rng = [], np.random.default_rng(0)

    def record(values: np.ndarray) -> torch.Tensor:
        drawn.append(values.astype(np.float32))
        return torch.from_numpy(drawn[-1])

    monkeypatch.setattr(ada.torch, "randn", lambda n, device: record(rng.normal(size=n)))
    monkeypatch.setattr(ada.torch, "rand", lambda *n, device: record(rng.uniform(size=n)))
    monkeypatch.setattr(ada.torch, "randint", lambda k, n, device: record(rng.integers(k, size=n)))
    monkeypatch.setattr(ada, "choose", lambda count, p, device: torch.ones(count, dtype=torch.bool))
    matrix = ada.sample_colors(4, 1.0, torch.device("cpu"))
    brightness, contrast, luma, hue, saturation = [z.flatten() for z in drawn]
    x = torch.linspace(-1, 1, 4 * 3 * 5 * 6, dtype=torch.float64).reshape(4, 3, 5, 6).sin()
    ours = ada.change_colors(x, matrix.double()).numpy()
    for i in range(4):
        kinds = {
            "brightness": 0.2 * brightness[i],
            "contrast": 0.5 * math.log(2) * contrast[i],
            "luma": luma[i],
            "hue": math.pi * (2 * hue[i] - 1),
            "saturation": math.log(2) * saturation[i],
        }
        want = slow_colors(kinds, x[i].numpy().reshape(3, -1)).reshape(3, 5, 6)
        np.testing.assert_allclose(ours[i], want, rtol=1e-5, atol=1e-5)
    gray = x[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(
        ada.change_colors(x[:, :1], matrix.double()),
        ada.change_colors(gray, matrix.double()).mean(1, keepdim=True),
        rtol=1e-6,
        atol=1e-6,
    )


def test_each_transformation_happens_as_often_as_p():
    """Of the colors, the matrix is unchanged with probability (1 - p)^5, or where an inverted luma drew none."""
    torch.manual_seed(0)
    for p in (0.2, 0.8):
        colors = ada.sample_colors(20_000, p, torch.device("cpu"))
        same = (colors - torch.eye(4)).abs().amax((1, 2)) < 1e-6
        assert same.float().mean().item() == pytest.approx((1 - p) ** 4 * (1 - p / 2), abs=0.01)
        moved = ada.sample_motion(20_000, p, (64, 64), torch.device("cpu"))
        same = (moved - torch.eye(3)).abs().amax((1, 2)) < 1e-6
        # Half of the mirrors, a quarter of the turns do nothing; two rotations with 1 - sqrt(1 - p) each.
        want = (1 - p / 2) * (1 - 0.75 * p) * (1 - p) ** 3 * (1 - p) * (1 - p * (1 - 1 / 17**2))
        assert same.float().mean().item() == pytest.approx(want, abs=0.01)
    x = torch.randn(4, 3, 16, 16)
    assert ada.augment(x, 0.0) is x


def test_gradient_penalties_pass_through_augmentation():
    """The penalty's gradient with respect to the critic, against finite differences."""
    torch.manual_seed(0)
    weight = torch.randn(3, 12, 12, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)

    def penalty() -> torch.Tensor:
        torch.manual_seed(1)
        images = x.clone().requires_grad_()
        scores = torch.tanh((ada.augment(images, 0.9) * weight).sum((1, 2, 3)) / 10).sum()
        (gradient,) = torch.autograd.grad(scores, images, create_graph=True)
        return gradient.square().sum()

    (gradient,) = torch.autograd.grad(penalty(), weight)
    for place in ((0, 5, 5), (2, 3, 8)):
        with torch.no_grad():
            sides = []
            for move in (1e-5, -2e-5):
                weight[place] += move
                with torch.enable_grad():
                    sides.append(penalty().item())
            weight[place] += 1e-5
        assert gradient[place].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4)


def test_augmentation_moves_as_linear_resampling_does():
    """Interpolation equals torch's, whose gradient cannot be differentiated again."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    rows, columns = 8 * torch.rand(2, 11, dtype=torch.float64), 6 * torch.rand(2, 11, dtype=torch.float64)
    grid = torch.stack([columns / 3 - 1, rows / 4 - 1], -1)[:, None]
    want = torch.nn.functional.grid_sample(x, grid, align_corners=True)[:, :, 0]
    torch.testing.assert_close(ada.interpolate(x, rows, columns), want, rtol=1e-10, atol=1e-12)


def test_enlarging_and_reducing_keeps_images():
    taps = torch.tensor(ada.SYM6, dtype=torch.float64) / math.sqrt(2)
    x = torch.randn(1, 1, 24, 24, dtype=torch.float64)
    back = upfirdn(upfirdn(x, taps, up=2, padding=(6, 5), gain=4.0), taps.flip(0), down=2, padding=(5, 6))
    torch.testing.assert_close(back[..., 3:-3, 3:-3], x[..., 3:-3, 3:-3], rtol=1e-9, atol=1e-9)


def test_probability_follows_the_signs_of_scores():
    """It rises by the images seen / `images` while the mean sign is above the target, else it falls, within 0 .. 1."""
    p = ada.AdaptiveProbability(0.6, 1000)
    p.update(0.7, 64)
    assert p.value == pytest.approx(0.064)
    p.update(0.5, 32)
    assert p.value == pytest.approx(0.032)
    p.update(0.6, 32)  # at the target
    assert p.value == pytest.approx(0.032)
    p.update(-1, 500)
    assert p.value == 0
    for _ in range(30):
        p.update(1, 64)
    assert p.value == 1


def test_objective_adapts_every_four_steps_of_the_critic():
    """By the mean sign of the scores of training images, and augments both kinds of images in both phases."""
    torch.manual_seed(0)
    nets = create("dcgan", image=16, channels=1, dim=8, noise=8), create("dcgan-discriminator", image=16, channels=1, dim=8)
    settings = Settings().with_({"augment_critic": "ada", "ada_images": 100, "ada_target": 0.0, "loss": "hinge"})
    objective = build_adversarial(*nets, settings, noise=8, real="image")
    batch, seen = {"image": pictures()[0][:10]}, []
    objective.critic = torch.nn.Module()
    objective.critic.forward = lambda x: seen.append(x) or torch.ones(len(x), 1).requires_grad_()
    objective.critic.bias = torch.nn.Parameter(torch.zeros(()))
    for step in range(8):
        objective(batch, "critic")
        objective.after_step("critic")
        assert objective.augmentation.value == pytest.approx((step + 1) // 4 * 0.4)
    assert torch.equal(seen[0], batch["image"]) and not torch.equal(seen[-2], batch["image"])
    objective.augmentation.value, count = 1.0, len(seen)
    objective(batch, "generator")
    torch.manual_seed(3)
    objective(batch, "generator")
    torch.manual_seed(3)
    plain = objective.generate(None, 10, torch.device("cpu"))
    assert len(seen) == count + 2 and (seen[-1] - plain).abs().max() > 0.01
    objective.critic.forward = lambda x: -torch.ones(len(x), 1).requires_grad_()
    for _ in range(4):
        objective(batch, "critic")
        objective.after_step("critic")
    assert objective.augmentation.value == pytest.approx(0.6)

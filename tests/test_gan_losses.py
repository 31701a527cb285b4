"""Losses and gradient penalties of GANs against their equations, and spectral normalization against torch's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fieldguide import create
from fieldguide.automl.fit import fit
from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import CHOICES, Settings
from fieldguide.data import samples
from fieldguide.models.layers.spectral_norm import SpectralNorm, has_spectral_norm, spectral_norm
from fieldguide.models.registry import cards, find
from fieldguide.objectives import LOSSES, PENALTIES, Adversarial, build_adversarial
from test_gan import pictures
from test_loop import trainer

# Equations of the papers for one pair: (the critic's loss, the generator's loss), of the scores of a real and a fake example.
sigmoid = lambda s: 1 / (1 + math.exp(-s))
EQUATIONS = {
    "non-saturating": lambda r, f: (-math.log(sigmoid(r)) - math.log(1 - sigmoid(f)), -math.log(sigmoid(f))),
    "hinge": lambda r, f: (-min(0, r - 1) - min(0, -f - 1), -f),
    "wasserstein": lambda r, f: (f - r, -f),
    "least-squares": lambda r, f: ((r - 1) ** 2 + f**2, (f - 1) ** 2),
    "relativistic": lambda r, f: (-math.log(sigmoid(r - f)), -math.log(sigmoid(f - r))),
}


class Critic(nn.Module):
    """A smooth critic of single examples with three parameters: w1 x1^2 + sin(w2 x2) + w3 x1 x2."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7, 1.3, -0.4], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:  # B 2 -> B 1
        return (self.w[0] * x[:, 0] ** 2 + torch.sin(self.w[1] * x[:, 1]) + self.w[2] * x[:, 0] * x[:, 1])[:, None]


def slope(w: list[float], x: list[float]) -> list[float]:
    """Return the gradient of the critic's score with respect to an example, differentiated by hand."""
    return [2 * w[0] * x[0] + w[2] * x[1], w[1] * math.cos(w[1] * x[1]) + w[2] * x[0]]


def slow_penalty(name: str, weight: float, w: list[float], real: np.ndarray, fake: np.ndarray, mix: list[float]) -> float:
    total = 0.0
    for x, y, a in zip(real.tolist(), fake.tolist(), mix):
        if name == "gp":
            between = [a * p + (1 - a) * q for p, q in zip(x, y)]
            total += weight * (math.hypot(*slope(w, between)) - 1) ** 2
        for point in {"gp": [], "r1": [x], "r1r2": [x, y]}[name]:
            total += weight / 2 * sum(g**2 for g in slope(w, point))
    return total / len(real)


def central(function, point: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Return the gradient of a function by central differences."""
    sides = [[function(point + sign * step * unit) for sign in (1, -1)] for unit in np.eye(len(point))]
    return np.array([(up - down) / (2 * step) for up, down in sides])


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_their_equations(name):
    rng = np.random.default_rng(0)
    scores = 2 * rng.normal(size=20)  # ten real, ten generated

    def slow(which: int):
        return lambda s: float(np.mean([EQUATIONS[name](r, f)[which] for r, f in zip(s[:10].tolist(), s[10:].tolist())]))

    loss, s = LOSSES[name](), torch.from_numpy(scores)[:, None].requires_grad_()
    critic, generator = sum(loss.critic(s[:10], s[10:]).values()), loss.generator(s[10:], s[:10].detach())
    for which, ours in ((0, critic), (1, generator)):
        assert ours.item() == pytest.approx(slow(which)(scores), rel=1e-12)
        (gradient,) = torch.autograd.grad(ours, s)
        wanted = central(slow(which), scores)
        wanted[: 10 * which] = 0  # the generator does not change real examples
        np.testing.assert_allclose(gradient.flatten().numpy(), wanted, atol=1e-8)
    assert set(LOSSES) == set(EQUATIONS) == set(CHOICES["loss"]) and {"none", *PENALTIES} == set(CHOICES["penalty"])


@pytest.mark.parametrize("weight", [None, 3.0])
@pytest.mark.parametrize(("name", "published"), [("gp", 10), ("r1", 10), ("r1r2", 1)])
def test_penalties_equal_their_equations(name, published, weight):
    """Values, and the double backward: gradients with respect to the critic's parameters against finite differences."""
    rng, critic, penalty = np.random.default_rng(1), Critic(), PENALTIES[name](weight)
    real, fake = rng.normal(size=(2, 6, 2))
    torch.manual_seed(5)
    mix = torch.rand(6, 1, dtype=torch.float64).flatten().tolist()
    torch.manual_seed(5)
    ours = penalty(critic, torch.from_numpy(real), torch.from_numpy(fake))
    slow = lambda w: slow_penalty(name, weight or published, w.tolist(), real, fake, mix)
    assert ours.item() == pytest.approx(slow(critic.w.detach().numpy()), rel=1e-12)
    (gradient,) = torch.autograd.grad(ours, critic.w)
    np.testing.assert_allclose(gradient.numpy(), central(slow, critic.w.detach().numpy()), rtol=1e-6, atol=1e-7)


def test_penalty_through_convolutions_equals_finite_differences():
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(1, 3, 3, 2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(27, 1)).double()
    real, fake = torch.randn(2, 4, 1, 8, 8, dtype=torch.float64)
    weight = critic[0].weight

    def value() -> Tensor:
        torch.manual_seed(2)
        return PENALTIES["gp"]()(critic, real, fake)

    (gradient,) = torch.autograd.grad(value(), weight)
    for place in ((0, 0, 1, 1), (2, 0, 2, 0)):
        with torch.no_grad():
            sides = []
            for move in (1e-6, -2e-6):
                weight[place] += move
                sides.append(value().item())
            weight[place] += 1e-6
        assert gradient[place].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5)


def small(**changes) -> Adversarial:
    torch.manual_seed(0)
    nets = create("dcgan", image=16, channels=1, dim=8, noise=8), create("dcgan-discriminator", image=16, channels=1, dim=8)
    return build_adversarial(*nets, Settings().with_(changes), noise=8, real="image")


def test_logits_and_probabilities_give_the_same_loss():
    """Without a setting the loss takes probabilities; `non-saturating` takes scores, and is equal."""
    batch = pictures()[1].make(np.arange(8), None)
    for phase in ("critic", "generator"):
        found = []
        for changes in ({}, {"loss": "non-saturating"}):
            objective = small(**changes)
            torch.manual_seed(1)
            losses = objective(batch, phase)
            losses["loss"].backward()
            found.append((losses["loss"].detach(), [p.grad for p in objective.parameters() if p.grad is not None]))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_critics_return_scores_or_define_them():
    """Each generator has a loss for scores, or a critic that has both probabilities and scores."""
    for card in cards().values():
        if card.input_type == "noise" and "critic" in card.parts:
            critic = create(find(card.parts["critic"])[0].tiny)
            assert card.recipe.get("loss") or hasattr(critic, "forward_logits")
    for name, x in (
        ("dcgan-discriminator-test", torch.randn(3, 2, 17, 17)),
        ("simple-gan-discriminator-test", torch.randn(3, 6)),
    ):
        critic = create(name).eval()
        torch.testing.assert_close(critic.forward_logits(x).sigmoid(), critic(x))


@pytest.mark.parametrize("changes", [{"critic_steps": 3, "weight_clip": 0.02, "loss": "wasserstein"}, {"penalty": "r1r2"}])
def test_critic_steps_and_weight_clipping(changes):
    """Three steps of the critic read three batches, and no parameter of the critic leaves the limits."""
    objective = small(**changes)
    run = trainer(objective, pictures()[1], steps=4, batch=8, lr=1e-2, evaluate=None)
    losses = run.train_step(run.make_batch_stream())
    bound = max(p.abs().max().item() for p in objective.critic.parameters())
    assert [runner.phase.times for runner in run.runners] == [changes.get("critic_steps", 1), 1]
    assert run.batches_per_step == changes.get("critic_steps", 1)
    assert bound <= 0.02 if "weight_clip" in changes else bound > 0.1
    assert ("critic.penalty" in losses) == ("penalty" in changes)
    assert max(p.abs().max().item() for p in objective.model.parameters()) > 0.1


def test_penalty_is_in_the_loss_and_differentiates_images_only():
    """With classes, the critic's input has further channels, which are constants of the penalty."""
    torch.manual_seed(0)
    nets = create("dcgan", image=16, channels=1, dim=8, noise=10), create("dcgan-discriminator", image=16, channels=3, dim=8)
    objective = build_adversarial(
        *nets, Settings().with_({"loss": "hinge", "penalty": "gp"}), noise=8, real="image", num_classes=2
    )
    shapes = []
    objective.penalty = lambda score, real, fake: shapes.append((real.shape, fake.shape)) or score(real).sum() * 0 + 7
    batch = {"image": pictures()[0][:4], "label": torch.tensor([1, 2, 0, 1])}
    losses = objective(batch, "critic")
    assert losses["loss"].item() == pytest.approx((losses["real"] + losses["fake"]).item() + 7)
    assert shapes == [((4, 1, 16, 16),) * 2]


def test_wasserstein_needs_a_bounded_critic():
    with pytest.raises(SettingsError, match="penalty=gp, or weight_clip"):
        small(loss="wasserstein")
    with pytest.raises(SettingsError, match="penalty='wgan'"):
        Settings().with_({"penalty": "wgan"})


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Conv2d(3, 5, 3),
        lambda: nn.ConvTranspose2d(3, 5, 4, 2),
        lambda: nn.Linear(7, 4),
        lambda: nn.Embedding(6, 3),
    ],
)
def test_spectral_norm_equals_torch(build):
    """The same weights and vectors at the start, in two steps of training and in evaluation, with gradients."""
    layers = []
    for wrap in (spectral_norm, torch.nn.utils.parametrizations.spectral_norm):
        torch.manual_seed(3)
        layers.append(wrap(build().double()))
    ours, theirs = layers
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = (
        torch.tensor([1, 4])
        if isinstance(ours, nn.Embedding)
        else torch.randn(2, 7 if isinstance(ours, nn.Linear) else 3, dtype=torch.float64)
    )
    x = x if x.ndim == 1 or isinstance(ours, nn.Linear) else x[:, :, None, None].repeat(1, 1, 6, 6)
    for training in (True, True, False):
        outputs = [layer.train(training)(x) for layer in layers]
        for layer, y in zip(layers, outputs):
            layer.zero_grad()
            y.square().sum().backward()
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
        for a, b in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for _ in range(200):
            ours.train()(x)
        axis = ours.parametrizations.weight[0].axis
        assert torch.linalg.matrix_norm(ours.weight.movedim(axis, 0).flatten(1), 2).item() == pytest.approx(1, abs=1e-6)
    assert (
        has_spectral_norm(nn.Sequential(ours))
        and not has_spectral_norm(build())
        and isinstance(ours.parametrizations.weight[0], SpectralNorm)
    )


LEARNS = {
    "non-saturating": {"penalty": "r1", "penalty_weight": 1},
    "hinge": {"critic_steps": 2},
    "wasserstein": {"weight_clip": 0.05, "critic_steps": 3},
    "relativistic": {"penalty": "r1r2", "penalty_weight": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("loss", LEARNS)
def test_each_loss_learns_figures(tmp_path, loss):
    """A CNN that is trained on generated digits alone recognizes real ones (chance: 0.1)."""
    settings = {"steps": 700, "batch": 64, "evaluate": 100, "model.dim": 32, "lr": 1e-3, "ema": 0.98, "precision": "float32"}
    run = fit(
        samples.path("figures"),
        task="image-generation",
        model="dcgan",
        out=tmp_path / "run",
        settings={**settings, "minutes": 0, "loss": loss, **LEARNS[loss]},
    )
    assert run.record["settings"]["loss"] == loss and run.scores["classifier_accuracy"] > 0.7

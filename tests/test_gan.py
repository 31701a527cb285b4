"""DCGAN and its discriminator under the adversarial objective: training and sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fieldguide import create
from fieldguide.data.loader import Batches, mix_seeds
from fieldguide.models.registry import card
from fieldguide.objectives import Adversarial
from fieldguide.training.ema import ExponentialMovingAverage
from fieldguide.training.optim import build_optimizers
from test_diffusion import digits
from test_loop import settled, trainer


def gan() -> Adversarial:
    torch.manual_seed(0)
    return Adversarial(
        create("dcgan", image=16, channels=1, dim=8, noise=8),
        create(card("dcgan").parts["critic"], image=16, channels=1, dim=8),
        noise=8,
        real="image",
    )


def pictures() -> tuple[Tensor, Batches]:
    x, _ = digits(16)
    return x, Batches(len(x), lambda index, _: {"image": x[index]})


def distance(fake: Tensor, real: Tensor) -> float:
    """Return the Fréchet distance of Gaussians over the pixels."""
    (m1, m2), (c1, c2) = ([t(x.flatten(1).double()) for x in (fake, real)] for t in (lambda x: x.mean(0), lambda x: x.T.cov()))
    roots = torch.linalg.eigvals(c1 @ c2).real.clamp(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * roots)


@pytest.mark.slow
def test_dcgan_learns_digits_with_averaged_weights():
    x, data = pictures()
    objective, recipe = gan(), {k: v for k, v in card("dcgan").recipe.items() if k != "lr"}
    before = distance(objective.sample(range(500)), x)
    run = trainer(objective, data, steps=250, batch=64, lr=2e-3, **recipe | {"ema": 0.98})
    run.train()
    assert distance(objective.sample(range(500)), x) < 0.35 * before
    live = run.average.mean  # swapped: the average holds what was trained last
    assert len(live) == len([t for t in run.kept.state_dict().values() if t.is_floating_point()])
    name = next(
        i
        for i, key in enumerate(k for k, t in run.kept.state_dict().items() if t.is_floating_point())
        if key == "model.main.0.weight"
    )
    assert not torch.equal(live[name], objective.model.main[0].weight)


def test_ema_includes_batch_norm_statistics():
    generator = create("dcgan-test").train()
    average = ExponentialMovingAverage(generator, 0.5)
    generator(torch.randn(8, 6))
    average.update(100)
    with average.average_parameters():
        mean = generator.main[1].running_mean.clone()
    torch.testing.assert_close(mean, generator.main[1].running_mean / 2)


def test_samples_depend_on_seed_and_number_only():
    objective = gan().double().train()
    statistics = objective.model.main[1].running_mean.clone()
    whole = objective.sample(range(5), seed=2)
    torch.testing.assert_close(
        torch.cat([objective.sample([0, 1], seed=2), objective.sample([2, 3, 4], seed=2)]), whole, rtol=1e-10, atol=1e-12
    )
    assert not torch.allclose(objective.sample(range(5), seed=3), whole) and not torch.allclose(whole[0], whole[1])
    assert objective.training and objective.model.training and not whole.requires_grad
    assert torch.equal(objective.model.main[1].running_mean, statistics)
    noise = torch.randn(8, generator=torch.Generator().manual_seed(mix_seeds(2, 4))).double()
    objective.eval()
    torch.testing.assert_close(objective.model(noise[None])[0], whole[4])


def test_each_phase_trains_its_own_network_only():
    objective = gan()
    _, data = pictures()
    batch = data.make(np.arange(8), None)
    for phase, moves, stays in (("critic", objective.critic, objective.model), ("generator", objective.model, None)):
        objective.zero_grad()
        objective(batch, phase)["loss"].backward()
        assert all(p.grad is not None and p.grad.any() for p in moves.parameters())
        assert stays is None or all(p.grad is None for p in stays.parameters())


@pytest.mark.parametrize("beta1", [0.5, 0.9])
def test_beta1_is_passed_to_the_optimizer(beta1):
    net = torch.nn.Linear(2, 2)
    (made,) = build_optimizers(net, net.named_parameters(), settled(beta1=beta1))
    assert made.param_groups[0]["betas"] == (beta1, 0.999)


def test_generator_and_critic_are_conditioned_on_the_class():
    """A generator that copies its condition, and a critic that reads it from its additional channels."""

    class Copy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, z):  # B Z+K -> B 1 2 2: the sum of what is told, by place
            return (self.scale * (z[:, 4:] * torch.arange(1.0, 4.0)).sum(1))[:, None, None, None].expand(-1, 1, 2, 2)

    class Agree(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):  # B 1+K 2 2 -> B 1: real where the picture says its class
            told = (x[:, 1:] * torch.arange(1.0, 4.0)[:, None, None]).sum(1, keepdim=True)
            return self.scale * torch.where((x[:, :1] - told).abs().amax((1, 2, 3)) < 1e-6, 0.999, 0.001)[:, None]

    objective = Adversarial(Copy(), Agree(), noise=4, real="image", num_classes=3)
    label = torch.tensor([0, 1, 2, 3])
    assert objective.sample(range(4), label)[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    right = {"image": label.float()[:, None, None, None].expand(-1, 1, 2, 2), "label": label}
    wrong = {**right, "image": right["image"] + 1}
    assert objective(right, "critic")["real"] < 0.01 < 6 < objective(wrong, "critic")["real"]
    assert objective(right, "generator")["loss"] < 0.01

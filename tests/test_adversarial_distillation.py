"""Adversarial distillation: both losses and their gradients against the equations, example by example; levels; and a run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fieldguide.core.errors import SettingsError
from fieldguide.models.registry import create
from fieldguide.objectives import AdversarialDistillation, FlowProcess
from fieldguide.objectives.diffusion import Consistency, DirectBoundary, DiscreteProcess, EDMProcess
from test_consistency import denoise, read_level

PROCESSES = {"flow": FlowProcess, "discrete": lambda: DiscreteProcess("cosine", predicts="v"), "edm": EDMProcess}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(name, **options):
    torch.manual_seed(0)
    networks = [create("ddpm-unet-test"), create("ddpm-unet-test")]
    for p in (p for network in networks for p in network.parameters()):
        p.data.add_(0.1 * torch.randn_like(p))
    process = PROCESSES[name]()
    if isinstance(process, DiscreteProcess):
        process.signal, process.noise = (torch.tensor(process.alpha_bar) ** 0.5, (1 - torch.tensor(process.alpha_bar)) ** 0.5)
    shape = {"shape": (2, 8, 8), "label": torch.tensor(0)}
    return AdversarialDistillation(*networks, process, **shape, guidance=2.0, **options).double().eval()


def run_features(network, x, time, label):
    """The outputs of the blocks on the way down and of the middle, from the parts of the network: one N D for each."""
    condition, found, x = network.embed_condition(time, label), [], network.conv_in(x)
    for level in network.down:
        for i in range(len(level.blocks)):
            x = level.blocks[i](x, condition)
            x = level.attns[i](x) if level.attns is not None else x
            found.append(x)
        x = level.resize(nn.functional.pad(x, (0, 1, 0, 1))) if level.resize is not None else x
    first, second = network.mid.blocks
    found.append(second(network.mid.attns[0](first(x, condition)), condition))
    return [y[0].flatten(1).T for y in found]


def score(head, x):
    """Scores of the positions of one example, N D -> N."""
    scale = lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    x = scale(x)
    for layer, norm in ((head[1], head[2]), (head[4], head[5])):
        matrix = layer.parametrizations.weight.original
        weight = matrix / (layer.parametrizations.weight[0]._u @ matrix @ layer.parametrizations.weight[0]._v)
        x = scale(x @ weight.T + layer.bias) * norm.weight + norm.bias
        x = torch.where(x > 0, x, 0.2 * x)
    return (x @ head[7].weight.T + head[7].bias)[:, 0]


def noisy_features(objective, x, time, label, noise):
    signal, scale, seen = read_level(objective.process, float(time))
    c_in = (scale**2 + 0.25) ** -0.5 if isinstance(objective.process, EDMProcess) else 1.0
    where = c_in * (signal * x + scale * noise)
    return run_features(objective.frozen_teacher[0], where[None], torch.tensor([seen]), label[None])


def student_times(process):
    """The times of samplers with 1, 2 and 4 steps."""
    if isinstance(process, FlowProcess):
        return [1.0, 0.5, 0.75, 0.25]
    if isinstance(process, DiscreteProcess):
        return [999, 499, 749, 249]
    ramp = lambda n: [(80 ** (1 / 7) + i / n * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)]
    return [80.0, ramp(2)[1], ramp(4)[1], ramp(4)[3]]


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("phase", ["critic", "train"])
def test_losses_equal_their_equations(name, phase, double):
    objective = build(name, distillation=1.5, penalty=0.3)
    process, student, teacher_network = objective.process, objective.model, objective.frozen_teacher[0]
    clean, label = torch.randn(3, 2, 8, 8) / 2, torch.tensor([1, 0, 3])
    trained = objective.critic if phase == "critic" else student
    torch.manual_seed(3)
    losses = objective({"image": clean, "label": label}, phase)
    losses["loss"].backward()
    found = [p.grad.clone() for p in trained.parameters()]
    trained.zero_grad()
    assert all(p.grad is None for p in teacher_network.parameters())
    torch.manual_seed(3)  # the same draws
    chosen, noise = torch.randint(4, (3,)), torch.randn_like(clean)
    times = objective.critic_times.draw(process, 3, clean.device)
    first, second = torch.randn_like(clean), torch.randn_like(clean) if phase == "critic" else None
    total = 0.0
    again = objective.teacher_times.draw(process, 3, clean.device) if phase == "train" else None
    more = torch.randn_like(clean) if phase == "train" else None
    for i in range(3):
        time = student_times(process)[int(chosen[i])]
        signal, scale, _ = read_level(process, time)
        made = denoise(process, student, signal * clean[i] + scale * noise[i], time, int(label[i]))
        if phase == "critic":
            real = noisy_features(objective, clean[i], times[i], label[i], first[i])
            fake = noisy_features(objective, made.detach(), times[i], label[i], second[i])
            for head, r, f in zip(objective.critic, real, fake):
                r = r.detach().requires_grad_()
                slope = torch.autograd.grad(score(head, r).mean(), r, create_graph=True)[0]
                total = total + (1 - score(head, r)).clamp(min=0).mean() + (1 + score(head, f.detach())).clamp(min=0).mean()
                total = total + 0.3 / 2 * (slope**2).sum()
            continue
        fake = noisy_features(objective, made, times[i], label[i], first[i])
        total = total - sum(score(head, f).mean() for head, f in zip(objective.critic, fake))
        signal, scale, _ = read_level(process, float(again[i]))
        x = (signal * made + scale * more[i]).detach()
        with torch.no_grad():
            with_label, without = (denoise(process, teacher_network, x, float(again[i]), k) for k in (int(label[i]), 0))
        total = total + 1.5 * signal * ((made - without - 2 * (with_label - without)) ** 2).mean()
    total = total / 3
    torch.testing.assert_close(losses["loss"], total, rtol=1e-6, atol=1e-8)
    total.backward()
    for p, gradient in zip(trained.parameters(), found):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-5, atol=1e-8)


def test_students_generate_by_their_prediction_alone(double):
    """A step of the sampler returns the predicted data, and adds new noise for the next."""
    objective = build("flow")
    x, label = torch.randn(2, 2, 8, 8), torch.tensor([1, 2])
    found = objective.sample(label, (2, 8, 8), Consistency(steps=2, clip=0), seed=4)
    from fieldguide.objectives.noise import Noise

    draw = Noise(4, range(2), (2, 8, 8), x)
    x = draw()
    with torch.no_grad():
        middle = x - objective.model(x, torch.full((2,), 1000.0), label)
        x = 0.5 * middle + 0.5 * draw()
        torch.testing.assert_close(found, x - 0.5 * objective.model(x, torch.full((2,), 500.0), label), rtol=1e-6, atol=1e-6)
    assert math.isclose(DirectBoundary().get_lowest(objective.process), 0.0)


def test_transformers_have_features():
    torch.manual_seed(0)
    networks = [create("dit-test"), create("dit-test")]
    c = networks[0].config
    shape = (c.channels, c.image, c.image)
    objective = AdversarialDistillation(*networks, FlowProcess(), shape=shape, label=torch.tensor(0))
    assert len(objective.critic) == c.depth
    batch = {"image": torch.randn(2, *shape), "label": torch.tensor([1, 2])}
    for phase in ("critic", "train"):
        assert objective(batch, phase)["loss"].isfinite()
    assert not any("teacher" in name for name in objective.state_dict()) and objective.keep == ("model",)
    with pytest.raises(SettingsError, match="has no layers"):
        AdversarialDistillation(nn.Linear(2, 2), nn.Linear(2, 2), FlowProcess(), shape=(2,), label=torch.tensor(0))

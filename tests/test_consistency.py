"""Consistency models: losses of one pair of times by hand, boundary conditions, levels that double, and samplers against diffusers."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.objectives import ConsistencyDistillation, ConsistencyTraining
from fieldguide.objectives.diffusion import (
    Consistency,
    DiscreteProcess,
    EDMProcess,
    FlowProcess,
    Level,
    SigmaBoundary,
    SigmaSpacing,
    TimeBoundary,
    Timesteps,
    build_process,
    sample,
)
from fieldguide.objectives.noise import Noise
from tv import diffusers

PROCESSES = {
    "v": lambda: DiscreteProcess("cosine", predicts="v"),
    "eps": lambda: DiscreteProcess("linear", predicts="eps"),
    "edm": lambda: EDMProcess(predicts="edm"),
    "edm-v": lambda: EDMProcess(predicts="v"),
    "flow": lambda: FlowProcess(),
}
every_process = pytest.mark.parametrize("name", PROCESSES)
SHAPE = (2, 3, 4)


class Smooth(nn.Module):
    """An arbitrary smooth network with two parameters and optional dropout; keeps what it receives."""

    def __init__(self, scale: float = 0.7, dropout: float = 0.0):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(0.2))
        self.dropout, self.calls = nn.Dropout(dropout), []

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:  # B ..., B, B -> B ...
        self.calls.append((x.clone(), time.clone(), label.clone()))
        shape = (-1, *[1] * (x.ndim - 1))
        wave = torch.sin(time.to(x.dtype) / 100 + label + 1).view(shape)
        return self.dropout(self.scale * torch.tanh(x + x.flip(-1) / 2)) + self.shift * wave


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def read_level(process, time: float) -> tuple[float, float, float]:
    """Signal, noise, and the network's time, from the definitions of the processes."""
    if isinstance(process, EDMProcess):
        return 1.0, time, math.log(time) / 4
    if isinstance(process, FlowProcess):
        return 1 - time, time, 1000 * time
    return process.alpha_bar[int(time)] ** 0.5, (1 - process.alpha_bar[int(time)]) ** 0.5, time


def denoise(process, network, x: Tensor, time: float, label: int) -> Tensor:
    """x_0 of one example, from the definition of each prediction type."""
    signal, noise, seen = read_level(process, time)
    c_in = (noise**2 + 0.25) ** -0.5 if isinstance(process, EDMProcess) else 1.0
    out = network(c_in * x[None], torch.tensor([seen]), torch.tensor([label]))[0]
    if isinstance(process, EDMProcess):
        sign = 1 if process.predicts == "edm" else -1
        return 0.25 / (noise**2 + 0.25) * x + sign * noise * 0.5 / (noise**2 + 0.25) ** 0.5 * out
    if isinstance(process, FlowProcess):
        return x - noise * out
    return signal * x - noise * out if process.predicts == "v" else (x - noise * out) / signal


def jump(process, network, x: Tensor, time: float, label: int) -> Tensor:
    """The consistency function of one example, as in the paper: c_skip and c_out for x / signal and the output of a network of EDM."""
    signal, noise, _ = read_level(process, time)
    least = {DiscreteProcess: lambda: process.sigmas[0], EDMProcess: lambda: 0.002, FlowProcess: lambda: 0.001 / 0.999}
    sigma, low, y = noise / signal, float(least[type(process)]()), x / signal
    clean = denoise(process, network, x, time, label)
    output = (clean - 0.25 / (sigma**2 + 0.25) * y) * (sigma**2 + 0.25) ** 0.5 / (0.5 * sigma)
    return 0.25 / ((sigma - low) ** 2 + 0.25) * y + 0.5 * (sigma - low) / (sigma**2 + 0.25) ** 0.5 * output


def pick_times(process) -> tuple[Tensor, Tensor]:
    """Two pairs of neighboring times, the higher ones first."""
    times = process.space_times(11).double() if not isinstance(process, DiscreteProcess) else process.space_times(11)
    return times[[7, 3]], times[[6, 2]]


def hand_over(process) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    upper, lower = pick_times(process)
    if isinstance(process, DiscreteProcess):
        process.signal, process.noise = (
            torch.tensor([f(a) for a in process.alpha_bar]) for f in (math.sqrt, lambda a: (1 - a) ** 0.5)
        )
    return torch.randn(2, *SHAPE) / 2, torch.randn(2, *SHAPE), upper, lower, torch.tensor([1, 2])


def measure(difference: Tensor, distance: str) -> Tensor:
    if distance == "squared":
        return (difference**2).mean()
    c = 0.00054 * math.sqrt(difference.numel())
    return ((difference**2).sum() + c**2).sqrt() - c


@every_process
@pytest.mark.parametrize("distance", ["huber", "squared"])
def test_training_of_one_pair_by_hand(name, distance):
    process, network = PROCESSES[name](), Smooth()
    clean, noise, upper, lower, label = hand_over(process)
    found = ConsistencyTraining(network, process, distance=distance).compute_losses(clean, noise, upper, lower, label)
    slow = copy.deepcopy(network)
    wanted = []
    for i in range(2):
        (a, b, _), (c, d, _) = (read_level(process, t[i].item()) for t in (upper, lower))
        with torch.no_grad():
            target = jump(process, slow, c * clean[i] + d * noise[i], lower[i].item(), int(label[i]))
        there = jump(process, slow, a * clean[i] + b * noise[i], upper[i].item(), int(label[i]))
        gap = b / a - d / c if name.startswith("edm") else b / (a + b) - d / (c + d)
        wanted.append(measure(there - target, distance) / gap)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-7, atol=1e-9)
    for one, other in ((found, network), (torch.stack(wanted), slow)):
        one.sum().backward()
        assert other.scale.grad != 0
    torch.testing.assert_close(network.scale.grad, slow.scale.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(network.shift.grad, slow.shift.grad, rtol=1e-6, atol=1e-9)


@every_process
@pytest.mark.parametrize(("solver", "guidance", "clip"), [("ddim", 1.0, 0.0), ("ddim", 2.5, 1.0), ("heun", 1.5, 0.0)])
def test_distillation_of_one_pair_by_hand(name, solver, guidance, clip):
    process, network, teacher = PROCESSES[name](), Smooth(), Smooth(-0.4)
    clean, noise, upper, lower, label = hand_over(process)
    objective = ConsistencyDistillation(network, teacher, process, solver=solver, guidance=guidance, clip=clip)
    found = objective.compute_losses(clean, noise, upper, lower, label)

    def guess(x, time, i):  # x_0 is linear in the output, so that guidance is the same for both
        with_label, without = (denoise(process, teacher, x, time, k) for k in (int(label[i]), 0))
        x_0 = without + guidance * (with_label - without)
        return x_0.clamp(-clip, clip) if clip else x_0

    for i in range(2):
        here, there = upper[i].item(), lower[i].item()
        (a, b, _), (c, d, _) = read_level(process, here), read_level(process, there)
        x = a * clean[i] + b * noise[i]
        with torch.no_grad():
            x_0 = guess(x, here, i)
            eps = (x - a * x_0) / b
            y = c * x_0 + d * eps
            if solver == "heun" and name.startswith("edm"):  # algorithm 2 of EDM
                first, second = (x - x_0) / b, (y - guess(y, there, i)) / d
                y = x + (d - b) * (first + second) / 2
            elif solver == "heun":  # the same rule for y / (signal + noise), whose slope is eps - x_0
                further = guess(y, there, i)
                slope = ((eps - x_0) + ((y - c * further) / d - further)) / 2
                y = (c + d) * (x / (a + b) + (d / (c + d) - b / (a + b)) * slope)
            target = jump(process, network, y, there, int(label[i]))
        wanted = measure(jump(process, network, x, here, int(label[i])) - target, "huber")
        torch.testing.assert_close(found[i], wanted, rtol=1e-7, atol=1e-9)
    found.sum().backward()
    assert teacher.scale.grad is None and network.scale.grad != 0


@every_process
@pytest.mark.parametrize("boundary", [SigmaBoundary(), TimeBoundary()])
def test_least_noise_is_returned(name, boundary):
    """The boundary condition: f(x, t) = x / signal at the lowest time, whatever the network says."""
    process = PROCESSES[name]()
    clean, noise, *_ = hand_over(process)
    time = process.space_times(5)[:1].expand(2)
    level = process.get_level(time if time.dtype == torch.int64 else time.double(), clean.ndim)
    objective = ConsistencyTraining(Smooth(), process, boundary=boundary)
    x = process.add_noise(clean, noise, level)
    if isinstance(boundary, TimeBoundary) and not isinstance(process, DiscreteProcess):
        with pytest.raises(SettingsError, match="Use SigmaBoundary"):
            objective.predict(objective.model, x, level, torch.zeros(2, dtype=torch.int64))
        return
    found = objective.predict(objective.model, x, level, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(found, x / (level.signal if isinstance(boundary, SigmaBoundary) else 1), rtol=1e-5, atol=1e-6)


@every_process
def test_times_cover_the_process(name):
    process = PROCESSES[name]()
    times = process.space_times(9)
    assert (times.diff() > 0).all()
    ends = [process.get_level(times[[i]], 1) for i in (0, -1)]
    assert float(ends[0].noise / ends[0].signal) == pytest.approx(process.least_sigma, rel=1e-4)
    assert float(ends[1].noise / ends[1].signal) == pytest.approx(process.sigma_range[1], rel=1e-3)
    middle = {"edm": ((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2) ** 7, "edm-v": ((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2) ** 7}
    assert float(times[4]) == pytest.approx(middle.get(name, 0.5005 if name == "flow" else 500), rel=1e-6)


def test_number_of_levels_doubles():
    """Equation 19 of arXiv:2310.14189: min(s_0 2^(k // K'), s_1) + 1 with K' = K // (log2(s_1 / s_0) // 1 + 1)."""
    objective, steps = ConsistencyTraining(Smooth(), levels=(10, 1280)), 800
    found = []
    for k in range(steps):
        objective.progress = k / steps
        found.append(objective.count_levels())
    assert found == [min(10 * 2 ** (k // 100), 1280) + 1 for k in range(steps)]
    assert ConsistencyTraining(Smooth(), levels=(18, 18)).count_levels() == 19


def test_pairs_are_neighbors_and_follow_their_distribution():
    objective = ConsistencyTraining(Smooth(), EDMProcess(), levels=(20, 20))
    times = objective.process.space_times(21)
    upper, lower = objective.draw_pairs(20_000, torch.device("cpu"))
    index = torch.searchsorted(times, lower - 1e-9)
    torch.testing.assert_close(times[index + 1], upper)
    normal = lambda s: 0.5 * math.erf((math.log(s) + 1.1) / (math.sqrt(2) * 2.0))
    wanted = np.diff([normal(float(s)) for s in times])
    assert np.abs(np.bincount(index, minlength=20) / 20_000 - wanted / wanted.sum()).max() < 0.01
    flow = ConsistencyTraining(Smooth(), FlowProcess(), levels=(4, 4)).draw_pairs(20_000, torch.device("cpu"))[1]
    assert np.abs(np.unique(flow, return_counts=True)[1] / 20_000 - 0.25).max() < 0.015


def test_target_is_the_average_or_the_student_with_the_same_dropout():
    network = Smooth(dropout=0.5)
    objective = ConsistencyTraining(network, FlowProcess(), target_ema=0.9)
    assert [name for phase in objective.phases for name, _ in objective.phase_parameters(phase)] == [
        "model.scale",
        "model.shift",
    ]
    with torch.no_grad():
        network.scale += 1
    objective.after_step("train")
    assert objective.target.scale.item() == pytest.approx(0.9 * 0.7 + 0.1 * 1.7)
    assert "target.scale" in objective.state_dict() and objective.keep == ("model",)
    batch = {"image": torch.randn(3, *SHAPE)}
    objective(batch)["loss"].backward()
    assert objective.target.scale.grad is None and objective.target.calls
    same = ConsistencyTraining(Smooth(dropout=0.5), FlowProcess(), weights="uniform").train()
    time = torch.tensor([0.5, 0.7])
    losses = same.compute_losses(*(torch.randn(2, *SHAPE) for _ in range(2)), time, time, torch.zeros(2, dtype=torch.int64))
    assert losses.abs().max() == 0  # both times are the same


def test_frozen_teacher_is_not_saved():
    objective = ConsistencyDistillation(Smooth(), Smooth(), FlowProcess()).train()
    assert not objective.frozen_teacher[0].training and list(objective.state_dict()) == ["model.scale", "model.shift"]
    objective.float()
    assert objective.frozen_teacher[0].scale.dtype == torch.float32


@pytest.mark.parametrize(
    "options", [{"levels": (5, 2)}, {"levels": (0, 2)}, {"target_ema": 1.0}, {"distance": "l1"}, {"pairs": "x"}]
)
def test_invalid_options_are_rejected(options):
    with pytest.raises(SettingsError):
        ConsistencyTraining(Smooth(), EDMProcess(), **options)


# Samplers


def test_sampling_by_hand():
    """Algorithm 1: jump to the data, add the noise of the next level, jump again."""
    for name, make in PROCESSES.items():
        process, network = make(), Smooth()
        label = torch.tensor([1, 2, 0])
        made = sample(network, process, Consistency(steps=3, clip=0), label, SHAPE, seed=4)
        draw = Noise(4, range(3), SHAPE, torch.zeros(()))
        ramp = [(80 ** (1 / 7) + i / 3 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(3)]
        times = {"edm": ramp, "edm-v": ramp, "flow": [1 - 1e-12, 2 / 3, 1 / 3]}.get(name, [999, 666, 332])
        x = draw() * (80 if name.startswith("edm") else 1)
        for i, time in enumerate(times):
            x = torch.stack([jump(process, network, x[k], time, int(label[k])) for k in range(3)])
            if i < 2:
                signal, noise, _ = read_level(process, times[i + 1])
                x = signal * (x + math.sqrt((noise / signal) ** 2 - process.least_sigma**2) * draw())
        torch.testing.assert_close(made, x, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def run_peer(peer, network: nn.Module, steps: int, label: Tensor, scale_time: float = 1.0) -> Tensor:
    module = __import__(type(peer).__module__, fromlist=["randn_tensor"])
    draw = Noise(5, range(len(label)), SHAPE, torch.zeros(()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *_, **__: draw())
        peer.set_timesteps(steps)
        x = draw() * peer.init_noise_sigma
        for t in peer.timesteps:
            seen = peer.scale_model_input(x, t)
            with torch.no_grad():
                out = network(seen, (t * scale_time).expand(len(x)), label)
            x = peer.step(out, t, x).prev_sample
    return x


def compare(ours: Smooth, theirs: Smooth, made: Tensor, wanted: Tensor) -> None:
    assert len(ours.calls) == len(theirs.calls)
    for (x, time, _), (y, other, _) in zip(ours.calls, theirs.calls):
        torch.testing.assert_close(time.double(), other.double(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
    assert made.std() > 0.01


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_of_consistency_models_equal_diffusers(steps):
    ours, theirs, label = Smooth(), Smooth(), torch.tensor([0, 1, 2])
    peer = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    wanted = run_peer(peer, theirs, steps, label, 1e-3)  # it gives the network 250 log(sigma)
    sampler = Consistency(steps=steps, clip=0, spacing=SigmaSpacing(total=40))
    made = sample(ours, EDMProcess(predicts="edm"), sampler, label, SHAPE, seed=5)
    compare(ours, theirs, made, wanted)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("steps", "clip"), [(1, 0), (4, 0), (4, 1), (8, 1)])
def test_steps_of_latent_consistency_models_equal_diffusers(steps, clip, predicts):
    ours, theirs, label = Smooth(), Smooth(), torch.tensor([0, 1, 2])
    peer = diffusers.LCMScheduler(prediction_type=predicts, clip_sample=bool(clip), rescale_betas_zero_snr=False)
    wanted = run_peer(peer, theirs, steps, label)
    process = DiscreteProcess("scaled-linear", predicts={"epsilon": "eps", "v_prediction": "v", "sample": "x"}[predicts])
    sampler = Consistency(steps=steps, clip=clip, boundary=TimeBoundary(), spacing=Timesteps(kind="lcm"))
    compare(ours, theirs, sample(ours, process, sampler, label, SHAPE, seed=5), wanted)


def test_unknown_times_are_refused():
    with pytest.raises(SettingsError, match="50 times"):
        Consistency(steps=51, spacing=Timesteps(kind="lcm")).build_schedule(build_process("cosine"))
    with pytest.raises(SettingsError, match="1 to 40"):
        Consistency(steps=41, spacing=SigmaSpacing(total=40)).build_schedule(EDMProcess())
    with pytest.raises(SettingsError, match="Use SigmaBoundary"):
        TimeBoundary().get_factors(FlowProcess(), Level(0.5, 0.5, 500.0))

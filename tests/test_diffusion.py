"""Diffusion: noise process and samplers against diffusers in float64, the loss against a slow reference, and samples of
distributions whose optimal denoiser is known.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fieldguide import create
from fieldguide.core.errors import SettingsError
from fieldguide.data.loader import Batches, mix_seeds
from fieldguide.objectives import DDIM, DDPM, Diffusion, DiscreteProcess, MinSNR, Uniform
from fieldguide.objectives.diffusion import EVAL_NOISE_LEVELS, predict_with_guidance, sample
from fieldguide.objectives.noise import Noise
from test_loop import trainer

BOTH = pytest.mark.parametrize("predicts", ["eps", "v"])
NAMES = {"linear": "linear", "cosine": "squaredcos_cap_v2", "eps": "epsilon", "v": "v_prediction"}
EXACT = {"rtol": 1e-10, "atol": 1e-12}
SHAPES = pytest.mark.parametrize("shape", [(2, 4, 4), (3, 2, 4, 4)], ids=["picture", "video"])


def scheduler(kind: str, process: DiscreteProcess, schedule: str, **options):
    """Return a scheduler of diffusers whose float32 table of alphas is recomputed from its betas in float64."""
    from tv import diffusers

    scale = 1000 / process.steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = getattr(diffusers, kind)(
            num_train_timesteps=process.steps,
            beta_schedule=NAMES[schedule],
            beta_start=1e-4 * scale,
            beta_end=0.02 * scale,
            prediction_type=NAMES[process.predicts],
            timestep_spacing="trailing",
            clip_sample=True,
            **options,
        )
    peer.alphas_cumprod = torch.tensor(process.alpha_bar, dtype=torch.float64)
    peer.one = peer.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return peer


@pytest.mark.parametrize("steps", [1000, 100])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_noise_schedules_equal_those_of_diffusers(schedule, steps):
    from tv import diffusers

    process, scale = DiscreteProcess(schedule, steps), 1000 / steps
    peer = diffusers.DDPMScheduler(
        num_train_timesteps=steps, beta_schedule=NAMES[schedule], beta_start=1e-4 * scale, beta_end=0.02 * scale
    )
    # There in float32: a thousand roundings of 6e-8 add up.
    torch.testing.assert_close(torch.tensor(process.alpha_bar), peer.alphas_cumprod.double().float(), rtol=1e-4, atol=1e-8)
    assert process.alpha_bar[-1] < 1e-4 and np.all(np.diff(process.alpha_bar) < 0)
    torch.testing.assert_close(process.signal**2 + process.noise**2, torch.ones(steps))


def test_cosine_schedule_equals_the_paper():
    curve = lambda t: math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    left = DiscreteProcess("cosine", 1000).alpha_bar
    for t in (0, 10, 500, 900, 990):
        assert left[t] == pytest.approx(curve(t + 1) / curve(0), rel=1e-9)


@SHAPES
@BOTH
def test_noising_and_targets_equal_diffusers(predicts, shape):
    process = DiscreteProcess("cosine", predicts=predicts).double()
    peer = scheduler("DDPMScheduler", process, "cosine")
    torch.manual_seed(0)
    clean, noise, time = *torch.randn(2, 5, *shape, dtype=torch.float64), torch.tensor([0, 1, 300, 998, 999])
    level = process.get_level(time, clean.ndim)
    torch.testing.assert_close(process.add_noise(clean, noise, level), peer.add_noise(clean, noise, time), rtol=1e-6, atol=1e-6)
    want = noise if predicts == "eps" else peer.get_velocity(clean, noise, time)
    torch.testing.assert_close(process.compute_target(clean, noise, level), want, rtol=1e-6, atol=1e-6)
    for i, t in enumerate(time.tolist()):  # what was mixed comes out again, but for the last steps
        x, output = process.add_noise(clean, noise, level), process.compute_target(clean, noise, level)
        if process.alpha_bar[t] > 1e-3:
            torch.testing.assert_close(process.predict_clean(x, output, process.level_at(t))[i], clean[i], rtol=1e-4, atol=1e-4)


class Wavy(nn.Module):
    """An arbitrary smooth network of data, time and label."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:  # B ..., B, B -> B ...
        shape = (-1, *[1] * (x.ndim - 1))
        return self.scale * torch.tanh(x + x.flip(-1) / 2) + torch.sin(time.double() / 100 + label).view(shape)


def trajectory(peer, model: nn.Module, x: Tensor, label: Tensor, draw: Noise, steps: int, guidance: float = 1.0, **options):
    """Return every step of a scheduler of diffusers with our noise."""
    peer.set_timesteps(steps)
    for t in peer.timesteps:
        time = torch.full((len(x),), float(t), dtype=x.dtype)
        with torch.no_grad():
            output = model(x, time, 0 * label) + guidance * (model(x, time, label) - model(x, time, 0 * label))
        x = peer.step(
            output,
            t,
            x,
            **{name: value() if callable(value) else value for name, value in options.items()},
        ).prev_sample
    return x


@BOTH
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("steps", "eta", "shape"),
    [(1, 0.0, (2, 4, 4)), (4, 0.6, (2, 4, 4)), (50, 0.0, (3, 2, 4, 4)), (50, 1.0, (2, 4, 4)), (250, 0.3, (7,))],
)
def test_ddim_steps_equal_diffusers(predicts, schedule, steps, eta, shape):
    model, process = Wavy(), DiscreteProcess(schedule, predicts=predicts)
    peer, label = scheduler("DDIMScheduler", process, schedule), torch.tensor([0, 1, 2])
    ours = sample(model, process, DDIM(steps=steps, eta=eta), label, shape, seed=3, guidance=1.5)
    draw = Noise(3, range(3), shape, model.scale.data)
    start = draw()
    noise = [draw() if eta and i < steps - 1 else torch.zeros_like(start) for i in range(steps)]
    options = (
        {"eta": eta, "use_clipped_model_output": True, "variance_noise": lambda: noise.pop(0)}
        if eta
        else {"eta": eta, "use_clipped_model_output": True}
    )
    theirs = trajectory(peer, model, start, label, draw, steps, 1.5, **options)
    # At the last times hardly any signal is left to divide by: 1 / signal is 2e4 for cosine.
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@BOTH
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize(("steps", "shape"), [(3, (2, 4, 4)), (50, (3, 2, 4, 4)), (1000, (4,))])
def test_ddpm_steps_equal_diffusers(predicts, schedule, variance, steps, shape, monkeypatch):
    model, process = Wavy(), DiscreteProcess(schedule, predicts=predicts)
    peer, label = scheduler("DDPMScheduler", process, schedule, variance_type=f"fixed_{variance}"), torch.tensor([0, 1, 2])
    ours = sample(model, process, DDPM(steps=steps, variance=variance), label, shape, seed=3)
    draw = Noise(3, range(3), shape, model.scale.data)
    start, left = draw(), [steps]

    def noise(*_, **__):  # there, noise is also added at the end, to the data
        left[0] -= 1
        return draw() if left[0] else torch.zeros_like(start)

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", noise)
    theirs = trajectory(peer, model, start, label, draw, steps)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@BOTH
def test_ddim_with_eta_1_equals_ddpm(predicts):
    model, process, label = Wavy(), DiscreteProcess(predicts=predicts), torch.tensor([1, 2])
    ddpm, ddim = (sample(model, process, sampler, label, (6,), seed=1) for sampler in (DDPM(steps=30), DDIM(steps=30, eta=1.0)))
    torch.testing.assert_close(ddpm, ddim, rtol=1e-7, atol=1e-9)


def test_sampling_times_are_evenly_spaced_from_the_last():
    process = DiscreteProcess(steps=1000)
    for steps in (1, 2, 3, 7, 20, 49, 333, 999, 1000):
        times = get_times(DDIM(steps=steps), process)
        assert len(times) == steps and times[0] == 999 and times[-1] >= 0
        gaps = -np.diff([*times, -1])
        assert gaps.min() >= 1000 // steps and gaps.max() <= math.ceil(1000 / steps)
    assert get_times(DDIM(steps=1000), process) == list(range(999, -1, -1))


def get_times(sampler, process) -> list[float]:
    return [level.time for level in sampler.build_schedule(process).levels]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DiscreteProcess("square"), "schedule must be linear, cosine"),
        (lambda: DiscreteProcess(predicts="z"), "predicts eps, x, v or velocity"),
        (lambda: DiscreteProcess(steps=0), "steps at least 1"),
        (lambda: DDIM(steps=0).build_schedule(DiscreteProcess()), "1 to 1000"),
        (lambda: DDIM(steps=1001).build_schedule(DiscreteProcess()), "1 to 1000"),
    ],
)
def test_invalid_settings_are_rejected(make, words):
    with pytest.raises(SettingsError, match=words):
        make()


# ------------------------------------------------------------------------------------------------ the loss


def slow_loss(
    model: nn.Module, batch: dict[str, Tensor], schedule: str, predicts: str, gamma: float | None, seed: int
) -> float:
    """Compute the loss example by example from the equations, with random numbers drawn in the same order."""
    clean, label = batch["image"], batch["label"]
    torch.manual_seed(seed)
    times = torch.randint(1000, (len(clean),))
    kept = torch.rand(len(clean), device=clean.device)
    noise = torch.randn_like(clean)
    total = 0.0
    for n in range(len(clean)):
        t, left = int(times[n]), 1.0
        for s in range(t + 1):
            if schedule == "linear":
                beta = 1e-4 + (0.02 - 1e-4) * s / 999
            else:
                f = lambda u: math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
                beta = min(1 - f(s + 1) / f(s), 0.999)
            left *= 1 - beta
        x = left**0.5 * clean[n] + (1 - left) ** 0.5 * noise[n]
        said = model(x[None], torch.tensor([float(t)]), torch.tensor([int(label[n]) if kept[n] >= 0.3 else 0]))[0]
        snr = left / (1 - left)
        if predicts == "eps":
            wanted, weight = noise[n], 1.0 if gamma is None else min(snr, gamma) / snr
        else:
            wanted = left**0.5 * noise[n] - (1 - left) ** 0.5 * clean[n]
            weight = 1.0 if gamma is None else min(snr, gamma) / (snr + 1)
        total += weight * sum(float(d) ** 2 for d in (said - wanted).flatten()) / wanted.numel()
    return total / len(clean)


@BOTH
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("gamma", [None, 5.0])
@SHAPES
def test_loss_equals_the_paper(predicts, schedule, gamma, shape):
    torch.manual_seed(1)
    batch = {"image": torch.rand(12, *shape, dtype=torch.float64) * 2 - 1, "label": torch.randint(0, 4, (12,))}
    objective = Diffusion(
        Wavy(), DiscreteProcess(schedule, predicts=predicts), Uniform() if gamma is None else MinSNR(gamma), drop=0.3
    )
    torch.manual_seed(7)
    loss = objective(batch)["loss"]
    with torch.no_grad():
        want = slow_loss(objective.model, batch, schedule, predicts, gamma, seed=7)
    assert float(loss.detach()) == pytest.approx(want, rel=2e-4)  # alpha-bar is kept in float32
    assert torch.autograd.grad(loss, objective.model.scale)[0].isfinite()


def test_min_snr_weights_of_eps_and_v_are_equivalent():
    """Equal errors of x_0 have equal losses for either prediction: Hang et al., section 3.4."""
    torch.manual_seed(0)
    clean, noise, wrong = (torch.randn(8, 3, dtype=torch.float64) for _ in range(3))
    time = torch.tensor([1, 100, 300, 500, 700, 800, 900, 950])
    found = []
    for predicts in ("eps", "v"):
        process = DiscreteProcess("linear", predicts=predicts).double()
        level = process.get_level(time, 2)
        signal, share = level.signal, level.noise
        x = process.add_noise(clean, noise, level)
        seen = clean + wrong
        eps = (x - signal * seen) / share  # what belongs to that wrong x_0
        output = eps if predicts == "eps" else signal * eps - share * seen
        error = ((output - process.compute_target(clean, noise, level)) ** 2).mean(1)
        found.append(MinSNR(5.0)(process, level)[:, 0] * error)
    want = ((signal / share) ** 2)[:, 0].clamp(max=5) * (wrong**2).mean(1)
    torch.testing.assert_close(found[0], want, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found[1], want, rtol=1e-5, atol=1e-9)


def test_label_dropout_rate_in_training_only():
    seen = []

    class Listens(Wavy):
        def forward(self, x, time, label):
            seen.append(label)
            return super().forward(x, time, label)

    objective = Diffusion(Listens(), drop=0.25)
    batch = {"image": torch.zeros(4000, 2, dtype=torch.float64), "label": torch.full((4000,), 3)}
    torch.manual_seed(0)
    objective(batch)
    assert set(seen[0].tolist()) == {0, 3} and abs(float((seen[0] == 0).double().mean()) - 0.25) < 0.03
    seen.clear()
    objective.outputs(batch)
    assert len(seen) == EVAL_NOISE_LEVELS and all((label == 3).all() for label in seen)
    seen.clear()
    objective({"image": batch["image"]})  # no labels at all
    assert (seen[0] == 0).all()


def test_evaluation_does_not_depend_on_the_batch():
    objective = Diffusion(Wavy())
    torch.manual_seed(0)
    batch = {"image": torch.randn(6, 2, 3, dtype=torch.float64), "label": torch.arange(6)}
    whole = objective.outputs(batch)["loss"]
    parts = [objective.outputs({key: x[i:j] for key, x in batch.items()})["loss"] for i, j in ((0, 1), (1, 4), (4, 6))]
    assert whole.shape == (6,)
    torch.testing.assert_close(torch.cat(parts), whole, **EXACT)


# ------------------------------------------------------------------------------------------------ samples

MEANS, SPREADS, SHARES = (-0.6, 0.1, 0.7), (0.08, 0.15, 0.05), (0.5, 0.2, 0.3)


class BestDenoiser(nn.Module):
    """The optimal prediction for a mixture of Gaussians on a line, or for one component if a label selects it.

    E[x_0 | x_t] is the mean of the posterior means of the components, weighted by their likelihood of x_t.
    """

    def __init__(self, process: DiscreteProcess):
        super().__init__()
        self.process, self.still = process, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:  # B D, B, B -> B D
        left = torch.tensor(self.process.alpha_bar, dtype=x.dtype)[time.long()][:, None, None]
        mean, spread, share = (torch.tensor(v, dtype=x.dtype) for v in (MEANS, SPREADS, SHARES))
        total = left * spread**2 + 1 - left  # variance of x_t, B 1 K
        away = x[:, :, None] - left**0.5 * mean  # B D K
        # Components are drawn once for all D axes, which then agree: a mixture in the plane when D is 2.
        score = share.log() - (away**2 / total + total.log()).sum(1) / 2  # B K
        asked = torch.nn.functional.one_hot(label, 4)[:, 1:].bool()
        score = torch.where((label > 0)[:, None] & ~asked, -torch.inf, score).softmax(1)
        best = ((mean + left**0.5 * spread**2 / total * away) * score[:, None]).sum(2)
        signal, noise = left[:, 0] ** 0.5, (1 - left[:, 0]) ** 0.5
        eps = (x - signal * best) / noise
        return eps if self.process.predicts == "eps" else signal * eps - noise * best


def distances(samples: Tensor, dims: int) -> float:
    """Return the largest difference between the distribution functions of samples and mixture, along each axis."""

    def cdf(x: float) -> float:
        return sum(p * (1 + math.erf((x - m) / s / 2**0.5)) / 2 for m, s, p in zip(MEANS, SPREADS, SHARES))

    gaps = []
    for axis in range(dims):
        ordered = samples[:, axis].sort().values.tolist()
        gaps.append(max(abs(cdf(x) - (i + 0.5) / len(ordered)) for i, x in enumerate(ordered)))
    return max(gaps)


@BOTH
@pytest.mark.parametrize("schedule", [pytest.param("linear", marks=pytest.mark.slow), "cosine"])
@pytest.mark.parametrize(
    "sampler",
    [DDPM(steps=200, clip=0), DDIM(steps=100, clip=0), DDIM(steps=100, eta=0.5, clip=0)],
    ids=["ddpm", "ddim", "ddim eta 0.5"],
)
@pytest.mark.parametrize("dims", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_samples_follow_the_mixture(predicts, schedule, sampler, dims):
    process = DiscreteProcess(schedule, predicts=predicts)
    count = 3000
    found = sample(BestDenoiser(process), process, sampler, torch.zeros(count, dtype=torch.int64), (dims,), seed=5)
    # 3000 true draws stay below 0.030 in 99 of 100 cases (Kolmogorov); a few hundred steps are not infinitely many.
    assert distances(found, dims) < 0.04
    if dims == 2:  # axes agree on the component: no samples at crossings
        centres = torch.tensor(MEANS, dtype=found.dtype)
        nearest = (found[:, :, None] - centres).abs().argmin(2)
        assert (nearest[:, 0] == nearest[:, 1]).double().mean() > 0.97


def test_label_and_guidance_select_a_component():
    process = DiscreteProcess()
    model, label = BestDenoiser(process), torch.arange(1, 4).repeat_interleave(800)
    # Without noise, few steps end up too close to the middle: 17 % at 60 steps, a few at 400.
    found = sample(model, process, DDIM(steps=400, clip=0), label, (1,), seed=1).view(3, 800)
    for i in range(3):
        assert abs(float(found[i].mean()) - MEANS[i]) < 0.02 and abs(float(found[i].std()) / SPREADS[i] - 1) < 0.08
    away = sample(model, process, DDIM(steps=400, clip=0), label, (1,), seed=1, guidance=3.0).view(3, 800)
    assert away[0].mean() < found[0].mean() and away[2].mean() > found[2].mean()
    x, time = torch.randn(6, 1, dtype=torch.float64), torch.full((6,), 500.0)
    label = torch.tensor([1, 2, 3, 1, 0, 0])
    with_, without = model(x, time, label), model(x, time, 0 * label)
    for strength in (0.0, 0.5, 1.0, 3.0):
        want = strength * with_ + (1 - strength) * without
        torch.testing.assert_close(predict_with_guidance(model, x, time, label, strength), want, **EXACT)


@pytest.mark.parametrize("sampler", [DDPM(steps=10), DDIM(steps=10), DDIM(steps=10, eta=1.0)], ids=["ddpm", "ddim", "eta"])
def test_samples_depend_on_seed_and_number_only(sampler):
    model, process, label = Wavy().double(), DiscreteProcess(), torch.tensor([0, 1, 2, 1, 2])
    whole = sample(model, process, sampler, label, (2, 5), seed=4)
    torch.testing.assert_close(sample(model, process, sampler, label, (2, 5), seed=4), whole, rtol=0, atol=0)
    parts = [
        sample(model, process, sampler, label[i:j], (2, 5), seed=4, numbers=range(i, j)) for i, j in ((0, 2), (2, 3), (3, 5))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, **EXACT)
    odd = sample(model, process, sampler, label[1::2], (2, 5), seed=4, numbers=[1, 3])  # as one of two processes has
    torch.testing.assert_close(odd, whole[1::2], **EXACT)
    assert not torch.allclose(sample(model, process, sampler, label, (2, 5), seed=5), whole)
    assert not torch.allclose(whole[1], whole[3])  # the same label, another number
    assert whole.abs().max() <= 1  # clipped


def test_sampling_has_no_side_effects():
    model = Wavy().train()
    torch.manual_seed(0)
    before, steps = torch.get_rng_state(), []
    out = sample(model, DiscreteProcess(), DDIM(steps=3), torch.zeros(2, dtype=torch.int64), (3,), callback=steps.append)
    assert model.training and torch.equal(torch.get_rng_state(), before) and steps == [1, 2, 3] and not out.requires_grad


# ------------------------------------------------------------------------------------------------ training


def digits(side: int) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits in -1 .. 1, with a black border if the side is larger than 8; labels from 1."""
    from sklearn.datasets import load_digits

    found, rim = load_digits(), (side - 8) // 2
    x = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    return nn.functional.pad(x, (rim, rim, rim, rim), value=-1.0), torch.from_numpy(found.target) + 1


@pytest.mark.slow  # test_task_images_made.py does so in `make test`, end to end
@pytest.mark.parametrize(("side", "steps"), [(8, 300), (16, 1500)])
def test_learns_to_generate_the_requested_digit(side, steps):
    """A linear classifier trained on real digits recognizes samples of 20 steps."""
    from sklearn.linear_model import LogisticRegression

    x, y = digits(side)
    torch.manual_seed(0)
    model = create(
        "ddpm-unet-test", image=side, channels=1, num_classes=10, dim=16, attend=(4,), growth=(1, 2) if side == 8 else (1, 2, 2)
    )
    objective = Diffusion(model, DiscreteProcess("cosine", predicts="v"))
    data = Batches(len(x), lambda index, _: {"image": x[index], "label": y[index]})
    trainer(objective, data, steps=steps, batch=64, lr=4e-3, ema=0.98, weight_decay=0.0).train()
    asked = torch.arange(100) % 10 + 1
    drawn = objective.sample(asked, (1, side, side), DDIM(steps=20), guidance=2.0, seed=1)
    reader = LogisticRegression(max_iter=300).fit(x.flatten(1).numpy(), y.numpy())
    read = reader.predict(drawn.flatten(1).numpy())
    assert (read == asked.numpy()).mean() >= 0.8
    assert drawn.view(10, 10, -1).std(0).mean() > 0.04  # ten drawings of a digit differ, but not at the rim


def test_noise_depends_on_seed_and_number_only():
    draw = Noise(3, [7, 8], (5,), torch.zeros((), dtype=torch.float64))
    first, second = draw(), draw()
    assert first.dtype == torch.float64 and not torch.equal(first, second)
    torch.testing.assert_close(first[1], torch.randn(5, generator=torch.Generator().manual_seed(mix_seeds(3, 8))).double())
    many = Noise(0, range(4000), (4,), torch.zeros(()))()
    assert abs(float(many.mean())) < 0.03 and abs(float(many.std()) - 1) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([many[:-1, 0], many[1:, 0]]))[0, 1])) < 0.06

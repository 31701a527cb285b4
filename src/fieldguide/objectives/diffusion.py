"""Diffusion: a network learns to name the noise in data, and samplers take it away (Ho et al. 2020, arXiv:2006.11239).

Three things stand around a plain network, none knowing another's choices (Karras et al. 2022, arXiv:2206.00364, table
1): the `Process` mixes data with noise, a weighting says how much each noise level counts, a sampler goes back.
Shapes: B batch, ... any further axes: C H W of pictures, F C H W of videos. T steps of the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.base import Objective
from fieldguide.objectives.noise import Noise

EVAL_NOISE_LEVELS = 4  # noise levels that the loss of an evaluation is measured at


# ------------------------------------------------------------------------------------------------ the process


def linear_betas(steps: int) -> np.ndarray:  # -> T
    """Section 4 of the paper, 1e-4 to 0.02 in 1000 steps; fewer steps are as much longer (as in arXiv:2102.09672's code)."""
    return np.minimum(np.linspace(1e-4, 0.02, steps) * 1000 / steps, 0.999)


def cosine_betas(steps: int) -> np.ndarray:  # -> T
    """Equation 17 of Nichol and Dhariwal 2021, arXiv:2102.09672: noise comes more slowly at both ends."""
    left = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - left[1:] / left[:-1], 0.999)


SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {"linear": linear_betas, "cosine": cosine_betas}
PREDICTION_TYPES = ("eps", "v")


class Process(nn.Module):
    """x_t = signal_t x_0 + noise_t eps, for t = 0 .. T-1 (equation 4), and what the network is asked for.

    `predicts="eps"` asks for the noise; `"v"` for signal eps - noise x_0 (Salimans and Ho 2022, arXiv:2202.00512,
    appendix D), which stays well-posed where hardly any signal is left. `left` holds signal_t squared, the paper's
    alpha-bar, in float64. Raises `SettingsError` for an unknown schedule or prediction.
    """

    def __init__(self, schedule: str = "cosine", steps: int = 1000, predicts: str = "eps"):
        super().__init__()
        if schedule not in SCHEDULES or predicts not in PREDICTION_TYPES or steps < 1:
            raise SettingsError(
                f"diffusion with schedule={schedule!r}, steps={steps}, predicts={predicts!r}: schedules "
                f"are {', '.join(SCHEDULES)}; predicted is {' or '.join(PREDICTION_TYPES)}; steps begin at 1"
            )
        self.steps, self.predicts = steps, predicts
        left = np.cumprod(1 - SCHEDULES[schedule](steps))
        self.alpha_bar: list[float] = left.tolist()
        self.register_buffer("signal", torch.tensor(np.sqrt(left), dtype=torch.float32), persistent=False)
        self.register_buffer("noise", torch.tensor(np.sqrt(1 - left), dtype=torch.float32), persistent=False)

    def get_rates(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:  # B int64 -> twice B 1 ...
        shape = (-1, *[1] * (like.ndim - 1))
        return self.signal[time].view(shape), self.noise[time].view(shape)

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:  # B ..., B ..., B int64 -> B ...
        signal, share = self.get_rates(time, clean)
        return signal * clean + share * noise

    def compute_target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:  # B ..., B ..., B int64 -> B ...
        if self.predicts == "eps":
            return noise
        signal, share = self.get_rates(time, clean)
        return signal * noise - share * clean

    def predict_clean(self, x: Tensor, output: Tensor, time: int) -> Tensor:  # B ..., B ... -> B ...
        """The data that the network sees in `x`, all of which is at one time."""
        signal, share = math.sqrt(self.alpha_bar[time]), math.sqrt(1 - self.alpha_bar[time])
        return (x - share * output) / signal if self.predicts == "eps" else signal * x - share * output

    def compute_snr(self, time: Tensor) -> Tensor:  # B int64 -> B
        """Signal to noise, squared."""
        return (self.signal[time] / self.noise[time]) ** 2


# ------------------------------------------------------------------------------------------------ the weighting


class Uniform:
    """Every noise level counts the same (equation 14 of the paper, for eps)."""

    def __call__(self, process: Process, time: Tensor) -> Tensor:  # B int64 -> B
        return torch.ones_like(process.signal[time])


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma) times the squared error of x_0 (Hang et al. 2023, arXiv:2303.09556, section 3.4).

    Written for what the network predicts: the error of x_0 is that of eps over the SNR, that of v over SNR + 1.
    """

    gamma: float = 5.0

    def __call__(self, process: Process, time: Tensor) -> Tensor:  # B int64 -> B
        ratio = process.compute_snr(time)
        return ratio.clamp(max=self.gamma) / (ratio if process.predicts == "eps" else ratio + 1)


# ------------------------------------------------------------------------------------------------ the samplers


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How noise becomes data in `steps` steps. What the network sees is held within -clip .. clip (0 = as it is)."""

    steps: int = 50
    clip: float = 1.0

    def get_timesteps(self, process: Process) -> list[int]:
        """Evenly spaced times from the last to near the first; the last is pure noise, as the start of sampling is
        (Lin et al. 2023, arXiv:2305.08891, section 3.3). Raises `SettingsError` for more steps than there are."""
        if not 1 <= self.steps <= process.steps:
            raise SettingsError(f"sampling in {self.steps} steps: choose 1 to {process.steps}, which the noise process has")
        return [round(left * process.steps / self.steps) - 1 for left in range(self.steps, 0, -1)]

    def predict_clean(self, process: Process, x: Tensor, output: Tensor, time: int) -> Tensor:  # B ..., B ... -> B ...
        clean = process.predict_clean(x, output, time)
        return clean.clamp(-self.clip, self.clip) if self.clip else clean

    def step(
        self, process: Process, x: Tensor, output: Tensor, time: int, before: int, draw: Callable[[], Tensor]
    ) -> Tensor:  # B ..., B ... -> B ...
        """From a time to the one before it, -1 for data; `draw` gives fresh noise."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DDPM(Sampler):
    """Ancestral sampling (algorithm 2 of the paper), over any subset of the times.

    The noise added has the variance of the posterior (`variance="small"`, equation 7) or of the step ("large").
    """

    steps: int = 1000
    variance: str = "small"

    def step(
        self, process: Process, x: Tensor, output: Tensor, time: int, before: int, draw: Callable[[], Tensor]
    ) -> Tensor:  # B ..., B ... -> B ...
        clean = self.predict_clean(process, x, output, time)
        if before < 0:
            return clean
        here, there = process.alpha_bar[time], process.alpha_bar[before]
        alpha = here / there  # of the steps between
        x = (math.sqrt(there) * (1 - alpha) * clean + math.sqrt(alpha) * (1 - there) * x) / (1 - here)
        variance = (1 - alpha) * ((1 - there) / (1 - here) if self.variance == "small" else 1.0)
        return x + math.sqrt(variance) * draw()


@dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
    """Steps that may be few (Song et al. 2021, arXiv:2010.02502, equations 12 and 16).

    `eta=0` adds no noise: the same start gives the same data. `eta=1` is `DDPM` with small variance. The noise is read
    anew from what is left after clipping, so that the two always add up to x.
    """

    eta: float = 0.0

    def step(
        self, process: Process, x: Tensor, output: Tensor, time: int, before: int, draw: Callable[[], Tensor]
    ) -> Tensor:  # B ..., B ... -> B ...
        clean = self.predict_clean(process, x, output, time)
        if before < 0:
            return clean
        here, there = process.alpha_bar[time], process.alpha_bar[before]
        noise = (x - math.sqrt(here) * clean) / math.sqrt(1 - here)
        fresh = self.eta * math.sqrt((1 - there) / (1 - here) * (1 - here / there))
        x = math.sqrt(there) * clean + math.sqrt(max(1 - there - fresh**2, 0.0)) * noise
        return x + fresh * draw() if fresh else x


def predict_with_guidance(
    model: nn.Module, x: Tensor, time: Tensor, label: Tensor, guidance: float
) -> Tensor:  # B ... -> B ...
    """Classifier-free guidance: away from the answer without a label, `guidance` times as far as that with it.

    1 follows the label, 0 forgets it, more than 1 exaggerates it (Ho and Salimans 2022, arXiv:2207.12598, equation 6
    with w = guidance - 1). Both answers are asked for in one batch.
    """
    if guidance in (0.0, 1.0):
        return model(x, time, label * int(guidance))
    both = model(torch.cat([x, x]), torch.cat([time, time]), torch.cat([label, torch.zeros_like(label)]))
    with_label, without = both.chunk(2)
    return without + guidance * (with_label - without)


@torch.no_grad()
def sample(
    model: nn.Module,
    process: Process,
    sampler: Sampler,
    label: Tensor,
    shape: Sequence[int],
    *,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    guidance: float = 1.0,
    callback: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """One example a label (B int64, or B T tokens of captions; 0 = none), each of `shape`: B x shape. `watch` hears of
    every step.

    The noise of an example depends on the seed and its number alone, by default 0 and up: batches of any size agree.
    """
    like, training = next(model.parameters()), model.training
    draw = Noise(seed, range(len(label)) if numbers is None else map(int, numbers), shape, like)
    x, label, times = draw(), label.to(like.device), sampler.get_timesteps(process)
    model.eval()
    try:
        for done, (time, before) in enumerate(zip(times, [*times[1:], -1]), 1):
            output = predict_with_guidance(model, x, torch.full((len(x),), float(time), device=x.device), label, guidance)
            x = sampler.step(process, x, output.to(x.dtype), time, before, draw)
            callback(done)
    finally:
        model.train(training)
    return x


# ------------------------------------------------------------------------------------------------ the objective


class Diffusion(Objective):
    """Squared error of what the network says of noisy data. The network takes (B ..., B float time, B int64 label).

    `data` names the batch tensor of clean examples, in -1 .. 1: pictures or videos. The batch may hold `label`, 1 and
    up, or B T tokens of captions; in training each becomes 0, "none", with probability `drop`, so that one network learns
    both answers that guidance needs (arXiv:2207.12598, algorithm 1).
    """

    def __init__(
        self,
        model: nn.Module,
        process: Process | None = None,
        weighting: Callable[..., Tensor] | None = None,
        *,
        data: str = "image",
        drop: float = 0.1,
    ):
        super().__init__()
        self.model, self.process, self.weighting = model, process or Process(), weighting or Uniform()
        self.data, self.drop = data, drop

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        clean, label = self.get_data_and_label(batch)
        time = torch.randint(self.process.steps, (len(clean),), device=clean.device)
        kept = torch.rand(len(clean), device=clean.device) >= self.drop
        label = label * kept.view(-1, *[1] * (label.ndim - 1))
        return {"loss": self.compute_errors(clean, torch.randn_like(clean), time, label).mean()}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of each example, at fixed times and noise, the same for all: repeatable in batches of any size."""
        clean, label = self.get_data_and_label(batch)
        draw, total = Noise(0, [0], clean.shape[1:], clean), 0.0
        for i in range(EVAL_NOISE_LEVELS):
            time = torch.full((len(clean),), (2 * i + 1) * self.process.steps // (2 * EVAL_NOISE_LEVELS), device=clean.device)
            total = total + self.compute_errors(clean, draw().expand_as(clean), time, label)
        return {"loss": total / EVAL_NOISE_LEVELS}

    def get_data_and_label(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:  # -> B ..., B or B T int64
        clean = batch[self.data]
        none = torch.zeros(len(clean), dtype=torch.int64, device=clean.device)
        return clean, batch.get("label", none)

    def compute_errors(self, clean: Tensor, noise: Tensor, time: Tensor, label: Tensor) -> Tensor:  # -> B
        output = self.model(self.process.add_noise(clean, noise, time), time.float(), label)
        error = (output.to(clean.dtype) - self.process.compute_target(clean, noise, time)) ** 2
        return self.weighting(self.process, time) * error.flatten(1).mean(1)

    def sample(self, label: Tensor, shape: Sequence[int], sampler: Sampler | None = None, **options) -> Tensor:
        """See `sample`; by default DDIM in 50 steps."""
        return sample(self.model, self.process, sampler or DDIM(), label, shape, **options)

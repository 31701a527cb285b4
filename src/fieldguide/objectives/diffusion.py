"""Diffusion models: noise process, loss weightings, samplers and the training objective (Ho et al. 2020, arXiv:2006.11239).

The three parts around a network are independent of each other (Karras et al. 2022, arXiv:2206.00364, table 1): the
`Process` adds noise to data, a weighting weights the loss per noise level, a sampler reverses the process.
Shapes: B batch, ... any further axes: C H W of images, F C H W of videos. T steps of the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.base import Objective
from fieldguide.objectives.noise import Noise

EVAL_NOISE_LEVELS = 4  # noise levels at which the evaluation loss is computed


# ------------------------------------------------------------------------------------------------ the process


def linear_betas(steps: int) -> np.ndarray:  # -> T
    """Return linear betas, 1e-4 to 0.02 in 1000 steps (section 4), rescaled for fewer steps (code of arXiv:2102.09672)."""
    return np.minimum(np.linspace(1e-4, 0.02, steps) * 1000 / steps, 0.999)


def cosine_betas(steps: int) -> np.ndarray:  # -> T
    """Return betas of the cosine schedule (Nichol and Dhariwal 2021, arXiv:2102.09672, equation 17)."""
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {"linear": linear_betas, "cosine": cosine_betas}
PREDICTION_TYPES = ("eps", "v")


class Process(nn.Module):
    """Noise process x_t = signal_t x_0 + noise_t eps for t = 0 .. T-1 (equation 4), and the prediction target.

    Args:
        schedule: "linear" or "cosine".
        steps: number of steps T.
        predicts: "eps" to predict the noise, or "v" to predict signal eps - noise x_0 (Salimans and Ho 2022,
            arXiv:2202.00512, appendix D), which stays well-posed at very low signal.

    Attributes:
        alpha_bar: signal_t squared (alpha-bar in the paper), in float64.

    Raises:
        SettingsError: if `schedule` or `predicts` is unknown, or `steps` is below 1.
    """

    signal: Tensor  # T
    noise: Tensor  # T

    def __init__(self, schedule: str = "cosine", steps: int = 1000, predicts: str = "eps"):
        super().__init__()
        if schedule not in SCHEDULES or predicts not in PREDICTION_TYPES or steps < 1:
            raise SettingsError(
                f"invalid diffusion process schedule={schedule!r}, steps={steps}, predicts={predicts!r}: schedule must be "
                f"{' or '.join(SCHEDULES)}, predicts {' or '.join(PREDICTION_TYPES)}, and steps at least 1"
            )
        self.steps, self.predicts = steps, predicts
        alpha_bar = np.cumprod(1 - SCHEDULES[schedule](steps))
        self.alpha_bar: list[float] = alpha_bar.tolist()
        self.register_buffer("signal", torch.tensor(np.sqrt(alpha_bar), dtype=torch.float32), persistent=False)
        self.register_buffer("noise", torch.tensor(np.sqrt(1 - alpha_bar), dtype=torch.float32), persistent=False)

    def get_rates(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:  # B int64 -> twice B 1 ...
        """Return the factors of signal and noise, shaped to broadcast over `like`."""
        shape = (-1, *[1] * (like.ndim - 1))
        return self.signal[time].view(shape), self.noise[time].view(shape)

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:  # B ..., B ..., B int64 -> B ...
        """Return the noisy data x_t."""
        signal, share = self.get_rates(time, clean)
        return signal * clean + share * noise

    def compute_target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:  # B ..., B ..., B int64 -> B ...
        """Return the training target of the network: eps or v."""
        if self.predicts == "eps":
            return noise
        signal, share = self.get_rates(time, clean)
        return signal * noise - share * clean

    def predict_clean(self, x: Tensor, output: Tensor, time: int) -> Tensor:  # B ..., B ... -> B ...
        """Return the prediction of x_0 from the network's output; all examples are at the same time."""
        signal, share = math.sqrt(self.alpha_bar[time]), math.sqrt(1 - self.alpha_bar[time])
        return (x - share * output) / signal if self.predicts == "eps" else signal * x - share * output

    def compute_snr(self, time: Tensor) -> Tensor:  # B int64 -> B
        """Return the signal-to-noise ratio, squared."""
        return (self.signal[time] / self.noise[time]) ** 2


# ------------------------------------------------------------------------------------------------ the weighting


class Uniform:
    """Equal weight for every noise level (equation 14 of the paper, for eps)."""

    def __call__(self, process: Process, time: Tensor) -> Tensor:  # B int64 -> B
        return torch.ones_like(process.signal[time])


@dataclass(frozen=True)
class MinSNR:
    """Weight min(SNR, gamma) on the squared error of x_0 (Hang et al. 2023, arXiv:2303.09556, section 3.4).

    The weight is converted to the network's prediction: the squared error of x_0 is that of eps divided by the SNR, or
    that of v divided by SNR + 1.
    """

    gamma: float = 5.0

    def __call__(self, process: Process, time: Tensor) -> Tensor:  # B int64 -> B
        ratio = process.compute_snr(time)
        return ratio.clamp(max=self.gamma) / (ratio if process.predicts == "eps" else ratio + 1)


# ------------------------------------------------------------------------------------------------ the samplers


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Base class of samplers that turn noise into data in `steps` steps.

    The predicted x_0 is clamped to -clip .. clip; 0 disables this.
    """

    steps: int = 50
    clip: float = 1.0

    def get_timesteps(self, process: Process) -> list[int]:
        """Return evenly spaced times in descending order, starting at the last time, which is closest to pure noise (Lin et
        al. 2023, arXiv:2305.08891, section 3.3). Raises `SettingsError` if the process has fewer steps."""
        if not 1 <= self.steps <= process.steps:
            raise SettingsError(
                f"cannot sample in {self.steps} steps: choose 1 to {process.steps}, the steps of the noise process"
            )
        return [round(i * process.steps / self.steps) - 1 for i in range(self.steps, 0, -1)]

    def predict_clean(self, process: Process, x: Tensor, output: Tensor, time: int) -> Tensor:  # B ..., B ... -> B ...
        """Return the clamped prediction of x_0."""
        clean = process.predict_clean(x, output, time)
        return clean.clamp(-self.clip, self.clip) if self.clip else clean

    def step(
        self, process: Process, x: Tensor, output: Tensor, time: int, before: int, draw: Callable[[], Tensor]
    ) -> Tensor:  # B ..., B ... -> B ...
        """Return x at time `before`, given x at `time`. `before` is -1 for data; `draw` returns new noise."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DDPM(Sampler):
    """Ancestral sampling over any subset of the times (algorithm 2 of the paper).

    The added noise has the variance of the posterior (`variance="small"`, equation 7) or of the forward step ("large").
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
    """DDIM sampling, which needs few steps (Song et al. 2021, arXiv:2010.02502, equations 12 and 16).

    `eta=0` is deterministic given the initial noise; `eta=1` equals `DDPM` with small variance. The noise is recomputed
    from the clamped x_0, so that the two remain consistent with x.
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
    """Return the output with classifier-free guidance: unconditional + guidance * (conditional - unconditional).

    1 is the conditional output, 0 the unconditional one, more than 1 strengthens the condition (Ho and Salimans 2022,
    arXiv:2207.12598, equation 6 with w = guidance - 1). Both outputs are computed in one batch.
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
    """Sample one example per label: B x shape.

    Args:
        label: B int64, or B T tokens of captions; 0 = unconditional.
        shape: shape of an example.
        seed: seed of the noise.
        numbers: a number per example, 0, 1, ... by default. The noise of an example depends only on the seed and its
            number, so the result does not depend on the batch size.
        guidance: scale of classifier-free guidance.
        callback: called with the number of completed steps.
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
    """Mean squared error of the network's prediction for noisy data. The network takes (B ..., B float time, B int64 label).

    `data` names the batch tensor of clean examples, in -1 .. 1: images or videos. The batch may hold `label`, 1 and up,
    or B T tokens of captions. In training each label is replaced by 0, "no condition", with probability `drop`, so that
    the network learns the conditional and the unconditional output that guidance needs (arXiv:2207.12598, algorithm 1).
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
        """Return the loss of each example at fixed times and noise, so that it does not depend on the batch size."""
        clean, label = self.get_data_and_label(batch)
        draw, errors = Noise(0, [0], clean.shape[1:], clean), []
        for i in range(EVAL_NOISE_LEVELS):
            time = torch.full((len(clean),), (2 * i + 1) * self.process.steps // (2 * EVAL_NOISE_LEVELS), device=clean.device)
            errors.append(self.compute_errors(clean, draw().expand_as(clean), time, label))
        return {"loss": sum(errors[1:], errors[0]) / EVAL_NOISE_LEVELS}

    def get_data_and_label(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:  # -> B ..., B or B T int64
        """Return the clean examples and their labels (0 if the batch has none)."""
        clean = batch[self.data]
        none = torch.zeros(len(clean), dtype=torch.int64, device=clean.device)
        return clean, batch.get("label", none)

    def compute_errors(self, clean: Tensor, noise: Tensor, time: Tensor, label: Tensor) -> Tensor:  # -> B
        """Return the weighted squared error of each example."""
        output = self.model(self.process.add_noise(clean, noise, time), time.float(), label)
        error = (output.to(clean.dtype) - self.process.compute_target(clean, noise, time)) ** 2
        return self.weighting(self.process, time) * error.flatten(1).mean(1)

    def sample(self, label: Tensor, shape: Sequence[int], sampler: Sampler | None = None, **options: Any) -> Tensor:
        """Sample examples as the function `sample` does; the default sampler is DDIM with 50 steps."""
        return sample(self.model, self.process, sampler or DDIM(), label, shape, **options)

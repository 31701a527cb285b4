"""Noise processes x = signal x_0 + noise eps: discrete diffusion, EDM, and rectified flow.

A process says how much signal and noise each time has, what the network receives, and what it predicts. All prediction types are
linear in x_0 and eps, a x_0 + b eps, so that one formula recovers x_0 from any of them, and the samplers need not know which it is.
Shapes: B batch, ... any further axes: C H W of images, F C H W of videos. T times of a discrete process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.diffusion.noise_schedules import SCHEDULES, rescale_to_zero_snr

if TYPE_CHECKING:
    from fieldguide.objectives.diffusion.spacing import Spacing
    from fieldguide.objectives.diffusion.time_sampling import TimeDistribution


@dataclass(frozen=True)
class Level:
    """A noise level: x = signal x_0 + noise eps, and the time that the network is given.

    The values are numbers while sampling. In training they are tensors: `signal` and `noise` B 1 ..., `time` B.
    """

    signal: Any
    noise: Any
    time: Any

    @property
    def sigma(self) -> float:
        """The ratio of noise to signal; infinite without signal."""
        return self.noise / self.signal if self.signal else math.inf


# Factors (a, b) of x_0 and eps in what a network predicts, from the factors of signal and noise.
PREDICTION_TYPES: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "eps": lambda signal, noise: (0.0, 1.0),
    "x": lambda signal, noise: (1.0, 0.0),
    "v": lambda signal, noise: (-noise, signal),  # Salimans and Ho 2022, arXiv:2202.00512, appendix D
    "velocity": lambda signal, noise: (-1.0, 1.0),  # Liu et al. 2023, arXiv:2209.03003, equation 1, from data to noise
}


class NoiseProcess(nn.Module):
    """Base class of noise processes.

    Args:
        predicts: what the network predicts: "eps" (the noise), "x" (the data), "v" (signal eps - noise x_0) or "velocity"
            (eps - x_0).

    Raises:
        SettingsError: if `predicts` is unknown.
    """

    prediction_types: tuple[str, ...] = tuple(PREDICTION_TYPES)
    bounded = True  # whether Heun's method works in x / (signal + noise), which stays finite without signal; else in x / signal

    def __init__(self, predicts: str):
        super().__init__()
        if predicts not in self.prediction_types:
            raise SettingsError(
                f"invalid prediction type predicts={predicts!r}: a network predicts {', '.join(self.prediction_types[:-1])} or "
                f"{self.prediction_types[-1]}"
            )
        self.predicts = predicts

    # Noise levels

    def get_level(self, time: Tensor, ndim: int) -> Level:  # B -> B 1 ..., B 1 ..., B
        """Return the noise levels of training times, shaped to broadcast over data of `ndim` axes."""
        raise NotImplementedError

    def level_at_sigma(self, sigma: float) -> Level:
        """Return the level at a ratio of noise to signal."""
        raise NotImplementedError

    def time_at(self, fraction: Tensor) -> Tensor:  # B in 0 .. 1 -> B
        """Return training times: 0 is the least noise and 1 the most."""
        raise NotImplementedError

    def draw_times(self, count: int, device: torch.device) -> Tensor:  # -> B
        """Draw training times, all equally likely."""
        return self.time_at(torch.rand(count, device=device))

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The lowest and the highest ratio of noise to signal."""
        raise NotImplementedError

    @property
    def least_sigma(self) -> float:
        """The ratio of noise to signal at which consistency models return their input."""
        return self.sigma_range[0]

    def space_times(self, count: int) -> Tensor:  # -> N
        """Return ascending training times from `least_sigma` to the most noise, which divide it evenly for consistency models."""
        return self.time_at(torch.linspace(0, 1, count))

    @property
    def default_spacing(self) -> Spacing:
        """The noise levels at which samplers call the network, if they do not choose."""
        raise NotImplementedError

    @property
    def default_times(self) -> TimeDistribution:
        """The distribution of training times, if the objective does not choose."""
        from fieldguide.objectives.diffusion.time_sampling import UniformTimes

        return UniformTimes()

    def get_prior_scale(self, level: Level) -> float:
        """Return the standard deviation of the noise at which sampling starts."""
        return 1.0

    # What the network receives and predicts

    def get_input_scale(self, level: Level) -> Any:
        """Return the factor of the network's input (c_in of EDM)."""
        return 1.0

    def get_target_factors(self, level: Level) -> tuple[Any, Any]:
        """Return the factors of x_0 and eps in what the network predicts."""
        return PREDICTION_TYPES[self.predicts](level.signal, level.noise)

    def get_error_scale(self, level: Level) -> Any:
        """Return the error of the output that belongs to an error of x_0 of 1, given x."""
        a, b = self.get_target_factors(level)
        return abs(level.signal * b - level.noise * a) / level.noise

    def add_noise(self, clean: Tensor, noise: Tensor, level: Level) -> Tensor:  # B ..., B ... -> B ...
        """Return the noisy data x."""
        return level.signal * clean + level.noise * noise

    def compute_target(self, clean: Tensor, noise: Tensor, level: Level) -> Tensor:  # B ..., B ... -> B ...
        """Return the training target of the network."""
        a, b = self.get_target_factors(level)
        return a * clean + b * noise

    def predict_clean(self, x: Tensor, output: Tensor, level: Level) -> Tensor:  # B ..., B ... -> B ...
        """Return the prediction of x_0: the solution of x = signal x_0 + noise eps and output = a x_0 + b eps."""
        a, b = self.get_target_factors(level)
        return (b * x - level.noise * output) / (level.signal * b - level.noise * a)


class DiscreteProcess(NoiseProcess):
    """Diffusion in T steps (Ho et al. 2020, arXiv:2006.11239, equation 4). Signal squared plus noise squared is 1.

    Args:
        schedule: "linear", "cosine" or "scaled-linear".
        steps: number of steps T.
        predicts: see `NoiseProcess`.
        betas: the variance that each step adds, instead of those of `schedule`.
        terminal: rescale the signal so that its square at the last time is this: 0 for no signal (Lin et al. 2023, arXiv:2305.08891).

    Attributes:
        alpha_bar: signal_t squared (alpha-bar in the paper), in float64.

    Raises:
        SettingsError: if `schedule` or `predicts` is unknown, or `steps` is below 1.
    """

    signal: Tensor  # T
    noise: Tensor  # T

    def __init__(
        self,
        schedule: str = "cosine",
        steps: int = 1000,
        predicts: str = "eps",
        *,
        betas: Sequence[float] | np.ndarray | None = None,
        terminal: float | None = None,
    ):
        super().__init__(predicts)
        if (betas is None and schedule not in SCHEDULES) or steps < 1:
            raise SettingsError(
                f"invalid diffusion process schedule={schedule!r}, steps={steps}: schedule must be {', '.join(SCHEDULES)}, and "
                "steps at least 1"
            )
        alpha_bar = np.cumprod(1 - (SCHEDULES[schedule](steps) if betas is None else np.asarray(betas, dtype=np.float64)))
        if terminal is not None:
            alpha_bar = rescale_to_zero_snr(alpha_bar)
            alpha_bar[-1] = terminal
        if predicts == "eps" and alpha_bar[-1] == 0:
            raise SettingsError(
                "predicts='eps' cannot be used without signal at the last time: x_0 does not follow from the noise."
            )
        self.steps = len(alpha_bar)
        self.alpha_bar: list[float] = alpha_bar.tolist()
        with np.errstate(divide="ignore"):
            self.sigmas = np.sqrt((1 - alpha_bar) / alpha_bar)  # T
        self.register_buffer("signal", torch.tensor(np.sqrt(alpha_bar), dtype=torch.float32), persistent=False)
        self.register_buffer("noise", torch.tensor(np.sqrt(1 - alpha_bar), dtype=torch.float32), persistent=False)

    def get_level(self, time: Tensor, ndim: int) -> Level:  # B int64 -> B 1 ..., B 1 ..., B
        shape = (-1, *[1] * (ndim - 1))
        return Level(self.signal[time].view(shape), self.noise[time].view(shape), time.float())

    def level_at(self, time: float) -> Level:
        """Return the level of a time 0 .. T-1; between two times, the ratio of noise to signal is interpolated."""
        if time == int(time):
            left = self.alpha_bar[int(time)]
            return Level(math.sqrt(left), math.sqrt(1 - left), float(time))
        sigma = float(np.interp(time, np.arange(self.steps), self.sigmas))
        return Level((1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5, time)

    def level_at_sigma(self, sigma: float) -> Level:
        """Return the level at a ratio of noise to signal. The time is interpolated in its logarithm, and ends at 0 and T-1."""
        time = float(np.interp(math.log(sigma), np.log(self.sigmas), np.arange(self.steps)))
        return Level((1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5, time)

    def time_at(self, fraction: Tensor) -> Tensor:  # B -> B int64
        return (fraction * self.steps).long().clamp(0, self.steps - 1)

    def draw_times(self, count: int, device: torch.device) -> Tensor:  # -> B int64
        return torch.randint(self.steps, (count,), device=device)

    @property
    def sigma_range(self) -> tuple[float, float]:
        return float(self.sigmas[0]), float(self.sigmas[-1])

    def space_times(self, count: int) -> Tensor:  # -> N int64
        return torch.linspace(0, self.steps - 1, count, dtype=torch.float64).round().long()

    @property
    def default_spacing(self) -> Spacing:
        from fieldguide.objectives.diffusion.spacing import Timesteps

        return Timesteps()


class EDMProcess(NoiseProcess):
    """Noise of any standard deviation sigma is added to the data, whose own is `sigma_data` (Karras et al. 2022, arXiv:2206.00364).

    The network's input and target are scaled to variance 1 ("preconditioning", equation 7 and table 1): it receives c_in x and
    c_noise = log(sigma) / 4, and x_0 = c_skip x + c_out output. The time of training is sigma.

    Args:
        sigma_min, sigma_max: the range of sampling.
        sigma_data: standard deviation of the data.
        predicts: "edm" for the paper's output; "v" is its negative, as in files of diffusers. Others as for `NoiseProcess`.
    """

    prediction_types = ("edm", *PREDICTION_TYPES)
    bounded = False

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5, predicts: str = "edm"):
        super().__init__(predicts)
        if not 0 < sigma_min < sigma_max < math.inf or sigma_data <= 0:
            raise SettingsError(
                f"invalid EDM process sigma_min={sigma_min}, sigma_max={sigma_max}, sigma_data={sigma_data}: all must be above 0, and "
                "sigma_min below sigma_max"
            )
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data

    def get_level(self, time: Tensor, ndim: int) -> Level:  # B -> B 1 ..., B 1 ..., B
        noise = time.view(-1, *[1] * (ndim - 1))
        return Level(torch.ones_like(noise), noise, time.log() / 4)

    def level_at_sigma(self, sigma: float) -> Level:
        return Level(1.0, sigma, math.log(sigma) / 4)

    def time_at(self, fraction: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** fraction

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def space_times(self, count: int) -> Tensor:  # -> N; Karras et al., equation 5
        from fieldguide.objectives.diffusion.spacing import space_sigmas

        return torch.tensor(space_sigmas("karras", self.sigma_min, self.sigma_max, count)[::-1])

    @property
    def default_spacing(self) -> Spacing:
        from fieldguide.objectives.diffusion.spacing import SigmaSpacing

        return SigmaSpacing()

    @property
    def default_times(self) -> TimeDistribution:
        from fieldguide.objectives.diffusion.time_sampling import LogNormalNoise

        return LogNormalNoise()

    def get_prior_scale(self, level: Level) -> float:
        return level.noise

    def get_input_scale(self, level: Level) -> Any:
        return (level.noise**2 + self.sigma_data**2) ** -0.5

    def get_target_factors(self, level: Level) -> tuple[Any, Any]:
        if self.predicts not in ("edm", "v"):
            return super().get_target_factors(level)
        sign = 1 if self.predicts == "edm" else -1
        scale = sign * (level.noise**2 + self.sigma_data**2) ** -0.5
        return scale * level.noise / self.sigma_data, -scale * self.sigma_data


class FlowProcess(NoiseProcess):
    """Rectified flow: x = (1 - t) x_0 + t eps for t from 0 to 1 (Liu et al. 2023, arXiv:2209.03003; arXiv:2403.03206, equation 13).

    Args:
        predicts: see `NoiseProcess`; "eps" is not possible, since sampling starts without signal.
        time_scale: the network receives `time_scale` t.
    """

    prediction_types = ("velocity", "v", "x")

    def __init__(self, predicts: str = "velocity", time_scale: float = 1000.0):
        super().__init__(predicts)
        self.time_scale = time_scale

    def get_level(self, time: Tensor, ndim: int) -> Level:  # B -> B 1 ..., B 1 ..., B
        noise = time.view(-1, *[1] * (ndim - 1))
        return Level(1 - noise, noise, time * self.time_scale)

    def level_at(self, time: float) -> Level:
        """Return the level of a time 0 .. 1."""
        return Level(1 - time, time, time * self.time_scale)

    def level_at_sigma(self, sigma: float) -> Level:
        return self.level_at(sigma / (1 + sigma))

    def time_at(self, fraction: Tensor) -> Tensor:
        return fraction

    @property
    def sigma_range(self) -> tuple[float, float]:
        return 0.0, math.inf

    @property
    def least_sigma(self) -> float:
        return 1 / (self.time_scale - 1)  # at the first of `time_scale` times

    def space_times(self, count: int) -> Tensor:  # -> N
        return torch.linspace(1 / self.time_scale, 1, count)

    @property
    def default_spacing(self) -> Spacing:
        from fieldguide.objectives.diffusion.spacing import FlowTimes

        return FlowTimes()

    @property
    def default_times(self) -> TimeDistribution:
        from fieldguide.objectives.diffusion.time_sampling import LogitNormalTimes

        return LogitNormalTimes()


PROCESSES = (*SCHEDULES, "edm", "flow")


def build_process(schedule: str, predicts: str | None = None) -> NoiseProcess:
    """Return a process by name: a schedule of discrete diffusion, "edm" or "flow". By default, the network of a flow predicts the
    velocity, others v. Raises `SettingsError` for unknown names, and for a prediction type that the process does not have."""
    if schedule not in PROCESSES:
        raise SettingsError(f"schedule={schedule!r} is unknown. Choose one of {', '.join(PROCESSES)}.")
    if schedule == "flow":
        return FlowProcess(predicts or "velocity")
    return EDMProcess(predicts=predicts or "v") if schedule == "edm" else DiscreteProcess(schedule, predicts=predicts or "v")

"""Boundary conditions of consistency models: how the prediction of x_0 becomes a function that is the identity at the least noise.

A consistency function is f(x, t) = c_skip x + c_out D(x, t), with D the x_0 that follows from the network's output. Writing it with D
instead of the output makes it the same for every prediction type, and a network that was trained to denoise almost is one already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.diffusion.noise_process import DiscreteProcess, EDMProcess, Level, NoiseProcess

SIGMA_DATA = 0.5  # standard deviation of data, for processes that do not say it


class Boundary(Protocol):
    """A choice of the factors c_skip and c_out."""

    def get_lowest(self, process: NoiseProcess) -> float:
        """Return the ratio of noise to signal that is left in f(x, t)."""

    def get_factors(self, process: NoiseProcess, level: Level) -> tuple[Any, Any]:
        """Return c_skip and c_out, the factors of x and of the prediction of x_0."""


@dataclass(frozen=True)
class SigmaBoundary:
    """The factors of Song et al. 2023 (arXiv:2303.01469, appendix C), for any process:

        f = sigma_data^2 / ((sigma - low)^2 + sigma_data^2) y + sigma_data (sigma - low) / sqrt(sigma^2 + sigma_data^2) F

    with y = x / signal, sigma = noise / signal, low the least sigma, and F = (D - c y) sqrt(sigma^2 + sigma_data^2) / (sigma sigma_data)
    for c = sigma_data^2 / (sigma^2 + sigma_data^2), the output of a network of EDM. Solved for x and D, nothing is divided by the signal,
    which may be 0.
    """

    sigma_data: float | None = None  # by default that of the process, or 0.5

    def get_lowest(self, process: NoiseProcess) -> float:
        return process.least_sigma

    def get_factors(self, process: NoiseProcess, level: Level) -> tuple[Any, Any]:
        deviation = self.sigma_data or (process.sigma_data if isinstance(process, EDMProcess) else SIGMA_DATA)
        variance = (deviation * level.signal) ** 2
        removed = level.noise - process.least_sigma * level.signal
        out = removed / level.noise
        shifted = deviation**2 * level.signal / (removed**2 + variance)
        return shifted - out * deviation**2 * level.signal / (level.noise**2 + variance), out


@dataclass(frozen=True)
class TimeBoundary:
    """The factors of latent consistency models (Luo et al. 2023, arXiv:2310.04378, section 4.1, and code), from the time t of a discrete
    process: sigma_data^2 / ((scale t)^2 + sigma_data^2) and scale t / sqrt((scale t)^2 + sigma_data^2)."""

    scale: float = 10.0
    sigma_data: float = 0.5

    def get_lowest(self, process: NoiseProcess) -> float:
        return 0.0

    def get_factors(self, process: NoiseProcess, level: Level) -> tuple[Any, Any]:
        if not isinstance(process, DiscreteProcess):
            raise SettingsError(
                f"this boundary condition is of discrete noise processes: {type(process).__name__} has other times. Use SigmaBoundary."
            )
        time = level.time * self.scale
        if hasattr(time, "view") and hasattr(level.noise, "ndim"):  # in training, B times for noise of B 1 ...
            time = time.view(-1, *[1] * (level.noise.ndim - 1))
        total = time**2 + self.sigma_data**2
        return self.sigma_data**2 / total, time / total**0.5


@dataclass(frozen=True)
class DirectBoundary:
    """The prediction of x_0 alone, for models that generate in a few steps and are not consistency models."""

    def get_lowest(self, process: NoiseProcess) -> float:
        return 0.0

    def get_factors(self, process: NoiseProcess, level: Level) -> tuple[Any, Any]:
        return 0.0, 1.0

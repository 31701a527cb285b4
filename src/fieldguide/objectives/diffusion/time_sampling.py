"""Distributions of the noise levels at which a network is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

import torch
from torch import Tensor

from fieldguide.objectives.diffusion.noise_process import NoiseProcess


class TimeDistribution(Protocol):
    """A distribution of training times of a process."""

    def draw(self, process: NoiseProcess, count: int, device: torch.device) -> Tensor:  # -> B
        """Draw times."""

    def get_quantile(self, process: NoiseProcess, fraction: float) -> Tensor:  # -> 1
        """Return the time below which a fraction of the distribution lies."""


@dataclass(frozen=True)
class UniformTimes:
    """All times are equally likely (Ho et al. 2020, arXiv:2006.11239, algorithm 1)."""

    def draw(self, process: NoiseProcess, count: int, device: torch.device) -> Tensor:  # -> B
        return process.draw_times(count, device)

    def get_quantile(self, process: NoiseProcess, fraction: float) -> Tensor:  # -> 1
        return process.time_at(torch.tensor([fraction]))


@dataclass(frozen=True)
class LogNormalNoise:
    """The logarithm of the noise's standard deviation is normal (Karras et al. 2022, arXiv:2206.00364, table 1); for EDM only."""

    mean: float = -1.2
    deviation: float = 1.2

    def draw(self, process: NoiseProcess, count: int, device: torch.device) -> Tensor:  # -> B
        return (self.mean + self.deviation * torch.randn(count, device=device)).exp()

    def get_quantile(self, process: NoiseProcess, fraction: float) -> Tensor:  # -> 1
        return torch.tensor([math.exp(NormalDist(self.mean, self.deviation).inv_cdf(fraction))])


@dataclass(frozen=True)
class LogitNormalTimes:
    """The logit of the time is normal, so that times in the middle are the most frequent (Esser et al. 2024, arXiv:2403.03206,
    equation 19). `shift` above 1 moves the times towards noise, for larger images (equation 23)."""

    mean: float = 0.0
    deviation: float = 1.0
    shift: float = 1.0

    def draw(self, process: NoiseProcess, count: int, device: torch.device) -> Tensor:  # -> B
        return self.convert(process, self.mean + self.deviation * torch.randn(count, device=device))

    def get_quantile(self, process: NoiseProcess, fraction: float) -> Tensor:  # -> 1
        return self.convert(process, torch.tensor([NormalDist(self.mean, self.deviation).inv_cdf(fraction)]))

    def convert(self, process: NoiseProcess, logit: Tensor) -> Tensor:
        """Return the times of these logits: a shift of the time by a factor s adds log s to its logit."""
        return process.time_at(torch.sigmoid(logit + math.log(self.shift)))

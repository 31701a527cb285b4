"""Weights of the noise levels in the loss. A weighting that is defined for the error of x_0 or of eps is converted to the network's
output, so that it means the same for every prediction type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fieldguide.objectives.diffusion.noise_process import Level, NoiseProcess

Weighting = Callable[[NoiseProcess, Level], Tensor]  # levels B 1 ... -> B 1 ...


@dataclass(frozen=True)
class Uniform:
    """Equal weight for every error of the output (Ho et al. 2020, arXiv:2006.11239, equation 14, for eps). For EDM's output, this is
    the weighting of the paper: 1 / c_out squared on the error of x_0 (arXiv:2206.00364, table 1)."""

    def __call__(self, process: NoiseProcess, level: Level) -> Tensor:
        return torch.ones_like(level.noise)


@dataclass(frozen=True)
class MinSNR:
    """Weight min(SNR, gamma) on the squared error of x_0 (Hang et al. 2023, arXiv:2303.09556, section 3.4)."""

    gamma: float = 5.0

    def __call__(self, process: NoiseProcess, level: Level) -> Tensor:
        ratio = (level.signal / level.noise) ** 2
        return ratio.clamp(max=self.gamma) / process.get_error_scale(level) ** 2


@dataclass(frozen=True)
class SigmoidSNR:
    """Weight sigmoid(bias - log SNR) on the squared error of eps (Hoogeboom et al. 2024, arXiv:2410.19324)."""

    bias: float = 0.0

    def __call__(self, process: NoiseProcess, level: Level) -> Tensor:
        ratio = (level.signal / level.noise) ** 2  # an error of x_0 of 1 is one of eps of its root
        return ratio / (1 + ratio * torch.e**-self.bias) / process.get_error_scale(level) ** 2


WEIGHTINGS: dict[str, Callable[[], Weighting]] = {"uniform": Uniform, "min-snr": MinSNR, "sigmoid": SigmoidSNR}

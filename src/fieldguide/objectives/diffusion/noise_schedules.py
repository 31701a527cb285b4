"""Noise schedules of discrete diffusion processes: the variance beta_t that step t adds, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np


def linear_betas(steps: int, first: float = 1e-4, last: float = 0.02) -> np.ndarray:  # -> T
    """Return linear betas, 1e-4 to 0.02 in 1000 steps (Ho et al. 2020, arXiv:2006.11239, section 4), rescaled for fewer steps (code
    of arXiv:2102.09672)."""
    return np.minimum(np.linspace(first, last, steps) * 1000 / steps, 0.999)


def scaled_linear_betas(steps: int, first: float = 0.00085, last: float = 0.012) -> np.ndarray:  # -> T
    """Return betas whose square roots are linear, as in Stable Diffusion (Rombach et al. 2022, arXiv:2112.10752, code)."""
    return np.minimum(np.linspace(first**0.5, last**0.5, steps) ** 2 * 1000 / steps, 0.999)


def cosine_betas(steps: int) -> np.ndarray:  # -> T
    """Return betas of the cosine schedule (Nichol and Dhariwal 2021, arXiv:2102.09672, equation 17)."""
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def rescale_to_zero_snr(alpha_bar: np.ndarray) -> np.ndarray:  # T -> T
    """Shift and scale the signal so that none is left at the last time (Lin et al. 2023, arXiv:2305.08891, algorithm 1)."""
    root = np.sqrt(alpha_bar)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def shift_snr(betas: np.ndarray | Sequence[float], scale: float) -> np.ndarray:  # T -> T
    """Return the betas for which the ratio of the variances of signal and noise is `scale` times smaller at all times (Yang et al.
    2024, arXiv:2408.06072, code)."""
    alpha_bar = np.cumprod(1 - np.asarray(betas, dtype=np.float64))
    alpha_bar = alpha_bar / (scale + (1 - scale) * alpha_bar)
    return 1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])


SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {
    "linear": linear_betas,
    "cosine": cosine_betas,
    "scaled-linear": scaled_linear_betas,
}

"""Low-pass filters by the window method (Kaiser 1974), for alias-free networks (Karras et al. 2021, arXiv:2106.12423).

A windowed filter has a chosen cutoff and width of its transition; how much it lets through beyond follows from the number of taps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BESSEL_ANGLES = 256  # samples of a period; the mean is then exact to rounding


def compute_kaiser_beta(taps: int, width: float, rate: float) -> float:
    """Return the shape of a Kaiser window whose filter has this width of the transition, at a sampling rate."""
    attenuation = 2.285 * (taps - 1) * math.pi * width / (rate / 2) + 7.95  # in decibels
    if attenuation > 50:
        return 0.1102 * (attenuation - 8.7)
    if attenuation > 21:
        return 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    return 0.0


def build_kaiser_window(taps: int, beta: float) -> Tensor:  # -> T
    """Return a Kaiser window of `taps` samples in float64."""
    place = torch.linspace(-1, 1, taps, dtype=torch.float64) if taps > 1 else torch.zeros(1, dtype=torch.float64)
    full = torch.special.i0(torch.tensor(beta, dtype=torch.float64))
    return torch.special.i0(beta * (1 - place.square()).clamp(min=0).sqrt()) / full


def compute_bessel(x: Tensor) -> Tensor:
    """Return the Bessel function J1 for arguments below 80: the mean of cos(t - x sin t) over a period.

    `torch.special.bessel_j1` is off by up to 3e-9.
    """
    angle = torch.arange(BESSEL_ANGLES, dtype=torch.float64) * (2 * math.pi / BESSEL_ANGLES)
    return torch.cos(angle - x[..., None] * angle.sin()).mean(-1)


def design_lowpass(taps: int, cutoff: float, width: float, rate: float, *, radial: bool = False) -> Tensor:  # -> T or T T
    """Return a filter that keeps frequencies below `cutoff`, with the sum 1, in float64.

    Args:
        taps: number of taps, along each axis if `radial`; it must be even then.
        cutoff: where the filter lets half of the amplitude through, in the unit of `rate`.
        width: width of the transition around the cutoff.
        rate: sampling rate.
        radial: the same in all directions (a jinc function in two dimensions) instead of along an axis (a sinc function).
    """
    window = build_kaiser_window(taps, compute_kaiser_beta(taps, width, rate))
    place = (torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2) / rate
    if radial:
        distance = math.pi * torch.hypot(place[:, None], place)
        response = compute_bessel(2 * cutoff * distance) / distance * window[:, None] * window
    else:
        response = torch.sinc(2 * cutoff * place) * window
    return response / response.sum()

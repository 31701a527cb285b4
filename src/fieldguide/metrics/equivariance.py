"""Equivariance of image generators to translation and rotation of their input (Karras et al. 2021, arXiv:2106.12423, section 2).

If a generator treats images as continuous signals, moving its input moves its images. EQ-T and EQ-R compare the images of moved
inputs with moved images, in decibels: 10 log10 of the squared range of values over the mean squared difference (equation 3). More is
better; 30 dB are differences of 3 % of the range.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.special
import torch
import torch.nn.functional as F
from torch import Tensor

VALUE_RANGE = 2.0  # images in -1 .. 1
REACH = 6  # pixels to each side of a place that interpolation reads
WINDOW_BETA = 8.0  # of the Kaiser window of interpolation
ROTATION_TAPS, ROTATION_CUTOFF, ROTATION_BETA = 16, 0.35, 4.0  # low-pass filter of EQ-R; the cutoff in cycles per pixel


def measure_translation(images: Tensor, moved: Tensor, shifts: Tensor, value_range: float = VALUE_RANGE) -> float:
    """Return EQ-T in decibels.

    Args:
        images: N C H W, of the input as it is.
        moved: N C H W, of the moved input.
        shifts: N 2, how far the input was moved to the right and down, in pixels; fractions are allowed.
        value_range: largest minus smallest possible value of a pixel.
    """
    height, width = images.shape[2:]
    rows = torch.arange(height, dtype=torch.float64)[None, :, None] - shifts[:, 1, None, None].double()
    columns = torch.arange(width, dtype=torch.float64)[None, None] - shifts[:, 0, None, None].double()
    return compare(*interpolate(images, *torch.broadcast_tensors(rows, columns)), moved, value_range)


def measure_rotation(images: Tensor, turned: Tensor, angles: Tensor, value_range: float = VALUE_RANGE) -> float:
    """Return EQ-R in decibels, of what is below `ROTATION_CUTOFF`: the corners of the spectrum of a square image turn away.

    The authors filter images with the rotated filter instead, so that their numbers differ somewhat.

    Args:
        images: N C H W, of the input as it is.
        turned: N C H W, of the input turned around its center.
        angles: N, how far it was turned, in radians, from the x axis to the y axis, which points down.
        value_range: largest minus smallest possible value of a pixel.
    """
    images, turned = smooth(images), smooth(turned)
    height, width = images.shape[2:]
    down = torch.arange(height, dtype=torch.float64)[None, :, None] - (height - 1) / 2
    right = torch.arange(width, dtype=torch.float64)[None, None] - (width - 1) / 2
    cosine, sine = (f(angles.double())[:, None, None] for f in (torch.cos, torch.sin))
    rows = -sine * right + cosine * down + (height - 1) / 2  # where a pixel came from: turned back
    columns = cosine * right + sine * down + (width - 1) / 2
    return compare(*interpolate(images, rows, columns), turned, value_range)


def compare(expected: Tensor, valid: Tensor, found: Tensor, value_range: float) -> float:  # N C H W, N H W, N C H W
    """Return the peak signal-to-noise ratio over the valid pixels. Raises `ValueError` if there are none."""
    weights = valid[:, None].expand_as(expected)
    if not weights.any():
        raise ValueError("no pixel is inside of both images: use larger images, or smaller movements")
    error = float((expected - found.double()).square()[weights].mean())
    return math.inf if error == 0 else 10 * math.log10(value_range**2 / error)


def interpolate(images: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:  # N C H W, N H W, N H W
    """Return values between pixels by a windowed sinc function, N C H W in float64, and which of them need no pixel outside."""
    height, width = images.shape[2:]
    top, left = rows.floor(), columns.floor()
    inside = (top >= REACH - 1) & (top <= height - 1 - REACH) & (left >= REACH - 1) & (left <= width - 1 - REACH)
    flat, result = images.double().flatten(2), torch.zeros(images.shape, dtype=torch.float64)
    across = [sinc_weight(columns - left - j) for j in range(1 - REACH, REACH + 1)]
    for i in range(1 - REACH, REACH + 1):
        along = sinc_weight(rows - top - i)
        row = (top.long() + i).clamp(0, height - 1)
        for j, weight in zip(range(1 - REACH, REACH + 1), across):
            index = row * width + (left.long() + j).clamp(0, width - 1)
            values = flat.gather(2, index.flatten(1)[:, None].expand(-1, images.shape[1], -1)).reshape(images.shape)
            result += values * (along * weight)[:, None]
    return result, inside


def sinc_weight(distance: Tensor) -> Tensor:
    """Return sinc times a Kaiser window of `REACH` pixels to each side."""
    inner = (1 - (distance / REACH).square()).clamp(min=0).sqrt()
    window = torch.special.i0(WINDOW_BETA * inner) / torch.special.i0(torch.tensor(WINDOW_BETA, dtype=distance.dtype))
    return torch.sinc(distance) * window


def smooth(images: Tensor) -> Tensor:  # N C H W -> N C H-15 W-15
    """Remove high frequencies, alike in all directions; the borders are lost."""
    place = np.arange(ROTATION_TAPS) - (ROTATION_TAPS - 1) / 2
    distance = math.pi * np.hypot(place[:, None], place)
    window = np.kaiser(ROTATION_TAPS, ROTATION_BETA)
    kernel = scipy.special.j1(2 * ROTATION_CUTOFF * distance) / distance * np.outer(window, window)
    weight = torch.from_numpy(kernel / kernel.sum()).expand(images.shape[1], 1, -1, -1)
    return F.conv2d(images.double(), weight, groups=images.shape[1])

"""Scaling of rotary frequencies for sequences that are longer than those of the first training.

All functions take and return inverse frequencies in radians per token, one for each pair of dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def scale_llama3(speed: Tensor, factor: float, low: float, high: float, original: float) -> Tensor:  # d/2 -> d/2
    """Return the frequencies of Llama 3.1 (arXiv:2407.21783): those with fewer than `low` rotations within the `original` length
    are divided by `factor`, those with more than `high` are kept, and those between are interpolated.
    """
    rotations = original * speed / (2 * math.pi)
    keep = ((rotations - low) / (high - low)).clamp(0, 1)
    return speed * (keep + (1 - keep) / factor)


def scale_yarn(
    speed: Tensor, theta: float, factor: float, fast: float, slow: float, original: float, truncate: bool = True
) -> Tensor:  # d/2 -> d/2
    """Return the frequencies of YaRN (Peng et al. 2023, arXiv:2309.00071, section 3.2): those with more than `fast` rotations
    within the `original` length are kept, those with fewer than `slow` are divided by `factor`, and those between are
    interpolated linearly in their index. `truncate` rounds the first and the last index between, as the authors do.
    """
    half = len(speed)

    def find_index(rotations: float) -> float:
        """Return the index of the pair of dimensions with this number of rotations."""
        return half * math.log(original / (rotations * 2 * math.pi)) / math.log(theta)

    first, last = find_index(fast), find_index(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    index = torch.arange(half, device=speed.device, dtype=torch.float32)
    divided = ((index - first) / (last - first if last != first else 0.001)).clamp(0, 1)
    return speed / factor * divided + speed * (1 - divided)


def get_yarn_factor(factor: float, weight: float = 1.0) -> float:
    """Return by how much attention is sharpened for sequences that are `factor` times longer (section 3.4 of the YaRN paper).

    Queries and keys are multiplied by it, so scores by its square. `weight` is called mscale in configurations.
    """
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def scale_longrope(speed: Tensor, divisors: Sequence[float]) -> Tensor:  # d/2 -> d/2
    """Return the frequencies of LongRoPE (Ding et al. 2024, arXiv:2402.13753): each has a divisor of its own, found by search."""
    return 1.0 / (torch.tensor(divisors, device=speed.device) / speed)


def get_longrope_factor(factor: float, original: int) -> float:
    """Return the factor of queries and keys of LongRoPE for sequences that are `factor` times longer than `original`."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0

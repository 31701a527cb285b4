"""Fixed sines and cosines of diffusion Transformers: positions of patches, and times (Vaswani et al. 2017, arXiv:1706.03762)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_PERIOD = 10_000  # of the sinusoids, in positions or time steps


def sinusoidal_embedding(places: Tensor, dim: int) -> Tensor:  # ... -> ... dim
    """Return sines, then cosines of positions at `dim // 2` frequencies."""
    rate = torch.exp(torch.arange(dim // 2, dtype=torch.float64) * (-2 * math.log(MAX_PERIOD) / dim))
    angle = places.double()[..., None] * rate
    return torch.cat([angle.sin(), angle.cos()], -1).float()


def position_embedding(
    rows: int, columns: int, dim: int, base: int = 0, interpolation: float = 1.0
) -> Tensor:  # -> rows*columns dim
    """Return the embedding of a grid of positions: the column in the first half, the row in the second.

    Both run from 0 to `base` / `interpolation`, however many there are; by default, neighbors have a distance of 1.
    """
    row, column = (torch.arange(n, dtype=torch.float32) / (n / (base or n)) / interpolation for n in (rows, columns))
    row, column = torch.meshgrid(row, column, indexing="ij")
    return torch.cat([sinusoidal_embedding(column.flatten(), dim // 2), sinusoidal_embedding(row.flatten(), dim // 2)], 1)


def embed_time(time: Tensor, dim: int) -> Tensor:  # B -> B dim
    """Return cosines, then sines of times at `dim // 2` frequencies, computed in float32 as in training."""
    half = dim // 2
    rate = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=time.device) / half)
    angle = time.float()[:, None] * rate
    return torch.cat([angle.cos(), angle.sin()], 1)

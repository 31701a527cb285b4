"""Rotary positions of diffusion Transformers: pairs of values of queries and keys rotate by frame, row and column."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fieldguide.models.diffusion._shared.embeddings import MAX_PERIOD

Rotate = Callable[[Tensor], Tensor]


def make_rotation(places: Tensor, dims: Sequence[int], like: Tensor, base: float = MAX_PERIOD, halves: bool = False) -> Rotate:
    """Return a function that rotates queries or keys, B heads N d, by their places, N A: the first `dims[0]` / 2 pairs of values of each
    head by the first coordinate, and so on. Pairs are neighbors; with `halves`, the first half of a head is paired with the second.

    Angles are computed in float64, their cosines and sines have the precision of float32.
    """
    rates = [base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim) for dim in dims]
    angle = torch.cat([place[:, None] * rate for place, rate in zip(places.double().unbind(1), rates)], 1)  # N d/2
    cos, sin = (wave.float().to(like) for wave in (angle.cos(), angle.sin()))

    is_complex = not halves and cos.dtype in (torch.float32, torch.float64)
    wave = torch.complex(cos, sin) if is_complex else cos

    def rotate(x: Tensor) -> Tensor:  # B heads N d -> B heads N d
        if is_complex and x.dtype == cos.dtype:  # one operation instead of six
            return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * wave).flatten(-2)
        a, b = x.chunk(2, -1) if halves else x.unflatten(-1, (-1, 2)).unbind(-1)
        if halves:
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    return rotate


def place_grid(*sizes: int) -> Tensor:  # -> N A
    """Return the coordinates of all places of a grid, the last axis fastest."""
    return torch.stack(torch.meshgrid(*map(torch.arange, sizes), indexing="ij"), -1).flatten(0, -2)

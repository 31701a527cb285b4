"""Rotary positions: a query and a key are turned by angles that grow with their places (Su et al. 2021, arXiv:2104.09864).

What they say to each other then depends on their distance alone. The two halves of a head make the pairs that turn, as in
GPT-NeoX and most networks since; RoFormer itself pairs neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor


def angles(steps: int, dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:  # -> T d, T d
    """Cosines and sines for places 0, 1, 2, ... and heads of width d: wavelengths from 2 pi to 2 pi `base`, in float32.
    The sines of the first half have the sign that the rotation gives them."""
    speed = 1.0 / base ** (torch.arange(0, dim, 2, device=like.device, dtype=torch.float32) / dim)
    angle = torch.outer(torch.arange(steps, device=like.device, dtype=torch.float32), speed)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).to(like.dtype), torch.cat([-sin, sin], -1).to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # ... T d, T d, T d -> ... T d
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([second, first], -1), sin)

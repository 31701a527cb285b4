"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864).

Queries and keys are rotated by angles proportional to their positions, so attention scores depend on relative
positions only. Dimension i is paired with i + d/2, as in GPT-NeoX and LLaMA; RoFormer pairs adjacent dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cos_sin_table(steps: int, dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:  # -> T d, T d
    """Return cosines and sines for positions 0 to steps - 1 and heads of width d, with wavelengths from 2 pi to 2 pi
    `base`.

    Computed in float32, returned in the dtype of `like`. The sines of the first half are negated, as `rotate`
    expects.
    """
    speed = 1.0 / base ** (torch.arange(0, dim, 2, device=like.device, dtype=torch.float32) / dim)
    angle = torch.outer(torch.arange(steps, device=like.device, dtype=torch.float32), speed)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).to(like.dtype), torch.cat([-sin, sin], -1).to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # ... T d, T r, T r -> ... T d
    """Rotate queries or keys by the given angles: their first r dimensions, if there are fewer angles than dimensions."""
    if (r := cos.shape[-1]) < x.shape[-1]:
        return torch.cat([rotate(x[..., :r], cos, sin), x[..., r:]], -1)
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([second, first], -1), sin)

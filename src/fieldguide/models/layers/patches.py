"""Pictures as rows of patches, and places learnt for one size of picture spread over another.

Dosovitskiy et al. 2020 (arXiv:2010.11929), section 3.1, and the end of 3.2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Patches(nn.Conv2d):
    """Each patch of `side` pixels a vector. Sides that patches do not fill grow by black on the right and below."""

    def __init__(self, channels: int, dim: int, side: int):
        super().__init__(channels, dim, side, side)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B D h w
        side = self.stride[0]
        down, right = -x.shape[2] % side, -x.shape[3] % side
        return super().forward(F.pad(x, (0, right, 0, down)) if down or right else x)


def interpolate_pos_embed(
    places: Tensor, size: tuple[int, int], *, first: int = 1, antialias: bool = True, offset: float = 0.0
) -> Tensor:  # first + S S, D -> first + h w, D
    """The places of a square grid, for a grid of another `size` (rows, columns): bicubic, in no less than float32.

    The `first` places are of tokens that are no patches, and stay. With an `offset`, the grid is stretched by
    (side + offset) / S in place of side / S, as DINOv2 was trained (github.com/facebookresearch/dino, issue 8).
    """
    side = math.isqrt(len(places) - first)
    if size == (side, side):
        return places
    grid = places[first:].to(torch.promote_types(places.dtype, torch.float32)).mT.unflatten(1, (side, side))[None]
    how = {"size": size} if not offset else {"scale_factor": tuple((new + offset) / side for new in size)}
    grid = F.interpolate(grid, mode="bicubic", antialias=antialias, **how)
    return torch.cat([places[:first], grid[0].flatten(1).mT.to(places.dtype)])


def patch_for(image: int) -> int | None:
    """A side of patches, a power of two from 2 up, that leaves a small picture at least 7 rows of them where it has 14 pixels;
    None for pictures that need no such care."""
    return 2 ** max(int(math.log2(image / 7)), 1) if image < 128 else None

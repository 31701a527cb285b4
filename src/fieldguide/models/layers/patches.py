"""Patch embedding and interpolation of position embeddings.

Dosovitskiy et al. 2020 (arXiv:2010.11929), section 3.1 and the end of section 3.2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Patches(nn.Conv2d):
    """A patch embedding with patches of `side` pixels. Images are zero-padded at the right and bottom to a multiple of
    `side`.
    """

    def __init__(self, channels: int, dim: int, side: int):
        super().__init__(channels, dim, side, side)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B D h w
        side = self.stride[0]
        down, right = -x.shape[2] % side, -x.shape[3] % side
        return super().forward(F.pad(x, (0, right, 0, down)) if down or right else x)


def interpolate_pos_embed(
    places: Tensor, size: tuple[int, int], *, first: int = 1, antialias: bool = True, offset: float = 0.0
) -> Tensor:  # first + S S, D -> first + h w, D
    """Interpolate the position embeddings of a square grid to a grid of another `size` (rows, columns): bicubic, in at
    least float32.

    The `first` embeddings belong to prefix tokens (such as the class token) and are unchanged. With an `offset`, the
    scale factor is (side + offset) / S instead of side / S, as in the training of DINOv2
    (github.com/facebookresearch/dino, issue 8).
    """
    side = math.isqrt(len(places) - first)
    if size == (side, side):
        return places
    grid = places[first:].to(torch.promote_types(places.dtype, torch.float32)).mT.unflatten(1, (side, side))[None]
    target = {"size": size} if not offset else {"scale_factor": tuple((new + offset) / side for new in size)}
    grid = F.interpolate(grid, mode="bicubic", antialias=antialias, **target)
    return torch.cat([places[:first], grid[0].flatten(1).mT.to(places.dtype)])


def choose_patch_size(image: int) -> int | None:
    """Return a patch size for small images: a power of two, at least 2, that gives at least 7 patches per side for
    images of 14 pixels or more.

    Return None for images of 128 pixels or more, which need no other patch size.
    """
    return 2 ** max(int(math.log2(image / 7)), 1) if image < 128 else None

"""Masks of objects as coverage: how much of each cell of a grid an object covers, from 0 to 1.

Masks are stored cut to their box, and placed on grids of other sizes by one scale and shift for each axis, exactly: a cell's coverage
is the area of the object in it, divided by the area of the cell.

Shapes: h w height and width of a stored mask, H W those of a grid, M objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fieldguide.data.media.masks import object_mask


def cover_axis(scale: float, shift: float, pixels: int, cells: int) -> Tensor:  # -> cells pixels
    """Return which part of each cell every pixel covers, where pixel edge x of the mask lies at `scale` x + `shift` on the grid.

    A negative scale mirrors.
    """
    edges = (torch.arange(cells + 1, dtype=torch.float32) - shift) / scale  # of the cells, in pixels
    low, high = torch.minimum(edges[:-1], edges[1:])[:, None], torch.maximum(edges[:-1], edges[1:])[:, None]
    first = torch.arange(pixels, dtype=torch.float32)
    return (torch.minimum(high, first + 1) - torch.maximum(low, first)).clamp(min=0) * abs(scale)


def place_mask(mask: Tensor, scale: tuple[float, float], shift: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """Return the coverage H W of a grid of `size` (height, width) by a mask h w; `scale` and `shift` are those of x and y."""
    down = cover_axis(scale[1], shift[1], mask.shape[0], size[0])
    across = cover_axis(scale[0], shift[0], mask.shape[1], size[1])
    return down @ mask.to(down.dtype) @ across.mT


@dataclass(frozen=True)
class Crop:
    """The pixels of an object within its bounding box, as coverage from 0 to 255 of pixels of the square input."""

    pixels: Tensor  # h w uint8
    left: int
    top: int


class ObjectMasks:
    """The masks of the objects of several images in square inputs, cut out when they are used first.

    Args:
        objects: returns the objects of an image (structs with `outline` and `runs`).
        sizes: width and height of each image.
        scale, corner: the letterbox of each image, N 2.
        side: of the square, in pixels.
        max_bytes: of memory for masks that are kept.
    """

    def __init__(
        self,
        objects: Callable[[int], Sequence[Mapping[str, Any]]],
        sizes: Sequence[tuple[int, int]],
        scale: Tensor,
        corner: Tensor,
        side: int,
        max_bytes: float,
    ):
        self.objects, self.sizes, self.scale, self.corner, self.side = objects, sizes, scale, corner, side
        self.kept: dict[int, list[Crop]] = {}
        self.free_bytes = max_bytes

    def cut(self, image: int) -> list[Crop]:
        """Return the masks of the objects of an image."""
        if image in self.kept:
            return self.kept[image]
        (width, height), found = self.sizes[image], []
        for one in self.objects(image):
            mask = object_mask(one, height, width)
            rows, columns = (np.flatnonzero(mask.any(axis)) if mask is not None else np.zeros(0) for axis in (1, 0))
            if mask is None or not len(rows):
                found.append(Crop(torch.zeros(1, 1, dtype=torch.uint8), 0, 0))
                continue
            first, last = (np.array([places[i] for places in (columns, rows)], dtype=np.float64) for i in (0, -1))
            inner = torch.from_numpy(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
            scale, shift = self.scale[image].double().numpy(), self.corner[image].double().numpy()
            low, high = np.floor(first * scale + shift + 1e-4), np.ceil((last + 1) * scale + shift - 1e-4)
            left, top = (int(v) for v in low)
            wide, high_ = (max(1, int(v)) for v in high - low)
            moved = first * scale + shift - low
            covered = place_mask(inner, tuple(scale.tolist()), tuple(moved.tolist()), (high_, wide))
            found.append(Crop((covered * 255).round().clamp(0, 255).to(torch.uint8), left, top))
        used = sum(crop.pixels.numel() for crop in found)
        if used < self.free_bytes:
            self.kept[image] = found
            self.free_bytes -= used
        return found

    def place(self, image: int, item: int, corners: Tensor, stride: int) -> Tensor:  # 4 -> S/stride S/stride
        """Return the coverage of cells of `stride` pixels by an object of an image whose square was moved.

        `corners` are x and y of its top left and its bottom right corner after augmentation.
        """
        crop, cells = self.cut(image)[item], self.side // stride
        x0, y0, x1, y1 = (v / stride for v in corners.tolist())
        scale = ((x1 - x0) / self.side, (y1 - y0) / self.side)
        shift = (x0 + scale[0] * crop.left, y0 + scale[1] * crop.top)
        return place_mask(crop.pixels, scale, shift, (cells, cells)) / 255

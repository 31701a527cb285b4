"""Object masks: object shapes as closed polygons or run lengths, and segmentation masks rasterized from them.

Pixel (column i, row j) is the square from (i, j) to (i + 1, j + 1), as in COCO and YOLO. A pixel belongs to a polygon
if its center does, so polygons that share a side neither overlap nor leave a gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.packed_masks import decode_run_lengths, encode_run_lengths
from fieldguide.data.media.boxes import SIDES

__all__ = ["LazyMask", "decode_run_lengths", "encode_run_lengths", "fill_polygon", "object_mask"]

NO_CLASS = -1  # value of pixels that belong to no class


def fill_polygon(polygon: Sequence[float], height: int, width: int) -> np.ndarray:  # x1 y1 x2 y2 ... -> H W bool
    """Rasterize a polygon with the even-odd rule at pixel centers."""
    out = np.zeros((height, width), dtype=bool)
    start = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    end = np.roll(start, -1, 0)
    top, bottom = (int(np.clip(v, 0, height)) for v in (np.floor(start[:, 1].min()), np.ceil(start[:, 1].max())))
    middle = np.arange(top, bottom)[:, None] + 0.5
    row, side = np.nonzero((start[:, 1] <= middle) != (end[:, 1] <= middle))  # sides that cross the center of a row
    (x, y), (far_x, far_y) = start[side].T, end[side].T
    across = x + (middle[row, 0] - y) * (far_x - x) / (far_y - y)
    crossed = np.zeros((bottom - top, width + 1), dtype=np.int32)
    np.add.at(crossed, (row, np.clip(np.ceil(across - 0.5), 0, width).astype(np.int64)), 1)
    out[top:bottom] = crossed.cumsum(1)[:, :width] % 2 == 1
    return out


def object_mask(instance: Mapping[str, Any], height: int, width: int) -> np.ndarray | None:  # -> H W bool
    """Return the mask of an object with all its parts, or None if it only has a box."""
    if instance["runs"]:
        inside = np.arange(len(instance["runs"])) % 2 == 1
        return np.repeat(inside, instance["runs"]).reshape(width, height).T
    if not instance["outline"]:
        return None
    whole = fill_polygon(instance["outline"][0], height, width)
    for part in instance["outline"][1:]:
        whole |= fill_polygon(part, height, width)
    return whole


@dataclass(frozen=True)
class LazyMask:
    """A segmentation mask that is rasterized on demand from the objects in one row of a boxes column.

    `values` maps labels to pixel values. Pixels of other labels, of crowds, and of boxes without an outline are
    `NONE`. Crowds and boxes are drawn first, so that other objects overwrite them; then large objects before small ones.
    """

    column: pl.Series
    row: int
    width: int
    height: int
    values: Mapping[str, int]

    def rasterize(self) -> np.ndarray:  # -> H W int32
        """Rasterize the mask. Pixels without an object are 0."""
        out = np.zeros((self.height, self.width), dtype=np.int32)
        objects = self.column[self.row]
        shapes: list[tuple[np.ndarray, int]] = []
        for instance in objects.to_list() if objects is not None else ():
            known = object_mask(instance, self.height, self.width)
            if known is None:
                left, top, right, bottom = (instance[side] for side in SIDES)
                out[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = NO_CLASS
            elif instance["crowd"]:
                out[known] = NO_CLASS
            else:
                shapes.append((known, self.values.get(instance["label"], NO_CLASS)))
        for known, value in sorted(shapes, key=lambda s: -int(s[0].sum())):
            out[known] = value
        return out

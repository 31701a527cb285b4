"""Outlines: the shapes of objects, as closed polygons or run lengths, and masks drawn of them.

A point lies in the plane whose pixel (column i, row j) is the square from (i, j) to (i + 1, j + 1), as COCO and YOLO have
it. A pixel belongs to a polygon where its middle does, so neighbours that share a side neither overlap nor leave a gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from fieldguide.data.media.boxes import SIDES

NONE = -1  # pixels of a drawing that belong to no class


def filled(polygon: Sequence[float], height: int, width: int) -> np.ndarray:  # x1 y1 x2 y2 ... -> H W bool
    """The pixels whose middle a polygon has around it an odd number of times."""
    out = np.zeros((height, width), dtype=bool)
    start = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    end = np.roll(start, -1, 0)
    top, bottom = (int(np.clip(v, 0, height)) for v in (np.floor(start[:, 1].min()), np.ceil(start[:, 1].max())))
    middle = np.arange(top, bottom)[:, None] + 0.5
    row, side = np.nonzero((start[:, 1] <= middle) != (end[:, 1] <= middle))  # where a side crosses the middle of a row
    (x, y), (far_x, far_y) = start[side].T, end[side].T
    across = x + (middle[row, 0] - y) * (far_x - x) / (far_y - y)
    crossed = np.zeros((bottom - top, width + 1), dtype=np.int32)
    np.add.at(crossed, (row, np.clip(np.ceil(across - 0.5), 0, width).astype(np.int64)), 1)
    out[top:bottom] = crossed.cumsum(1)[:, :width] % 2 == 1
    return out


def run_lengths(counts: Any) -> list[int] | None:
    """COCO's lengths of runs outside and inside by turns, column by column; None for what is none.

    Packed into text each is the difference to the last but one (from the fourth on), in digits of base 32 with the lowest
    first and the sign in the last, written as the characters from "0" on; 32 is added to a digit that another follows.
    """
    if isinstance(counts, str):
        code = np.frombuffer(counts.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64) - 48
        if not len(code) or code.min() < 0 or code.max() > 63 or code[-1] & 32:
            return None
        last = np.flatnonzero(code & 32 == 0)
        first = np.r_[0, last[:-1] + 1]
        place = np.arange(len(code)) - np.repeat(first, last - first + 1)
        if place.max() > 7:  # no picture has runs of so many pixels
            return None
        numbers = np.add.reduceat((code & 31) << 5 * place, first)
        numbers -= np.where(code[last] & 16, 1 << 5 * (last - first + 1), 0)
        for begin in (1, 2):
            numbers[begin::2] = numbers[begin::2].cumsum()
    elif isinstance(counts, list) and counts and all(isinstance(n, int) and not isinstance(n, bool) for n in counts):
        numbers = np.array(counts, dtype=object)
    else:
        return None
    return [int(n) for n in numbers] if (numbers >= 0).all() and numbers.sum() < 2**31 else None


def shape(thing: Mapping[str, Any], height: int, width: int) -> np.ndarray | None:  # -> H W bool
    """The pixels of an object, of all its parts; None where it has a box alone."""
    if thing["runs"]:
        inside = np.arange(len(thing["runs"])) % 2 == 1
        return np.repeat(inside, thing["runs"]).reshape(width, height).T
    if not thing["outline"]:
        return None
    whole = filled(thing["outline"][0], height, width)
    for part in thing["outline"][1:]:
        whole |= filled(part, height, width)
    return whole


@dataclass(frozen=True)
class Drawing:
    """A mask that is drawn when it is asked for: the objects of one row of a column of boxes.

    `values` says what to write for each label; the pixels of other labels, of crowds, and of boxes without an outline are
    `NONE`. Crowds and bare boxes lie below, for what else is known of their pixels; then large objects below small ones.
    """

    column: pl.Series
    row: int
    width: int
    height: int
    values: Mapping[str, int]

    def codes(self) -> np.ndarray:  # -> H W int32; 0 where no object is
        out = np.zeros((self.height, self.width), dtype=np.int32)
        objects = self.column[self.row]
        shapes: list[tuple[np.ndarray, int]] = []
        for thing in objects.to_list() if objects is not None else ():
            known = shape(thing, self.height, self.width)
            if known is None:
                left, top, right, bottom = (thing[side] for side in SIDES)
                out[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = NONE
            elif thing["crowd"]:
                out[known] = NONE
            else:
                shapes.append((known, self.values.get(thing["label"], NONE)))
        for known, value in sorted(shapes, key=lambda s: -int(s[0].sum())):
            out[known] = value
        return out

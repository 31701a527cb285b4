"""Tiles: large images in overlapping parts, which are blended linearly, so that memory does not depend on their size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 0.25  # fraction of a tile that its neighbor shares


def map_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, factor: float) -> Tensor:  # B C H W -> B C' H' W'
    """Return a function of an image, computed for tiles of `tile` x `tile` positions; its outputs are `factor` times as large.

    What the function computes from the whole image (norms of groups, attention) is computed for each tile, so results differ
    slightly from those without tiles.
    """
    step, blended = int(tile * (1 - OVERLAP)), int(round(tile * factor) * OVERLAP)
    kept = round(tile * factor) - blended
    above: list[Tensor] = []
    rows = []
    for top in range(0, x.shape[2], step):
        row: list[Tensor] = []
        for i, left in enumerate(range(0, x.shape[3], step)):
            part = function(x[:, :, top : top + tile, left : left + tile])
            part = blend(above[i], part, blended, 2) if above else part
            row.append(blend(row[-1], part, blended, 3) if row else part)
        rows.append(torch.cat([part[:, :, :kept, :kept] for part in row], 3))
        above = row
    return torch.cat(rows, 2)


def blend(before: Tensor, after: Tensor, extent: int, axis: int) -> Tensor:
    """Return `after`, whose first `extent` positions of an axis pass over from the last ones of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    share = (torch.arange(extent, device=after.device, dtype=after.dtype) / extent).view(-1, *[1] * (after.ndim - 1 - axis))
    last, first = before.narrow(axis, before.shape[axis] - extent, extent), after.narrow(axis, 0, extent)
    mixed = last * (1 - share) + first * share
    return torch.cat([mixed, after.narrow(axis, extent, after.shape[axis] - extent)], axis)

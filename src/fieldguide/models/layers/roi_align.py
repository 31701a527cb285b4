"""RoIAlign: features of boxes from a pyramid of feature maps, in plain torch (He et al. 2017, arXiv:1703.06870, section 3).

The version of torchvision's detectors (`aligned=False`): coordinates are not shifted by half a pixel, and a box is at least one
position of the map wide and high. Each box is read from one level of the pyramid (Lin et al. 2016, arXiv:1612.03144, eq. 1).

Shapes: B batch, C channels, P boxes of an image, S cells per side of a box, s points per side of a cell, H W height and width of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CANONICAL_SIDE, CANONICAL_LEVEL = 224, 4  # pixels of a box that is read from the level of stride 2^4


def choose_levels(boxes: Tensor, canonical: float, first: int, last: int) -> Tensor:  # ... 4 -> ... int64
    """Return the level (log2 of the stride) of each box by its area, from `first` to `last`.

    A box with sides of `canonical` pixels belongs to level 4, one of half the side to level 3.
    """
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    level = (CANONICAL_LEVEL + torch.log2((width * height).sqrt() / canonical) + 1e-6).floor()
    return level.clamp(first, last).long()


def roi_align(
    maps: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, which: Tensor, size: int = 7, samples: int = 2
) -> Tensor:
    """Return the mean features of S x S cells of each box, each of s x s points with bilinear interpolation.

    Each cell is a weighted sum of the four neighbors of its points, so that one `embedding_bag` over the positions of all maps reads
    the boxes of all levels, all channels of a position at once. Points are clamped to the map of their level. No gradient flows to the
    boxes, which must lie within the image.

    Args:
        maps: feature maps of the levels, finest first, each B C H W.
        strides: pixels per position of each map.
        boxes: (left, top, right, bottom) in pixels, B P 4.
        which: index of the map for each box, B P.
        size: S.
        samples: points per side of a cell, s.

    Returns:
        B P C S S.
    """
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    table = torch.cat([x.to(dtype).flatten(2) for x in maps], 2).transpose(1, 2)  # B N C
    heights, widths = [x.shape[-2] for x in maps], [x.shape[-1] for x in maps]
    first = [sum(h * w for h, w in zip(heights[:level], widths)) for level in range(len(maps))]  # row of each map in the table
    per_box = lambda values: torch.tensor(values, device=boxes.device)[which][..., None]  # B P 1
    boxes = boxes.detach().to(dtype) / per_box(list(strides))
    start, extent = boxes[..., :2], (boxes[..., 2:] - boxes[..., :2]).clamp(min=1)
    columns, across = find_neighbors(start[..., :1], extent[..., :1], per_box(widths), size, samples)
    rows, down = find_neighbors(start[..., 1:], extent[..., 1:], per_box(heights), size, samples)  # each B P S 2s
    image = torch.arange(table.shape[0], device=boxes.device)[:, None, None] * table.shape[1]
    rows = rows * per_box(widths)[..., None] + (image + per_box(first))[..., None]
    index = rows[:, :, :, None, :, None] + columns[:, :, None, :, None, :]  # B P S S 2s 2s
    weight = down[:, :, :, None, :, None] * across[:, :, None, :, None, :]
    bags = sum_rows(table.flatten(0, 1), index.flatten(4).flatten(0, 3), weight.flatten(4).flatten(0, 3))
    return bags.view(*boxes.shape[:2], size, size, -1).permute(0, 1, 4, 2, 3)


def sum_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:  # N C, M K, M K -> M C
    """Return weighted sums of rows of a table. An exported graph has no operator for that, and reads one row after another."""
    if not torch.compiler.is_exporting():
        return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")
    total = table[index[:, 0]] * weight[:, :1]
    for k in range(1, index.shape[1]):
        total = total + table[index[:, k]] * weight[:, k, None]
    return total


def find_neighbors(start: Tensor, extent: Tensor, length: Tensor, size: int, samples: int) -> tuple[Tensor, Tensor]:
    """Return the positions next to the points of the cells along one side of the boxes, and their weights, B P S 2s.

    Args:
        start: first coordinate of the boxes in positions of their map, B P 1.
        extent: length of the boxes, B P 1.
        length: positions of the map, B P 1.
        size: S.
        samples: s.
    """
    steps = (torch.arange(size * samples, device=start.device, dtype=start.dtype) + 0.5) / (size * samples)
    points = torch.minimum((start + steps * extent).clamp(min=0), length - 1)  # B P Ss
    before = points.floor()
    after = points - before  # weight of the later neighbor
    place = torch.stack([before, torch.minimum(before + 1, length - 1)], -1).long()
    weight = torch.stack([1 - after, after], -1) / samples
    return place.unflatten(2, (size, samples)).flatten(3), weight.unflatten(2, (size, samples)).flatten(3)

"""RoIAlign: features of boxes from a pyramid of feature maps, in plain torch (He et al. 2017, arXiv:1703.06870, section 3).

The version of torchvision's detectors (`aligned=False`): coordinates are not shifted by half a pixel, and a box is at least one
position of the map wide and high. Each box is read from one level of the pyramid (Lin et al. 2016, arXiv:1612.03144, eq. 1).

Shapes: B batch, C channels, P boxes of an image, S cells per side of a box, H W height and width of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CANONICAL_SIDE, CANONICAL_LEVEL = 224, 4  # pixels of a box that is read from the level of stride 2^4
BOXES_PER_CHUNK = 128  # of an image that are sampled at once, which limits the memory


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
    """Return the mean features of S x S cells of each box, each of `samples` x `samples` points with bilinear interpolation.

    All maps are placed one below the other in one map, so that one call of `grid_sample` reads the boxes of all levels. Points
    are clamped to the map of their level. No gradient flows to the boxes, which must lie within the image.

    Args:
        maps: feature maps of the levels, finest first, each B C H W.
        strides: pixels per position of each map.
        boxes: (left, top, right, bottom) in pixels, B P 4.
        which: index of the map for each box, B P.
        size: S.
        samples: points per side of a cell.

    Returns:
        B P C S S.
    """
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    width, height = max(x.shape[-1] for x in maps), sum(x.shape[-2] for x in maps)
    atlas = torch.cat([F.pad(x.to(dtype), (0, width - x.shape[-1])) for x in maps], -2)
    sides = [(x.shape[-2], x.shape[-1]) for x in maps]
    first = [sum(rows for rows, _ in sides[:level]) for level in range(len(sides))]  # row of each map in the atlas
    numbers = lambda values: torch.tensor(values, dtype=dtype, device=boxes.device)[which][..., None]  # B P 1
    boxes = boxes.detach().to(dtype) / numbers(list(strides))
    start, extent = boxes[..., :2], (boxes[..., 2:] - boxes[..., :2]).clamp(min=1)
    steps = (torch.arange(size * samples, device=boxes.device, dtype=dtype) + 0.5) / (size * samples)
    x, y = (start[..., i, None] + steps * extent[..., i, None] for i in (0, 1))  # B P S*samples
    x = torch.minimum(x.clamp(min=0), numbers([columns - 1 for _, columns in sides]))
    y = torch.minimum(y.clamp(min=0), numbers([rows - 1 for rows, _ in sides])) + numbers(first)
    x, y = x / max(width - 1, 1) * 2 - 1, y / max(height - 1, 1) * 2 - 1
    pooled = []
    for some_x, some_y in zip(x.split(BOXES_PER_CHUNK, 1), y.split(BOXES_PER_CHUNK, 1)):
        count, points = some_x.shape[1], size * samples
        grid = torch.stack(
            [some_x[:, :, None].expand(-1, -1, points, -1), some_y[..., None].expand(-1, -1, -1, points)], -1
        )  # B P rows columns 2
        read = F.grid_sample(atlas, grid.flatten(1, 2), "bilinear", "border", align_corners=True)  # B C P*rows columns
        cells = F.avg_pool2d(read, samples)  # B C P*S S
        pooled.append(cells.unflatten(2, (count, size)).transpose(1, 2))
    return torch.cat(pooled, 1)

"""From the mask logits of detections in letterboxed squares to masks of the images.

Shapes: B batch, D detections, h w height and width of mask logits, H W those of an image.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fieldguide.core.packed_masks import encode_mask, pack_masks
from fieldguide.data.preprocessing.detection import Letterbox


def build_grid(
    size: tuple[int, int],
    stride: float,
    scale: tuple[float, float],
    corner: tuple[float, float],
    rows: range,
    columns: range,
    like: Tensor,
) -> Tensor:  # -> 1 rows columns 2
    """Return where the centers of pixels of the image are in a map of `size` cells of `stride` pixels, as `grid_sample` has it.

    `scale` and `corner` are those of the letterbox, for x and y.
    """
    span = lambda one: torch.arange(one.start, one.stop, device=like.device, dtype=like.dtype) + 0.5
    x, y = (
        2 * (span(one) * scale[axis] + corner[axis]) / (stride * size[1 - axis]) - 1 for axis, one in enumerate((columns, rows))
    )
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]


def place_logits(logits: Tensor, grid: Tensor) -> Tensor:  # h w, 1 H W 2 -> H W
    """Return logits at the positions of a grid, interpolated linearly."""
    return F.grid_sample(logits[None, None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0, 0]


def trace_mask(
    logits: Tensor,
    stride: float,
    scale: tuple[float, float],
    corner: tuple[float, float],
    size: tuple[int, int],
    box: tuple[float, ...] | None = None,
) -> np.ndarray:  # h w -> H W bool
    """Return the mask of an image of `size` (height, width), where interpolated logits are above 0, within a box if one is given.

    Only the part around cells above 0 is computed: elsewhere no value can be above 0.
    """
    out = np.zeros(size, dtype=bool)
    there = (logits > 0).nonzero()
    if not len(there):
        return out
    spans = []
    for axis, name in ((0, 1), (1, 0)):  # rows are y, columns are x
        first, last = int(there[:, axis].min()) - 1, int(there[:, axis].max()) + 2
        low, high = ((v * stride - corner[name]) / scale[name] for v in (first, last))
        if box is not None:
            low, high = max(low, box[name] - 0.5), min(high, box[name + 2] - 0.5)
            spans.append(range(max(0, math.ceil(low)), min(size[axis], math.ceil(high))))
        else:
            spans.append(range(max(0, math.floor(low)), min(size[axis], math.ceil(high))))
    rows, columns = spans
    if len(rows) and len(columns):
        cells = (logits.shape[0], logits.shape[1])
        inside = place_logits(logits, build_grid(cells, stride, scale, corner, rows, columns, logits)) > 0
        out[rows.start : rows.stop, columns.start : columns.stop] = inside.cpu().numpy()
    return out


def find_box(mask: np.ndarray) -> tuple[float, float, float, float]:  # H W bool
    """Return left, top, right and bottom of the pixels of a mask; zeros for an empty one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def trace_masks(found: dict[str, Tensor], frame: Letterbox, side: int, cuts_by_box: bool) -> dict[str, Tensor]:
    """Return detections with packed masks of the images (`fieldguide.core.packed_masks`) in place of their mask logits.

    `boxes` are in pixels of the images. They cut the masks, or else they are replaced by those of the masks. Detections without any
    pixel stay: they are wrong, and count as such.
    """
    logits, boxes, labels = found["masks"], found["boxes"].clone(), found["labels"]
    stride, codes, sizes = side / logits.shape[-1], [], []
    for i in range(len(labels)):
        scale, corner = (tuple(values[i].tolist()) for values in (frame.scale, frame.corner))
        width, height = (int(v) for v in frame.size[i].tolist())
        sizes.append((height, width))
        codes.append(list[bytes]())
        for d in range(int((labels[i] >= 0).sum())):
            box = tuple(boxes[i, d].tolist()) if cuts_by_box else None
            mask = trace_mask(logits[i, d].float(), stride, scale, corner, (height, width), box)
            codes[-1].append(encode_mask(mask))
            if not cuts_by_box:
                boxes[i, d] = boxes.new_tensor(find_box(mask))
    packed = pack_masks(codes, sizes, labels.shape[1])
    rest = {name: values for name, values in found.items() if name != "masks"}
    return {**rest, "boxes": boxes, **{name: torch.from_numpy(values) for name, values in packed.items()}}

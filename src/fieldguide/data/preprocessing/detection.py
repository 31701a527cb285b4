"""Object detection: letterboxing of images with boxes.

All functions work on whole batches and are pure functions of their arguments.
Shapes: B batch, C channels, S side of a square image, N boxes per image. Images are uint8 or float 0 to 255, boxes
(left, top, right, bottom) in pixels, float32; labels int64, -1 = padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FILL_COLOR = 255  # padding color; `fieldguide.data.media.images` also pads with white
MIN_VISIBLE_FRACTION = 0.1  # minimum fraction of a box that must remain visible
MIN_BOX_SIDE_PIXELS = 2.0  # minimum width and height of a clipped box in pixels

Boxed = tuple[Tensor, Tensor, Tensor]  # images B C S S, boxes B N 4, labels B N


@dataclass(frozen=True)
class Letterbox:
    """The placement of images with any aspect ratio in squares of S pixels, as `images.load(..., fit="pad")` does it.

    `scale` N 2 (x and y, which differ by rounding to whole pixels), `corner` N 2 (left, top) and `size` N 2 (width,
    height) of the original images, all float32.
    """

    scale: Tensor
    corner: Tensor
    size: Tensor

    @classmethod
    def of(cls, widths: Sequence[int] | np.ndarray, heights: Sequence[int] | np.ndarray, side: int) -> Letterbox:
        """Return the placement of images with these sizes."""
        size = torch.as_tensor(np.stack([widths, heights], -1), dtype=torch.float64)
        inner = (size / size.amax(-1, keepdim=True) * side).round().clamp(min=1)  # half to even, like Pillow
        corner = ((side - inner) / 2).round()
        return cls((inner / size).float(), corner.float(), size.float())

    def to_square(self, boxes: Tensor) -> Tensor:  # N M 4 -> N M 4
        """Convert boxes from image pixels to pixels of the square."""
        return boxes * self.scale.repeat(1, 2)[:, None] + self.corner.repeat(1, 2)[:, None]

    def to_image(self, boxes: Tensor) -> Tensor:  # N M 4 -> N M 4
        """Convert boxes from pixels of the square to image pixels, clipped to the image."""
        boxes = (boxes - self.corner.repeat(1, 2)[:, None]) / self.scale.repeat(1, 2)[:, None]
        return torch.minimum(boxes.clamp(min=0), self.size.repeat(1, 2)[:, None])


def letterbox(image: Tensor, side: int, fill: int = FILL_COLOR) -> tuple[Tensor, Letterbox]:  # C H W -> C S S
    """Scale an in-memory image to fit a square, center it and fill the rest."""
    height, width = image.shape[1:]
    box = Letterbox.of([width], [height], side)
    inner = [max(1, round(float(x))) for x in (box.scale * box.size)[0].flip(0)]
    small = F.interpolate(image[None].float(), inner, mode="bilinear", antialias=True, align_corners=False)[0]
    left, top = (int(x) for x in box.corner[0])
    out = image.new_full((len(image), side, side), fill)
    small = small.round().clamp(0, 255) if not image.is_floating_point() else small
    out[:, top : top + inner[0], left : left + inner[1]] = small.to(image.dtype)
    return out, box


def pad_boxes(boxes: Sequence[np.ndarray], labels: Sequence[np.ndarray], max_boxes: int | None = None) -> tuple[Tensor, Tensor]:
    """Pad the boxes and labels of several images to tensors, B N 4 and B N, with N at least 1."""
    count = max([1, *map(len, labels)]) if max_boxes is None else max_boxes
    out, names = torch.zeros(len(labels), count, 4), torch.full((len(labels), count), -1)
    for i, (some, known) in enumerate(zip(boxes, labels)):
        out[i, : len(known)] = torch.as_tensor(np.asarray(some, dtype=np.float32).reshape(-1, 4))
        names[i, : len(known)] = torch.as_tensor(np.asarray(known, dtype=np.int64))
    return out, names


def clip_boxes(boxes: Tensor, labels: Tensor, side: int) -> tuple[Tensor, Tensor]:  # B N 4, B N -> B N' 4, B N'
    """Clip boxes to the image, drop those that are hardly visible, and remove unneeded padding.

    Further columns than the four sides, such as keypoints, stay with their box.
    """
    seen = torch.cat([boxes[..., :4].clamp(0, side), boxes[..., 4:]], -1)
    size = seen[..., 2:4] - seen[..., :2]
    before = (boxes[..., 2:4] - boxes[..., :2]).clamp(min=0).prod(-1)
    stays = (labels >= 0) & (size.amin(-1) >= MIN_BOX_SIDE_PIXELS) & (size.prod(-1) >= MIN_VISIBLE_FRACTION * before)
    order = stays.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(stays.sum(1).max()))]
    stays = stays.gather(1, order)
    boxes = seen.gather(1, order[..., None].expand(-1, -1, boxes.shape[-1])) * stays[..., None]
    return boxes, torch.where(stays, labels.gather(1, order), -1)

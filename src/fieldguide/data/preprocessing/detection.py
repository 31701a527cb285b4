"""Object detection: letterboxing and augmentation of images with boxes.

All functions work on whole batches and are pure functions of their arguments; randomness comes from the generator passed.
Shapes: B batch, C channels, S side of a square image, N boxes per image. Images are uint8 or float 0 to 255, boxes
(left, top, right, bottom) in pixels, float32; labels int64, -1 = padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Clip boxes to the image, drop those that are hardly visible, and remove unneeded padding."""
    seen = boxes.clamp(0, side)
    size = seen[..., 2:] - seen[..., :2]
    before = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
    stays = (labels >= 0) & (size.amin(-1) >= MIN_BOX_SIDE_PIXELS) & (size.prod(-1) >= MIN_VISIBLE_FRACTION * before)
    order = stays.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(stays.sum(1).max()))]
    stays = stays.gather(1, order)
    boxes = seen.gather(1, order[..., None].expand(-1, -1, 4)) * stays[..., None]
    return boxes, torch.where(stays, labels.gather(1, order), -1)


def flip(images: Tensor, boxes: Tensor, labels: Tensor, which: Tensor) -> Boxed:
    """Mirror the images selected by `which` (B bool) horizontally, with their boxes."""
    left, top, right, bottom = boxes.unbind(-1)
    mirrored = torch.stack([images.shape[-1] - right, top, images.shape[-1] - left, bottom], -1)
    return (
        torch.where(which.view(-1, 1, 1, 1), images.flip(-1), images),
        torch.where(which.view(-1, 1, 1) & (labels >= 0)[..., None], mirrored, boxes),
        labels,
    )


def warp(
    images: Tensor, boxes: Tensor, labels: Tensor, scale: Tensor, shift: Tensor, side: int, fill: int = FILL_COLOR
) -> Boxed:
    """Place images B C H W on squares of S = `side` pixels.

    Each image is scaled about its center by `scale` (B); its center is moved by `shift` (B 2: right, down, in pixels of
    the square) from the center of the square. Returns float images.
    """
    size = torch.tensor([images.shape[-1], images.shape[-2]], dtype=torch.float32)
    middle = side / 2 + shift  # B 2, new position of the image's center
    # The pixel at p of the square samples the image at (p - middle) / scale + size / 2; grid_sample expects -1 to 1.
    at = (torch.arange(side, dtype=torch.float32) + 0.5).expand(2, -1)
    x, y = (((at[k] - middle[:, k, None]) / scale[:, None]) * 2 / size[k] for k in (0, 1))  # B S each
    places = torch.stack([x[:, None].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1)
    out = F.grid_sample(images.float() - fill, places, mode="bilinear", padding_mode="zeros", align_corners=False) + fill
    moved = (boxes - size.repeat(2) / 2) * scale.view(-1, 1, 1) + middle.repeat(1, 2)[:, None]
    return out, *clip_boxes(moved, labels, side)


def mosaic(images: Tensor, boxes: Tensor, labels: Tensor) -> Boxed:
    """Combine four images each, B 4 C S S, into B C 2S 2S (Bochkovskiy et al. 2020, arXiv:2004.10934).

    The order is top left, top right, bottom left, bottom right; boxes B 4 N 4 -> B 4N 4. `warp` then crops the result.
    """
    side = images.shape[-1]
    rows = [torch.cat([images[:, i], images[:, i + 1]], -1) for i in (0, 2)]
    corner = torch.tensor([[0, 0], [side, 0], [0, side], [side, side]], dtype=boxes.dtype).repeat(1, 2)
    return torch.cat(rows, -2), (boxes + corner[:, None]).flatten(1, 2), labels.flatten(1, 2)


def jitter(images: Tensor, hue: Tensor, saturation: Tensor, brightness: Tensor) -> Tensor:  # B C S S -> B C S S
    """Change colors (0 to 255): rotate the hue by the fraction `hue`, then multiply saturation and brightness (B each).

    Hue and saturation are the angle and length in YIQ space, which leaves gray pixels unchanged; gray images only
    change in brightness.
    """
    factor = brightness.view(-1, 1, 1, 1)
    if images.shape[1] != 3:
        return (images.float() * factor).clamp(0, 255)
    yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    angle = 2 * torch.pi * hue
    cos, sin, zero, one = saturation * angle.cos(), saturation * angle.sin(), torch.zeros_like(hue), torch.ones_like(hue)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], -1).view(-1, 3, 3)
    return (torch.einsum("bdc,bchw->bdhw", torch.linalg.inv(yiq) @ turn @ yiq, images.float()) * factor).clamp(0, 255)


@dataclass(frozen=True)
class Augment:
    """Augmentation of training images: fractions of images, and ranges around no change."""

    mosaic: float = 1.0  # fraction of images combined from four
    scale: float = 0.5  # factor from 1 - scale to 1 + scale
    shift: float = 0.1  # fraction of the side, in all directions; half a side for mosaics
    flip: float = 0.5  # fraction mirrored
    hue: float = 0.015  # fraction of the color circle
    saturation: float = 0.5  # factor from 1 - saturation to 1 + saturation
    brightness: float = 0.3  # factor from 1 - brightness to 1 + brightness

    def __call__(
        self, fetch: Callable[[np.ndarray], Boxed], index: np.ndarray, count: int, generator: torch.Generator
    ) -> Boxed:
        """Return the images `index` of `count`, augmented; `fetch(rows)` returns them unchanged, B C S S."""

        def between(span: float, *shape: int) -> Tensor:
            return (2 * torch.rand(*shape, generator=generator) - 1) * span

        # All random numbers are drawn first, so that changing one setting does not change the draws of another.
        rows = len(index)
        others = torch.randint(count, (rows, 3), generator=generator).numpy()
        four, mirrored = (torch.rand(rows, generator=generator) < share for share in (self.mosaic, self.flip))
        scale, shift, middle = 1 + between(self.scale, rows), between(self.shift, rows, 2), between(0.5, rows, 2)
        colors = between(self.hue, rows), 1 + between(self.saturation, rows), 1 + between(self.brightness, rows)

        parts: list[tuple[np.ndarray, Boxed]] = []
        single, several = (~four).nonzero()[:, 0].numpy(), four.nonzero()[:, 0].numpy()
        if len(single):
            images, boxes, labels = fetch(index[single])
            side = images.shape[-1]
            parts.append((single, warp(images, boxes, labels, scale[single], shift[single] * side, side)))
        if len(several):
            chosen = np.concatenate([index[several][:, None], others[several]], 1)
            fetched = [x.unflatten(0, (len(several), 4)) for x in fetch(chosen.ravel())]
            side = fetched[0].shape[-1]
            parts.append((several, warp(*mosaic(*fetched), scale[several], (shift + middle)[several] * side, side)))
        images, boxes, labels = merge_batches(parts)
        images, boxes, labels = flip(images, boxes, labels, mirrored)
        return jitter(images, *colors), boxes, labels


def merge_batches(parts: Sequence[tuple[np.ndarray, Boxed]]) -> Boxed:
    """Concatenate batches with their positions in the whole batch, padded to the largest number of boxes."""
    order = torch.from_numpy(np.argsort(np.concatenate([places for places, _ in parts])))
    most = max(labels.shape[1] for _, (_, _, labels) in parts)
    boxes = [F.pad(b, (0, 0, 0, most - b.shape[1])) for _, (_, b, _) in parts]
    labels = [F.pad(n, (0, most - n.shape[1]), value=-1) for _, (_, _, n) in parts]
    pixels = [p for _, (p, _, _) in parts]
    return torch.cat(pixels)[order], torch.cat(boxes)[order], torch.cat(labels)[order]

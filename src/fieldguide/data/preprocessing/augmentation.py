"""Augmentation of training images, with or without masks and boxes.

    augment_images       images alone: mirroring, shifts, rotation, scaling
    augment_with_masks   images and masks: random square crops, color
    BoxAugmentation      images and boxes: mosaic, scaling, shifts, mirroring, color

All functions work on whole batches and are pure functions of their arguments; randomness comes from the generator passed.
Shapes: B batch, C channels, S side of a square image, N boxes per image. Images are uint8 or float 0 to 255, boxes
(left, top, right, bottom) in pixels, float32; labels int64, -1 = padding. Boxes may have further columns: x and y of keypoints,
NaN for those that are not labeled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fieldguide.data.preprocessing.detection import FILL_COLOR, Boxed, clip_boxes


def mirror(images: Tensor, which: Tensor) -> Tensor:  # B C H W, B bool -> B C H W
    """Mirror the images selected by `which` horizontally."""
    return torch.where(which.view(-1, 1, 1, 1), images.flip(-1), images)


def axis_grid(x: Tensor, y: Tensor) -> Tensor:  # B W, B H -> B H W 2
    """Return the grid for `grid_sample` whose columns sample at `x` and whose rows sample at `y`, both from -1 to 1."""
    return torch.stack([x[:, None].expand(-1, y.shape[1], -1), y[:, :, None].expand(-1, -1, x.shape[1])], -1)


def around_zero(generator: torch.Generator, span: float, *shape: int) -> Tensor:
    """Return uniform random numbers from -span to span."""
    return (2 * torch.rand(*shape, generator=generator) - 1) * span


def augment_images(x: Tensor, how: str, flip: bool, generator: torch.Generator) -> Tensor:  # B C S S -> B C S S
    """Augment a batch. light: shifts by up to an eighth, mirroring. standard: rotation by up to 10 degrees, scaling by
    up to 10 %, and shifts.
    """
    if how == "none":
        return x
    count, side = len(x), x.shape[-1]
    if flip:
        x = mirror(x, torch.rand(count, generator=generator) < 0.5)
    if how == "light":
        far = max(1, side // 8)
        padded = F.pad(x if x.is_floating_point() else x.float(), (far,) * 4, mode="replicate")
        rows = torch.randint(2 * far + 1, (count, 1), generator=generator) + torch.arange(side)
        columns = torch.randint(2 * far + 1, (count, 1), generator=generator) + torch.arange(side)
        picture = torch.arange(count)[:, None, None, None]
        channel = torch.arange(x.shape[1])[None, :, None, None]
        return padded[picture, channel, rows[:, None, :, None], columns[:, None, None, :]].to(x.dtype)
    uniform = lambda span: torch.rand(count, generator=generator) * 2 * span - span
    angle, scale = uniform(10 / 180 * torch.pi), 1 + uniform(0.1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack([torch.stack([cos, -sin, uniform(0.2)], 1), torch.stack([sin, cos, uniform(0.2)], 1)], 1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x.float(), grid, padding_mode="border", align_corners=False)


def augment_with_masks(
    pixels: Tensor, target: Tensor, inner: Tensor, crop: int, augment: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # N C H W, N H W -> N C S S, N S S
    """Return a random square crop of each image: rescaled (0.5 to 2 times), mirrored, with random brightness and
    contrast.
    """
    count, _, height, width = pixels.shape
    uniform = lambda low, high: low + (high - low) * torch.rand(count, generator=generator)
    scale = torch.ones(count) if augment == "none" else 2 ** uniform(-0.5, 0.5) if augment == "light" else 2 ** uniform(-1, 1)
    mirror = torch.ones(count) if augment == "none" else torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    # The square covers crop / scale pixels, and is placed inside the image if possible.
    half = crop / scale / 2
    middles = []
    for size in (inner[:, 1].float(), inner[:, 0].float()):
        low, high = torch.minimum(half, size / 2), torch.maximum(size - half, size / 2)
        middles.append(low + (high - low) * torch.rand(count, generator=generator))
    steps = (torch.arange(crop) + 0.5) / crop * 2 - 1
    x = middles[0][:, None] + half[:, None] * mirror[:, None] * steps  # N S: pixels from the left
    y = middles[1][:, None] + half[:, None] * steps
    across, down = 2 * x / width - 1, 2 * y / height - 1
    grid = axis_grid(across, down)
    image = F.grid_sample(pixels.float(), grid, "bilinear", "zeros", align_corners=False)
    # Masks are shifted by one, so that outside the image, where 0 is sampled, the target is -1 (ignored).
    classes = F.grid_sample(target[:, None].float() + 1, grid, "nearest", "zeros", align_corners=False)[:, 0].long() - 1
    inside = ((x >= 0) & (x < inner[:, 1:]))[:, None] & ((y >= 0) & (y < inner[:, :1]))[:, :, None]
    classes = torch.where(inside, classes, -1)
    if augment == "standard":
        light, contrast = uniform(-25, 25).view(-1, 1, 1, 1), uniform(0.75, 1.25).view(-1, 1, 1, 1)
        mean = image.mean((1, 2, 3), keepdim=True)
        image = ((image - mean) * contrast + mean + light).clamp(0, 255)
    return image, classes


def mirror_boxes(images: Tensor, boxes: Tensor, labels: Tensor, which: Tensor, order: Sequence[int] = ()) -> Boxed:
    """Mirror the images selected by `which` (B bool) horizontally, with their boxes, and keypoints in the mirrored `order`."""
    left, top, right, bottom = boxes[..., :4].unbind(-1)
    mirrored = torch.stack([images.shape[-1] - right, top, images.shape[-1] - left, bottom], -1)
    if order:
        points = boxes[..., 4:].unflatten(-1, (-1, 2))[..., list(order), :]
        points = torch.stack([images.shape[-1] - points[..., 0], points[..., 1]], -1)
        mirrored = torch.cat([mirrored, points.flatten(-2)], -1)
    return (
        mirror(images, which),
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
    out = (
        F.grid_sample(images.float() - fill, axis_grid(x, y), mode="bilinear", padding_mode="zeros", align_corners=False) + fill
    )
    pairs = boxes.shape[-1] // 2
    moved = (boxes - size.repeat(pairs) / 2) * scale.view(-1, 1, 1) + middle.repeat(1, pairs)[:, None]
    return out, *clip_boxes(moved, labels, side)


def mosaic(images: Tensor, boxes: Tensor, labels: Tensor) -> Boxed:
    """Combine four images each, B 4 C S S, into B C 2S 2S (Bochkovskiy et al. 2020, arXiv:2004.10934).

    The order is top left, top right, bottom left, bottom right; boxes B 4 N 4 -> B 4N 4. `warp` then crops the result.
    """
    side = images.shape[-1]
    rows = [torch.cat([images[:, i], images[:, i + 1]], -1) for i in (0, 2)]
    corner = torch.tensor([[0, 0], [side, 0], [0, side], [side, side]], dtype=boxes.dtype)
    corner = corner.repeat(1, boxes.shape[-1] // 2)
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
class BoxAugmentation:
    """Augmentation of images with boxes: fractions of images, and ranges around no change."""

    mosaic: float = 1.0  # fraction of images combined from four
    scale: float = 0.5  # factor from 1 - scale to 1 + scale
    shift: float = 0.1  # fraction of the side, in all directions; half a side for mosaics
    flip: float = 0.5  # fraction mirrored
    hue: float = 0.015  # fraction of the color circle
    saturation: float = 0.5  # factor from 1 - saturation to 1 + saturation
    brightness: float = 0.3  # factor from 1 - brightness to 1 + brightness
    order: tuple[int, ...] = ()  # of keypoints after mirroring

    def __call__(
        self, fetch: Callable[[np.ndarray], Boxed], index: np.ndarray, count: int, generator: torch.Generator
    ) -> Boxed:
        """Return the images `index` of `count`, augmented; `fetch(rows)` returns them unchanged, B C S S."""
        between = partial(around_zero, generator)

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
        images, boxes, labels = mirror_boxes(images, boxes, labels, mirrored, self.order)
        return jitter(images, *colors), boxes, labels


def merge_batches(parts: Sequence[tuple[np.ndarray, Boxed]]) -> Boxed:
    """Concatenate batches with their positions in the whole batch, padded to the largest number of boxes."""
    order = torch.from_numpy(np.argsort(np.concatenate([places for places, _ in parts])))
    most = max(labels.shape[1] for _, (_, _, labels) in parts)
    boxes = [F.pad(b, (0, 0, 0, most - b.shape[1])) for _, (_, b, _) in parts]
    labels = [F.pad(n, (0, most - n.shape[1]), value=-1) for _, (_, _, n) in parts]
    pixels = [p for _, (p, _, _) in parts]
    return torch.cat(pixels)[order], torch.cat(boxes)[order], torch.cat(labels)[order]

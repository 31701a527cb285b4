"""Resizing of images as tensor operations, with the same result as Pillow.

Pillow resizes each axis by a weighted sum of pixels, rounds to 8 bits, and goes on with the other axis. Both are matrix products
here, whose weights depend on the size of the image, so that images of any size enter the same graph. Weights have 22 binary
places, as in Pillow, and sums are exact in float64, so that ties are rounded in the same way. Pillow begins with the vertical axis
if that shrinks by more than twice the pixels of the other one (found by trials with Pillow 13, no exception in 500 sizes).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL.Image import Resampling
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.preprocessing.image_transform import ImageTransform, ResizeTransform
from fieldguide.exporting.graph import BATCH, ExportError

SUPPORT = {Resampling.BILINEAR: 1.0, Resampling.BICUBIC: 2.0, Resampling.LANCZOS: 3.0, Resampling.HAMMING: 1.0}  # pixels
PRECISION_BITS = 22  # of weights
DRAFT_FACTOR = 4  # JPEG files that are larger by this factor are decoded at a reduced size: `ImageTransform.load`
CUBIC = -0.5  # the coefficient a of the bicubic filter


def apply_filter(number: Resampling, x: Tensor) -> Tensor:
    """Return the weights of a filter at distances in (scaled) pixels."""
    x = x.abs()
    if number == Resampling.BILINEAR:
        return (1 - x).clamp(min=0)
    if number == Resampling.BICUBIC:
        near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * CUBIC
        return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    if number == Resampling.LANCZOS:
        return torch.where(x < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)
    return torch.where(x < 1, torch.sinc(x) * (0.54 + 0.46 * torch.cos(math.pi * x)), 0.0)  # Hamming


def build_weights(
    number: Resampling, source: Tensor, start: Tensor, length: Tensor, placed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weights of each input pixel for each output pixel, out x size, and which output pixels the image covers.

    Args:
        number: the filter.
        source: the positions of the input pixels' centers.
        start, length: of the part of the input axis that is resized, in pixels; they may be fractional.
        placed: output pixels that this part becomes.
        position: of each output pixel among them.
    """
    scale = length / placed
    stretch = scale.clamp(min=1.0)
    distance = source[None] - (start + (position + 0.5) * scale)[:, None]
    weights = torch.where(distance.abs() < SUPPORT[number] * stretch, apply_filter(number, distance / stretch), 0.0)
    covered = (position >= 0) & (position < placed)
    total = weights.sum(1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total) * 2**PRECISION_BITS
    return torch.sign(weights) * torch.floor(weights.abs() + 0.5) / 2**PRECISION_BITS, covered


def resize(x: Tensor, across: Tensor, down: Tensor, high: Tensor, wide: Tensor) -> Tensor:  # B C H W -> B C H' W'
    """Apply the weights of both axes, in the order in which Pillow does for this size and that after resizing, `high` x `wide`."""
    height, width = count(x[0, 0, :, 0]), count(x[0, 0, 0])
    is_tall = (height > high) & (height - high > 2 * (width - wide))
    return torch.cond(is_tall, shrink_rows_first, shrink_columns_first, (x, across.mT.contiguous(), down))


def shrink_rows_first(x: Tensor, across: Tensor, down: Tensor) -> Tensor:  # B C H W, W S, S H -> B C S S
    return to_levels(to_levels(down @ x) @ across)


def shrink_columns_first(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    return to_levels(down @ to_levels(x @ across))


def to_levels(x: Tensor) -> Tensor:
    """Round to whole gray levels as Pillow does."""
    return torch.floor(x + 0.5).clamp(0, 255)


class Resize(nn.Module):
    """Bring images of any size to one size, and standardize their pixels, as `ImageTransform.load` and `apply` do.

    `forward` takes pixels B H W C uint8.
    """

    def __init__(self, transform: ImageTransform, name: str = "image"):
        super().__init__()
        self.transform, self.name = transform, name
        self.filter = Resampling(transform.filter) if isinstance(transform, ResizeTransform) else Resampling.BILINEAR
        if self.filter not in SUPPORT:
            raise ExportError(f"resizing with the filter {self.filter.name.lower()} cannot be part of a graph.")

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:  # B H W C
        x = pixels.permute(0, 3, 1, 2).double()
        height, width = count(x[0, 0, :, 0]), count(x[0, 0, 0])
        rows, columns = self.place(height, width), self.place(width, height)
        out = torch.arange(self.transform.side, dtype=torch.float64)
        across, covered = build_weights(self.filter, centers(x[0, 0, 0]), *columns[:3], out - columns[3])
        down, inside = build_weights(self.filter, centers(x[0, 0, :, 0]), *rows[:3], out - rows[3])
        x = resize(x, across, down, rows[2], columns[2])  # to the sizes before cropping
        x = torch.where(covered & inside[:, None], x, 255.0)
        return {self.name: self.transform.apply(x.float())}

    def place(self, size: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return where an axis goes: start and length of the part that is resized, the pixels it becomes, and their offset."""
        transform, side = self.transform, torch.tensor(float(self.transform.side), dtype=torch.float64)
        zero, short = torch.zeros_like(size), torch.minimum(size, other)
        if transform.fit == "pad":
            placed = torch.where(size < other, torch.round(size / other * side), side)
            return zero, size, placed, torch.round((side - placed) * 0.5)
        if isinstance(transform, ResizeTransform):
            edge = float(transform.edge)
            longer = edge if transform.fit == "stretch" else torch.floor(edge * size / short)
            placed = torch.where(size > short, longer, edge)
            left = (placed - side) / 2
            return zero, size, placed, -(torch.round(left) if transform.even else torch.floor(left))
        if transform.fit == "stretch":
            return zero, size, side, zero
        return (size - short) * 0.5, short, side, zero  # "crop"


def count(line: Tensor) -> Tensor:
    """Return the length of a vector as a tensor, so that a traced graph does not fix it."""
    return torch.ones_like(line, dtype=torch.float64).sum()


def centers(line: Tensor) -> Tensor:
    """Return the positions of the centers of pixels in a line."""
    return torch.ones_like(line, dtype=torch.float64).cumsum(0) - 0.5


def describe_pixels(transform: ImageTransform) -> TensorSpec:
    """Return the graph input for images: pixels of any size."""
    sizes = (Axis("height", least=2), Axis("width", least=2), Axis("channels", transform.channels))
    return TensorSpec("pixels", "uint8", (BATCH, *sizes), low=0, high=255)


def choose_reading(transform: Any, other: str = "any_depth") -> tuple[str, ...]:
    """Return the parts of the program that decode images; `other` is that for more than 8 bits if no training image had them."""
    return "media", "pictures", "trained_depth" if transform.scale else other


def build_image_module(transform: Any) -> dict[str, tuple[str, ...]]:
    """Return the module `images` of a program that does more than to decode images; see `Graph.modules`."""
    return {"images": ("image_module", *choose_reading(transform)[1:])}


def describe_image_reading(transform: ImageTransform, side: int) -> dict[str, Any]:
    """Return what the program needs to decode images that become `side` pixels large."""
    draft = 0 if isinstance(transform, ResizeTransform) else DRAFT_FACTOR
    return {"channels": transform.channels, "scale": transform.scale and list(transform.scale), "side": side, "draft": draft}

"""Image transforms: one side length, one number of channels, and standardized pixel values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import numpy as np
import polars as pl
from numpy.typing import ArrayLike
from PIL import Image, ImageOps

from fieldguide.core.errors import SettingsError
from fieldguide.core.structure import Limits
from fieldguide.data.dataset import HIGH, LOW, CellProblems, Data
from fieldguide.data.media import images

if TYPE_CHECKING:
    import torch

REDUCED_SIDES = (2 / 3, 1 / 2, 1 / 3)  # fractions of a side that networks may get if time is short
USUAL_SIDES = (8, 16, 24, 28, 32, 48, 64, 96, 128, 160, 192, 224)
Side = Annotated[int, Limits(1, 10_000)]  # pixels
PixelCount = Annotated[int, Limits(1, images.MAX_PIXELS)]  # of an image
Channels = Annotated[int, Limits(1, 64)]
MAX_FIT_IMAGES = 5000  # images used to estimate mean and standard deviation; more change only the third digit


def suggest_side(widths: ArrayLike, heights: ArrayLike) -> int:
    """Return the largest usual side, 8 to 224 pixels, that at least half of the images reach."""
    median = float(np.median(np.minimum(np.asarray(widths), np.asarray(heights))))
    return max((s for s in USUAL_SIDES if s <= median), default=USUAL_SIDES[0])


def list_smaller_sides(side: int, least: int, step: int = 8) -> list[tuple[int, float]]:
    """Return smaller sides, largest first, and their fractions of `side`: multiples of `step`, at least `least`."""
    sides = {int(side * fraction) // step * step for fraction in REDUCED_SIDES}
    return [(each, each / side) for each in sorted(sides, reverse=True) if least <= each < side]


def learn_scale(rows: pl.DataFrame) -> images.Scale | None:
    """Return the scale of training images with more than 8 bits per value, or None if there are none."""
    if not {LOW, HIGH} <= set(rows.columns):
        return None
    return images.learn_scale(*(rows[name].cast(pl.Float64).fill_null(float("nan")).to_numpy() for name in (LOW, HIGH)))


def describe_scale(scale: images.Scale | None) -> list[str]:
    """Return a note about a learned scale, in a list; an empty list without a scale."""
    if scale is None:
        return []
    return [f"values of more than 8 bits are scaled by the range of the training images, {scale[0]:.6g} to {scale[1]:.6g}"]


def find_other_ranges(data: Data, column: str, scale: images.Scale | None) -> tuple[list[CellProblems], list[str]]:
    """Return the images that a learned scale does not fit, and notes.

    These are images of 8 bits after training on more, and images whose values lie far outside the scale.
    """
    if not {LOW, HIGH} <= set(data.rows.columns):
        return [], []
    lows, highs = (data.rows[name].cast(pl.Float64).fill_null(float("nan")).to_numpy() for name in (LOW, HIGH))
    deep = ~np.isnan(highs)
    if scale is None:
        note = (
            f"{int(deep.sum()):,} images have more than 8 bits per value. No scale for them was learned in training, so they are "
            "scaled by the range of their format"
        )
        return [], [note] if deep.any() else []
    low, high = scale
    span = f"the training images have values from {low:.6g} to {high:.6g}"
    notes = []
    if not deep.all():  # training may have had both
        rows = np.flatnonzero(~deep)
        places = ", ".join(data.locate_row(int(i)) for i in rows[:5])
        notes.append(f"{len(rows):,} images have 8 bits per value and are not scaled, whereas {span}: {places}")
    found = np.flatnonzero(deep & ((highs > high + (high - low)) | (highs < low) | (lows < low - (high - low)))).tolist()
    if not found:
        return [], notes
    shown = tuple((data.locate_row(i), f"{lows[i]:.6g} to {highs[i]:.6g}") for i in found[:5])
    detail = f"with values far outside the training range ({span})"
    return [CellProblems(column, "out-of-range", detail, len(found), tuple(found), shown)], notes


@dataclass(frozen=True)
class ImageTransform:
    """The conversion of images to tensors: S pixels per side, 1 or 3 channels, `mean` and `std` per channel (0 to 1).

    `scale` holds the values of more than 8 bits that become 0 and 1; it is learned from the training images.
    """

    side: int
    channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    fit: images.Fit = "crop"
    scale: images.Scale | None = None

    STATE: ClassVar[Mapping[str, Any]] = {  # types of the values of `to_json`
        "side": Side,
        "channels": Channels,
        "mean": list[float],
        "std": list[Annotated[float, Limits(1e-6, 1e6)]],
        "fit": images.Fit,
        "scale?": images.Scale | None,
        "edge?": Side,
        "patch?": Side,
        "unit?": Side,
        "min_pixels?": PixelCount,
        "max_pixels?": PixelCount,
        "filter?": Annotated[int, Limits(0, max(Image.Resampling))],
        "even?": bool,
    }

    @classmethod
    def from_pixels(cls, pixels: torch.Tensor, fit: images.Fit = "crop", scale: images.Scale | None = None) -> ImageTransform:
        """Fit mean and standard deviation on training images as returned by `images.load`: uint8, N C S S."""
        some = pixels[:: max(1, len(pixels) // MAX_FIT_IMAGES)].double() / 255  # evenly spread
        mean, std = some.mean((0, 2, 3)), some.std((0, 2, 3), correction=0)
        return cls(
            pixels.shape[-1], pixels.shape[1], tuple(mean.tolist()), tuple(max(s, 1e-3) for s in std.tolist()), fit, scale
        )

    def with_normalization(self, text: str) -> ImageTransform:
        """Return a copy with mean and std parsed from "mean,mean,mean/std,std,std". Raises SettingsError if invalid."""
        try:
            mean, std = (tuple(float(number) for number in part.split(",")) for part in text.split("/"))
        except ValueError:
            mean, std = (), ()
        if not len(mean) == len(std) == self.channels or min(std) <= 0:
            raise SettingsError(
                f"task.pixels={text!r} is not a mean and standard deviation for {self.channels} "
                f"channel{'s' if self.channels > 1 else ''}, such as "
                f"{'/'.join(','.join([each] * self.channels) for each in ('0.5', '0.25'))}."
            )
        return replace(self, mean=mean, std=std)

    def with_resize(self, text: str) -> ResizeTransform:
        """Return a copy that resizes as in "crop 0.875 bicubic" (see `Resized`). Raises SettingsError if invalid."""
        even = text.endswith(" even")
        part, resampling = 1.0, Image.Resampling.BICUBIC
        try:
            fit, *share, name = text.removesuffix(" even").split()
            part, resampling = float(*share) if share else 1.0, Image.Resampling[name.upper()]
        except (ValueError, KeyError, TypeError):
            fit = ""
        if fit not in ("crop", "pad", "stretch") or not 0 < part <= 1 or (part < 1 and fit == "pad"):
            raise SettingsError(
                f"task.resize={text!r} is not a valid resize method, such as: crop bicubic (center crop), "
                "crop 0.875 bicubic (that fraction of the center), pad bilinear, stretch bicubic."
            )
        size = round(self.side / part)
        return ResizeTransform(
            self.side, self.channels, self.mean, self.std, cast(images.Fit, fit), self.scale, size, resampling, even
        )

    def load(self, paths: Sequence[str | Path]) -> torch.Tensor:
        """Load files as uint8, N C S S. Raises DataError naming those that cannot be read."""
        return images.load(paths, self.side, self.channels, fit=self.fit, scale=self.scale)

    def load_each(self, paths: Sequence[str | Path]) -> list[torch.Tensor]:
        """Load files as uint8, C H W each, which may differ in size in subclasses."""
        return list(self.load(paths))

    def collate(self, rows: Sequence[Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the images of each row, uint8 C H W, as standardized tensors of a batch; see `collate_images`."""
        found = collate_images(rows, self.channels)
        return {**found, "image": self.apply(found["image"])} if found else {}

    @property
    def size_text(self) -> str:
        """The size of the images and how they get it, as text."""
        return f"{self.side} x {self.side} pixels ({self.fit})"

    def apply(self, pixels: torch.Tensor) -> torch.Tensor:
        """Convert uint8 ... C S S to standardized float32, on the device of `pixels`."""
        import torch

        mean = torch.tensor(self.mean, device=pixels.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(-1, 1, 1)
        return (pixels.float() / 255 - mean) / std

    def convert_for(self, x: torch.Tensor, other: ImageTransform) -> torch.Tensor:
        """Convert images from `apply`, B C S S, to what `other.apply` would return, except for its resize filter."""
        import torch
        import torch.nn.functional as F

        if self == other:
            return x
        numbers = lambda values: torch.tensor(values, device=x.device, dtype=x.dtype).view(-1, 1, 1)
        x = x * numbers(self.std) + numbers(self.mean)
        if self.channels == 3 and other.channels == 1:
            x = (x * numbers((0.299, 0.587, 0.114))).sum(1, keepdim=True)  # ITU-R BT.601, as Pillow converts to gray
        elif self.channels != other.channels:
            x = x.expand(-1, other.channels, -1, -1)
        if self.side != other.side:
            x = F.interpolate(x, (other.side, other.side), mode="bilinear", antialias=True)
        return (x - numbers(other.mean)) / numbers(other.std)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-compatible dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> ImageTransform:
        """Restore from `to_json`."""
        scale = tuple(saved["scale"]) if saved.get("scale") else None  # absent in older runs
        values = (saved["side"], saved["channels"], tuple(saved["mean"]), tuple(saved["std"]), saved["fit"], scale)
        if "unit" in saved:
            sizes = {name: saved[name] for name in ("patch", "unit", "min_pixels", "max_pixels", "filter")}
            return NativeTransform(*values, **sizes)
        return (
            ResizeTransform(*values, saved["edge"], Image.Resampling(saved["filter"]), saved.get("even", False))
            if "edge" in saved
            else cls(*values)
        )


@dataclass(frozen=True)
class ResizeTransform(ImageTransform):
    """Image transform of published models with a Pillow filter: "crop" scales the shorter side to `edge`, "stretch" both
    sides, followed by a center crop; "pad" scales the longer side and pads with white."""

    edge: int = 224  # pixels of the shorter side, or of both, before the crop
    filter: int = Image.Resampling.BICUBIC
    even: bool = False  # round a half-pixel crop offset to even, like torchvision, instead of down

    @property
    def method(self) -> str:
        """The method as text that `with_resize` accepts."""
        share = f" {self.side / self.edge}" if self.edge != self.side else ""
        return f"{self.fit}{share} {Image.Resampling(self.filter).name.lower()}{' even' if self.even else ''}"

    def load(self, paths: Sequence[str | Path]) -> torch.Tensor:
        """Load files as uint8, N C S S. Raises DataError naming those that cannot be read."""
        return images.load(paths, self.side, self.channels, resize=self.cut, scale=self.scale)

    def cut(self, image: Image.Image) -> Image.Image:
        """Resize and crop one image to S x S."""
        width, height = image.size
        if self.fit == "pad":
            return ImageOps.pad(image, (self.side, self.side), self.filter, color="white")
        short, long = sorted(image.size)
        longer = self.edge if self.fit == "stretch" else int(self.edge * long / short)
        image = image.resize((self.edge, longer) if width <= height else (longer, self.edge), self.filter)
        middle = (lambda room: round(room / 2)) if self.even else (lambda room: room // 2)
        left, top = (middle(length - self.side) for length in image.size)
        return image.crop((left, top, left + self.side, top + self.side))


MAX_ASPECT_RATIO = 200  # of images that keep their size, as in the code of Qwen2-VL's authors


@dataclass(frozen=True)
class NativeTransform(ImageTransform):
    """Image transform of networks that read images of any size: sides become multiples of `unit` pixels.

    Images with more than `max_pixels` are made smaller, those with less than `min_pixels` larger; the aspect ratio is kept as far
    as the multiples allow. `side` is only the usual size, for plans. `patch` is the side of a patch.
    """

    patch: int = 14
    unit: int = 28
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    filter: int = Image.Resampling.BICUBIC

    @property
    def size_text(self) -> str:
        """The size of the images and how they get it, as text."""
        return f"multiples of {self.unit} pixels, {self.min_pixels:,} to {self.max_pixels:,} pixels in all"

    def choose_size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width after resizing. Raises ValueError for a side more than `MAX_ASPECT_RATIO` times the other."""
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ValueError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other")
        unit = self.unit
        fitted = round(height / unit) * unit, round(width / unit) * unit
        if fitted[0] * fitted[1] > self.max_pixels:
            factor = math.sqrt(height * width / self.max_pixels)
            return max(unit, math.floor(height / factor / unit) * unit), max(unit, math.floor(width / factor / unit) * unit)
        if fitted[0] * fitted[1] < self.min_pixels:
            factor = math.sqrt(self.min_pixels / (height * width))
            return math.ceil(height * factor / unit) * unit, math.ceil(width * factor / unit) * unit
        return fitted

    def resize(self, image: Image.Image) -> Image.Image:
        """Resize one image."""
        height, width = self.choose_size(image.height, image.width)
        return image.resize((width, height), self.filter)

    def load_each(self, paths: Sequence[str | Path]) -> list[torch.Tensor]:
        """Load files as uint8, C H W each. Raises DataError naming those that cannot be read."""
        return images.load_each(paths, self.channels, self.resize, self.scale)

    def collate(self, rows: Sequence[Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the images of each row, uint8 C H W, as standardized tensors of a batch; see `collate_images`."""
        found = collate_images(rows, self.channels, self.patch)
        return {**found, "image": self.apply(found["image"])} if found else {}


def collate_images(rows: Sequence[Sequence[torch.Tensor]], channels: int, patch: int = 0) -> dict[str, torch.Tensor]:
    """Return the images of each row, uint8 C H W, as `image`: B C H W, or B I C H W if a row has several, padded with black.

    If their sizes differ, `grid` holds the rows and columns of patches of each, B 2 or B I 2; 0 if a row has fewer images. Without
    any image, nothing is returned.
    """
    import torch

    most = max(map(len, rows), default=0)
    sizes = {tuple(image.shape[1:]) for row in rows for image in row}
    if not sizes:
        return {}
    height, width = (max(lengths) for lengths in zip(*sizes))
    found = torch.zeros(len(rows), most, channels, height, width, dtype=torch.uint8)
    grid = torch.zeros(len(rows), most, 2, dtype=torch.int64)
    for i, row in enumerate(rows):
        for k, image in enumerate(row):
            h, w = image.shape[1:]
            found[i, k, :, :h, :w] = image
            grid[i, k] = torch.tensor([h, w]) // max(patch, 1)
    together = {"image": found, **({"grid": grid} if patch and len(sizes) > 1 else {})}
    return {name: x[:, 0] for name, x in together.items()} if most == 1 else together

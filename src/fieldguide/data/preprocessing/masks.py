"""Segmentation masks: reading class values from images or rasterized outlines, and placing images and masks on a canvas.

How the stored values of masks are coded is decided once, from all of them (`inspect_masks`, `is_interpolated`), and kept in the
`Canvas`: values or palette indices, colors, or gray levels that a threshold divides into background and foreground.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from fieldguide.core.threads import map_threads
from fieldguide.data.media import images
from fieldguide.data.media.deep_images import read_deep_values
from fieldguide.data.media.masks import LazyMask
from fieldguide.data.preprocessing.image_transform import Channels, Side

CANVAS_MULTIPLE = 32  # canvas sizes are multiples of it, for models that downsample five times by 2
INTEGER_MODES = ("P", "L", "1", "I", "I;16", "I;16B", "I;16L", "I;16N")
SOLID_SIZE, BORDER_SIZE = 5, 11  # pixels per side of the areas that objects have, and that a border of void pixels has not
MAX_SOLID_FRACTION = 0.1  # maximum fraction of pixels in such areas of values that are no objects
MAX_LOSSY_TINT = 6  # maximum difference of the colors of a gray pixel after compression with loss
WEBP_HEAD = 64  # bytes that contain the first chunks of a WebP file
MAX_FILTERED_MASKS, MAX_FILTERED_SIDE = 64, 640  # masks that are searched for such areas, and pixels per side of their center

Mask = str | Path | LazyMask
Coding = Literal["", "value", "color"]  # "" reads every file by its mode, as runs did before codings were stored


def read_codes(path: Mask, coding: Coding = "") -> np.ndarray:
    """Return the stored class values of a mask, int32 H W: gray values, palette indices, or r * 65536 + g * 256 + b.

    With "value", gray images stored as RGB have gray values; with "color", gray values and palette indices become colors.
    """
    if isinstance(path, LazyMask):
        return path.rasterize()
    with images.open_image(path) as image:
        deep = read_deep_values(image)
        if deep is not None and deep.ndim == 2:
            return deep.astype(np.int64).clip(-(2**31), 2**31 - 1).astype(np.int32)
        if image.mode in INTEGER_MODES and not (coding == "color" and image.mode in ("P", "L", "1")):
            return np.asarray(image if image.mode != "1" else image.convert("L")).astype(np.int32)
        if image.mode == "F" and coding != "color":
            return (
                np.rint(np.nan_to_num(np.asarray(image), posinf=2**31 - 1, neginf=-1))
                .clip(-(2**31), 2**31 - 128)
                .astype(np.int32)
            )
        if image.mode == "LA" and coding != "color":
            return np.asarray(image.convert("L")).astype(np.int32)
        color = np.asarray(image.convert("RGB")).astype(np.int32)
        if coding == "value":
            return color[..., 0]
        return (color[..., 0] << 16) | (color[..., 1] << 8) | color[..., 2]


@dataclass(frozen=True)
class MaskContent:
    """What a mask file holds: its distinct values (as with coding "") with their counts, and how they are stored."""

    values: np.ndarray
    counts: np.ndarray
    form: Literal["gray", "palette", "color", "drawn"]
    is_jpeg: bool = False  # or another format with loss
    palette: tuple[int, ...] = ()  # color of each value of a palette image

    @property
    def is_gray(self) -> bool:
        """Return whether a color image holds only gray values."""
        parts = np.stack([self.values >> 16, self.values >> 8 & 255, self.values & 255])
        error = MAX_LOSSY_TINT if self.is_jpeg else 0  # formats with loss convert gray to color differences and back
        return self.form == "gray" or (self.form == "color" and bool((parts.max(0) - parts.min(0) <= error).all()))

    def recode(self, coding: Coding) -> np.ndarray:
        """Return what `read_codes` would return for each of `values`."""
        if coding == "value" and self.form == "color":
            return self.values >> 16
        if coding == "color" and self.form == "palette":
            return np.array(self.palette, dtype=np.int64)
        if coding == "color" and self.form == "gray" and (self.values < 256).all():
            return self.values * 0x010101
        return self.values


def inspect_masks(paths: Sequence[Mask]) -> list[MaskContent]:
    """Return the content of each mask. Every file is decoded once."""

    def one(path: Mask) -> MaskContent:
        found = read_codes(path)
        if found.min() >= 0 and found.max() < 65536:
            every = np.bincount(found.ravel())
            values = np.flatnonzero(every)
            counts = every[values]
        else:
            values, counts = np.unique(found, return_counts=True)
        if isinstance(path, LazyMask):
            return MaskContent(values, counts, "drawn")
        with images.open_image(path) as image:
            is_jpeg = image.format in ("JPEG", "MPO") or is_lossy_webp(path, image)
            if image.mode == "P":
                entries = np.array(image.getpalette("RGB") or [0] * 768, dtype=np.int64).reshape(-1, 3)
                entries = np.concatenate([entries, np.zeros((max(0, 256 - len(entries)), 3), dtype=np.int64)])
                colors = entries[values] @ np.array([65536, 256, 1])
                return MaskContent(values, counts, "palette", is_jpeg, tuple(colors.tolist()))
            is_gray = image.mode in INTEGER_MODES or image.mode in ("LA", "F")
            return MaskContent(values, counts, "gray" if is_gray else "color", is_jpeg)

    with images.suppress_warnings():
        return map_threads(one, paths)


def is_lossy_webp(path: str | Path, image: Image.Image) -> bool:
    """Return whether an image is a WebP file with loss, which contains a chunk `VP8 ` instead of `VP8L`."""
    if image.format != "WEBP":
        return False
    with open(path, "rb") as file:
        return b"VP8 " in file.read(WEBP_HEAD)


def solid_fraction(paths: Sequence[Mask], coding: Coding, values: Sequence[int] | np.ndarray, size: int = SOLID_SIZE) -> float:
    """Return which fraction of the pixels with these values lies in areas of one value, `size` pixels wide and high.

    It is near 0 for lines, smooth transitions and noise, and near 1 for objects.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    chosen = np.random.default_rng(0).permutation(len(paths))[:MAX_FILTERED_MASKS]

    def one(i: int) -> tuple[int, int]:
        codes = read_codes(paths[i], coding)
        top, left = (max(0, (length - MAX_FILTERED_SIDE) // 2) for length in codes.shape)
        codes = codes[top : top + MAX_FILTERED_SIDE, left : left + MAX_FILTERED_SIDE]
        some = np.isin(codes, values)
        if not some.any():
            return 0, 0
        solid = maximum_filter(maximum_filter(codes, size) - minimum_filter(codes, size) == 0, size)
        return int((solid & some).sum()), int(some.sum())

    with images.suppress_warnings():
        parts = np.array(map_threads(one, chosen))
    return float(parts[:, 0].sum() / max(1, parts[:, 1].sum()))


@dataclass(frozen=True)
class Canvas:
    """The preprocessing of an image and its mask: at most `side` pixels long, on a canvas, pixel values standardized to
    mean 0 and standard deviation 1; `classes` are the stored mask values of class 0, 1, ..."""

    side: Side
    channels: Channels
    classes: tuple[int, ...]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    scale: images.Scale | None = None  # values of more than 8 bits that become 0 and 255
    coding: Coding = ""  # how masks are read, see `read_codes`
    threshold: float | None = None  # mask values from here on are the second class, others the first
    aliases: tuple[tuple[int, int], ...] = ()  # (value, class value): other values of a class
    void: tuple[int, ...] = ()  # mask values that belong to no class

    def fit_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the height and width of an image of this size on the canvas; images are never enlarged."""
        scale = min(1.0, self.side / max(width, height))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def load_images(self, paths: Sequence[str | Path], sizes: Sequence[tuple[int, int]], canvas: tuple[int, int]) -> np.ndarray:
        """Return images in the top left corner of canvases, uint8 N C H W; `sizes` are their original (width, height)."""
        out = np.zeros((len(paths), self.channels, *canvas), dtype=np.uint8)
        mode = "L" if self.channels == 1 else "RGB"

        def one(i: int) -> None:
            height, width = self.fit_size(*sizes[i])
            with images.open_image(paths[i]) as image:
                if image.format == "JPEG" and min(image.size) >= 2 * max(height, width):
                    image.draft(None, (2 * width, 2 * height))
                converted = images.convert_mode(image, mode, self.scale)
                resized = converted.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
            array = np.asarray(resized)
            out[i, :, :height, :width] = array if array.ndim == 2 else array.transpose(2, 0, 1)

        with images.suppress_warnings():
            map_threads(one, range(len(paths)))
        return out

    def load_masks(
        self, paths: Sequence[Mask], sizes: Sequence[tuple[int, int]], canvas: tuple[int, int], *, full: bool = False
    ) -> np.ndarray:
        """Return the class of each pixel, int16 N H W, -1 for none; with `full` in the original image size."""
        out = np.full((len(paths), *canvas), -1, dtype=np.int16)
        number = {value: i for i, value in enumerate(self.classes)}
        number |= {value: number[other] for value, other in self.aliases}
        known = np.array(sorted(number))
        order = np.array([number[value] for value in known.tolist()])

        def one(i: int) -> None:
            stored = read_codes(paths[i], self.coding)
            if self.threshold is not None:
                stored = np.where(stored >= self.threshold, self.classes[1], self.classes[0])
            place = np.minimum(np.searchsorted(known, stored), len(known) - 1)
            classes = np.where(known[place] == stored, order[place], -1).astype(np.int16)
            if not full:
                height, width = self.fit_size(*sizes[i])
                if classes.shape != (height, width):
                    rows = ((np.arange(height) + 0.5) * classes.shape[0] / height).astype(int)
                    columns = ((np.arange(width) + 0.5) * classes.shape[1] / width).astype(int)
                    classes = classes[rows[:, None], columns]
            out[i, : classes.shape[0], : classes.shape[1]] = classes

        with images.suppress_warnings():
            map_threads(one, range(len(paths)))
        return out

    def find_unknown(self, content: MaskContent) -> list[int]:
        """Return the values of a mask that are neither a class nor void."""
        if self.threshold is not None or not self.coding:  # older runs do not know which values are void
            return []
        known = {*self.classes, *self.void, *(value for value, _ in self.aliases)}
        return [v for v in np.unique(content.recode(self.coding)).tolist() if v not in known]

    def canvas_size(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Return the height and width of a canvas that holds images of these sizes."""
        inner = np.array([self.fit_size(*s) for s in sizes]).max(0)
        height, width = (int(-(-n // CANVAS_MULTIPLE) * CANVAS_MULTIPLE) for n in inner)
        return height, width

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-compatible dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Canvas:
        """Restore from `to_json`."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        values["aliases"] = tuple((a, b) for a, b in saved.get("aliases", ()))  # absent in older runs
        return cls(**values)

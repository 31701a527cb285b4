"""Segmentation masks: reading class values from images or rasterized outlines, and placing images and masks on a canvas."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from fieldguide.data.media import images
from fieldguide.data.media.masks import LazyMask

CANVAS_MULTIPLE = 32  # canvas sizes are multiples of it, for models that downsample five times by 2


Mask = str | Path | LazyMask


def read_codes(path: Mask) -> np.ndarray:
    """Return the stored pixel values of a mask, int32 H W: gray values, palette indices, or r * 65536 + g * 256 + b."""
    if isinstance(path, LazyMask):
        return path.rasterize()
    with images.suppress_warnings(), images.open_image(path) as image:
        if image.mode in ("P", "L", "1", "I", "I;16", "I;16B", "I;16L", "I;16N"):
            return np.asarray(image if image.mode != "1" else image.convert("L")).astype(np.int32)
        if image.mode in ("LA", "F"):
            return np.asarray(image.convert("L")).astype(np.int32)
        color = np.asarray(image.convert("RGB")).astype(np.int32)
        return (color[..., 0] << 16) | (color[..., 1] << 8) | color[..., 2]


def distinct_values(paths: Sequence[str | Path]) -> list[np.ndarray]:
    """Return the distinct values of each mask."""

    def one(path: str | Path) -> np.ndarray:
        found = read_codes(path)
        return np.flatnonzero(np.bincount(found.ravel())) if found.min() >= 0 and found.max() < 65536 else np.unique(found)

    with ThreadPoolExecutor(images.THREADS) as pool:
        return list(pool.map(one, paths))


@dataclass(frozen=True)
class Canvas:
    """The preprocessing of an image and its mask: at most `side` pixels long, on a canvas, pixel values standardized to
    mean 0 and standard deviation 1; `classes` are the stored mask values of class 0, 1, ..."""

    side: int
    channels: int
    classes: tuple[int, ...]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    scale: images.Scale | None = None  # values of more than 8 bits that become 0 and 255

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

        with images.suppress_warnings(), ThreadPoolExecutor(images.THREADS) as pool:
            list(pool.map(one, range(len(paths))))
        return out

    def load_masks(
        self, paths: Sequence[Mask], sizes: Sequence[tuple[int, int]], canvas: tuple[int, int], *, full: bool = False
    ) -> np.ndarray:
        """Return the class of each pixel, int16 N H W, -1 for none; with `full` in the original image size."""
        out = np.full((len(paths), *canvas), -1, dtype=np.int16)
        order = np.argsort(self.classes)
        known = np.array(self.classes)[order]

        def one(i: int) -> None:
            stored = read_codes(paths[i])
            place = np.minimum(np.searchsorted(known, stored), len(known) - 1)
            classes = np.where(known[place] == stored, order[place], -1).astype(np.int16)
            if not full:
                height, width = self.fit_size(*sizes[i])
                if classes.shape != (height, width):
                    rows = ((np.arange(height) + 0.5) * classes.shape[0] / height).astype(int)
                    columns = ((np.arange(width) + 0.5) * classes.shape[1] / width).astype(int)
                    classes = classes[rows[:, None], columns]
            out[i, : classes.shape[0], : classes.shape[1]] = classes

        with ThreadPoolExecutor(images.THREADS) as pool:
            list(pool.map(one, range(len(paths))))
        return out

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
        return cls(**values)

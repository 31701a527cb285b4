"""Base class of tasks that read an image and a text together: preprocessing, batching and attention overlays."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fieldguide.core.distributed import device
from fieldguide.core.hardware import ram
from fieldguide.core.settings import Settings
from fieldguide.data.dataset import CHANNELS, HASH, HEIGHT, WIDTH, Column, Data
from fieldguide.data.media import images
from fieldguide.data.preprocessing import ImageTransform, TextTokenizer, suggest_side
from fieldguide.data.preprocessing.augmentation import augment_images
from fieldguide.data.preprocessing.image_transform import describe_scale, learn_scale
from fieldguide.data.preprocessing.tokenizer import suggest_length
from fieldguide.tasks.base import Task
from fieldguide.tasks.multimodal.signature import ImageAndTextSignature
from fieldguide.tasks.supervised import fill_options

IMAGE_SIDES = (16, 24, 32, 48, 64, 96, 192)  # image sizes that the patches of the small models divide
MAX_SIDE_BY_DEVICE = {"cpu": 96, "mps": 96, "cuda": 192}  # maximum pixels per side by device, if the user sets no size
SAMPLED_ROWS = 5000  # images and texts sampled to choose sizes
MAX_IMAGE_CACHE_FRACTION_OF_RAM = 0.3  # maximum fraction of RAM for decoded images
MAX_TEXT_TOKENS = 64  # maximum tokens of a text, if the user sets no length
THUMBNAIL_SIDE = 128  # pixels per side in the report
IMAGE_GROUP_COLUMN = "picture"  # the column that keeps rows with the same image in one split


class ImageAndTextTask(ImageAndTextSignature, Task):
    """A task with one image column and one text column."""

    feature = ("image",)
    pictures: ImageTransform
    text: TextTokenizer
    median: int  # tokens of a training text

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        """Group rows with equal images so that splits keep them together."""
        if IMAGE_GROUP_COLUMN in data.columns or HASH not in data.rows.columns:
            return data
        group = Column(IMAGE_GROUP_COLUMN, "identifier", "group", "rows with equal images have the same value")
        rows = data.rows.with_columns(pl.col(HASH).alias(IMAGE_GROUP_COLUMN))
        return replace(data, rows=rows, columns={**data.columns, IMAGE_GROUP_COLUMN: group})

    def fit_inputs(self, data: Data, texts: list[str]) -> None:
        """Fit the image transform and the tokenizer, or load those that the options name. Sets side, channels,
        vocab_size and length.
        """
        o = self.options
        most = min(suggest_side(data.rows[WIDTH], data.rows[HEIGHT]), MAX_SIDE_BY_DEVICE[device().type])
        side = o.side or max((s for s in IMAGE_SIDES if s <= most), default=IMAGE_SIDES[0])
        channels = o.channels or (3 if (data.rows[CHANNELS] == 3).any() else 1)
        paths = data.rows[self.column].to_list()
        sample = np.random.default_rng(0).permutation(len(paths))[:SAMPLED_ROWS]
        scale = learn_scale(data.rows)
        pixels = images.load([paths[i] for i in sample], side, channels, fit="pad", scale=scale)
        self.pictures = ImageTransform.from_pixels(pixels, "pad", scale)
        self.notes += describe_scale(scale)
        if o.pixels:
            self.pictures = self.pictures.with_normalization(o.pixels)
        if o.resize:
            self.pictures = self.pictures.with_resize(o.resize)
        self.text = TextTokenizer.load(o.tokenizer) if o.tokenizer else TextTokenizer.fit(texts, size=o.vocab_size)
        sizes = [len(row) for row in self.encode_all(texts[:SAMPLED_ROWS])]
        self.median = int(np.median(sizes))
        self.options = fill_options(
            o, side=side, channels=channels, vocab_size=self.text.size, length=suggest_length(sizes, MAX_TEXT_TOKENS)
        )
        self.note_truncated(sum(s > self.options.length for s in sizes), len(sizes), self.options.length)

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Return all token ids of each text, including special tokens."""
        raise NotImplementedError

    def ends_with_special(self, row: list[int]) -> bool:
        """Return whether the last token of a row is an end token, which truncation keeps."""
        raise NotImplementedError

    def tokens(self, texts: list[str]) -> tuple[list[np.ndarray], int]:
        """Return the token ids of each text (int64), truncated to the length, and the number of truncated texts."""
        rows, most = self.encode_all(texts), self.options.length
        kept = [[*row[: most - 1], row[-1]] if len(row) > most and self.ends_with_special(row) else row[:most] for row in rows]
        return [np.array(row, dtype=np.int64) for row in kept], sum(len(row) > most for row in rows)

    @property
    def image_scale(self) -> images.Scale | None:
        return self.pictures.scale

    def model_dims(self) -> dict[str, Any]:
        return {
            "channels": self.pictures.channels,
            "image": self.pictures.side,
            "vocab_size": self.text.size,
            "length": self.options.length,
            "end": self.text.end,
        }

    def data_facts(self) -> dict[str, Any]:
        return {
            "side": self.pictures.side,
            "channels": self.pictures.channels,
            "vocab_size": self.text.size,
            "tokens": self.median,
        }

    def pixels(self, data: Data, settings: Settings | None = None) -> Callable[[np.ndarray, torch.Generator | None], Tensor]:
        """Return a function from row numbers to normalized images (B, C, S, S). Equal files are kept in memory once."""
        paths = data.rows[self.column].to_list()
        p, unique = self.pictures, sorted(set(paths))
        place = {path: i for i, path in enumerate(unique)}
        where = np.array([place[path] for path in paths], dtype=np.int64)
        stored = p.load(unique) if len(unique) * p.channels * p.side**2 < MAX_IMAGE_CACHE_FRACTION_OF_RAM * ram() else None
        how = settings.augmentation if settings else "none"

        def make(index: np.ndarray, generator: torch.Generator | None) -> Tensor:
            x = stored[torch.from_numpy(where[index])] if stored is not None else p.load([paths[i] for i in index])
            return p.apply(x if generator is None else augment_images(x, how, self.options.flip, generator))

        return make

    # Visualization

    def picture(self, data: Data, row: int) -> np.ndarray:  # -> S S 3 uint8
        array = images.load([data.rows[self.column][row]], THUMBNAIL_SIDE, 3, fit="pad", scale=self.pictures.scale)[0]
        return array.permute(1, 2, 0).numpy()

    def thumbnail(self, data: Data, row: int) -> bytes:
        return encode_jpeg(self.picture(data, row))

    def overlay(self, data: Data, row: int, heat: np.ndarray) -> bytes:
        """Return the image next to the same image under a heatmap (h, w) of its patch weights."""
        plain = self.picture(data, row)
        return encode_jpeg(np.concatenate([plain, overlay_heatmap(plain, heat)], 1))

    def restore_inputs(self, state: dict[str, Any], folder: Any) -> None:
        self.pictures, self.median = ImageTransform.from_json(state["pictures"]), state["median"]
        self.text = TextTokenizer.load(folder)

    STATE: ClassVar = {"pictures": ImageTransform.STATE, "median": float}

    def state(self) -> dict[str, Any]:
        return {"pictures": self.pictures.to_json(), "median": self.median}

    def save(self, folder: Any) -> None:
        super().save(folder)
        self.text.save(folder)


def overlay_heatmap(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:  # S S 3 uint8, h w -> S S 3 uint8
    """Return the image in gray, red where the heat is high: mean heat adds nothing, twice the mean or more adds full
    red.
    """
    side = picture.shape[:2]
    large = F.interpolate(torch.from_numpy(heat).float()[None, None], side, mode="bilinear", align_corners=False)[0, 0]
    strength = ((large / heat.mean() - 1).clamp(0, 1) * 0.75).numpy()[..., None]
    grey = picture.mean(2, keepdims=True) * 0.85
    return ((1 - strength) * grey + strength * np.array([255.0, 50.0, 20.0])).astype(np.uint8)


def encode_jpeg(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "JPEG", quality=85)
    return out.getvalue()

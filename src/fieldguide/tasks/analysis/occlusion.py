"""Occlusion: how much the probability of the predicted class falls when a part of the input is hidden.

It needs no gradients and no access to the network, so it works for every architecture (Zeiler and Fergus 2014,
arXiv:1311.2901, section 4.2; for words Li et al. 2016, arXiv:1612.08220).
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import polars as pl
import regex
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fieldguide.data.dataset import Data

WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]|\S+?(?=[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]|\s|$)")
MAX_PARTS = 40  # parts of a text that are left out one by one
CELLS = 8  # per side of the grid of an image


def split_text(text: str) -> list[tuple[int, int]]:
    """Return the (start, end) of the parts of a text: its words, or groups of neighboring words if it is long."""
    words = [match.span() for match in WORD.finditer(text)]
    size = -(-len(words) // MAX_PARTS)
    return [(words[k][0], words[min(k + size, len(words)) - 1][1]) for k in range(0, len(words), max(size, 1))]


def weigh_words(
    predict: Callable[[Data], np.ndarray], data: Data, column: str, row: int, label: int
) -> list[tuple[int, int, float]]:
    """Return (start, end, weight) of the parts of a text: the fall of the label's probability without that part."""
    text = data.rows[column][row] or ""
    parts = split_text(text)
    if len(parts) < 2:
        return []
    variants = [text, *(f"{text[:start]}{text[end:]}" for start, end in parts)]
    repeated = data.take([row] * len(variants))
    repeated.rows = repeated.rows.with_columns(pl.Series(column, variants))
    p = predict(repeated)[:, label]
    return [(start, end, float(p[0] - value)) for (start, end), value in zip(parts, p[1:])]


def weigh_pixels(predict: Callable[[Tensor], np.ndarray], image: Tensor, label: int) -> np.ndarray:  # C H W -> G G
    """Return a grid of weights: the fall of the label's probability when the pixels around a cell have the mean color."""
    height, width = image.shape[1:]
    rows, columns = min(CELLS, height), min(CELLS, width)
    variants = image.repeat(rows * columns + 1, 1, 1, 1)
    mean = image.mean((1, 2), keepdim=True)
    for i in range(rows):
        for j in range(columns):
            # twice as large as a cell: a smaller hole is filled in too easily
            top, left = int((i - 0.5) * height / rows), int((j - 0.5) * width / columns)
            bottom, right = round((i + 1.5) * height / rows), round((j + 1.5) * width / columns)
            variants[1 + i * columns + j, :, max(top, 0) : bottom, max(left, 0) : right] = mean
    p = predict(variants)[:, label]
    return (p[0] - p[1:]).reshape(rows, columns)


def draw_weights(image: Tensor, weights: np.ndarray, side: int = 256) -> tuple[bytes, bytes]:  # C H W, G G -> PNG, PNG
    """Return the image as the network sees it, and the same in gray with weights in blue (for the class) and orange (against)."""
    image = image.detach().float().cpu()
    low, high = image.min(), image.max()
    pixels = (image - low) / (high - low).clamp_min(1e-6)
    factor = max(1, round(side / max(pixels.shape[1:])))
    pixels = F.interpolate(pixels[None], scale_factor=factor, mode="nearest")[0]
    pixels = pixels.expand(3, -1, -1) if len(pixels) != 3 else pixels
    plain = pixels.permute(1, 2, 0).numpy()  # H W 3
    scaled = torch.from_numpy(weights / max(np.abs(weights).max(), 1e-9)).float()[None, None]
    large = F.interpolate(scaled, plain.shape[:2], mode="bilinear", align_corners=False)[0, 0].numpy()[..., None]
    gray = plain.mean(2, keepdims=True)
    color = np.where(large > 0, np.array([0.0, 0.45, 1.0]), np.array([1.0, 0.45, 0.0]))
    strength = 0.8 * np.abs(large)
    return encode_png(plain), encode_png((1 - strength) * gray + strength * color)


def encode_png(pixels: np.ndarray) -> bytes:  # H W 3 in 0 .. 1
    out = io.BytesIO()
    Image.fromarray(np.rint(255 * pixels.clip(0, 1)).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()

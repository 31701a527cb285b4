"""Images as PNG files, alone and in sheets."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image


def encode_png(x: np.ndarray) -> bytes:  # C S S in -1 .. 1
    """Return an image as PNG."""
    array = np.rint((x + 1) * 127.5).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0)).save(out, "PNG")
    return out.getvalue()


def encode_sheet(pictures: np.ndarray) -> bytes:  # N C S S in -1 .. 1 -> PNG
    """Return the images as a grid with thin lines between."""
    count, channels, side = len(pictures), *pictures.shape[1:3]
    columns = max(1, math.ceil(math.sqrt(count)))
    rows = -(-count // columns)
    whole = np.ones((channels, rows * (side + 1) - 1, columns * (side + 1) - 1), dtype=np.float32)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (side + 1), i % columns * (side + 1)
        whole[:, top : top + side, left : left + side] = picture
    return encode_png(whole)

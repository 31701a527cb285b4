"""Images and masks that a request brings along, for image-to-image and inpainting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fieldguide.core.errors import DataError
from fieldguide.data.media.images import MAX_PIXELS, open_image


def read_image(source: Any, mode: str) -> Image.Image:
    """Return an image in a mode, upright; `source` is a path or an image of Pillow. Raises `DataError` if it cannot be read."""
    if isinstance(source, Image.Image):
        return source.convert(mode)
    try:
        with open_image(Path(source)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{source} has {image.width:,} x {image.height:,} pixels, more than {MAX_PIXELS:,}. Reduce it.")
            return ImageOps.exif_transpose(image).convert(mode)
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise DataError(f"{source} cannot be read as an image: {error}") from error


def to_pixels(image: Image.Image, width: int, height: int) -> Tensor:  # -> 1 3 H W in -1 .. 1
    """Return an image, resized by Lanczos' filter if it has another size."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1


def to_mask(image: Image.Image, width: int, height: int) -> Tensor:  # -> 1 1 H W of 0 and 1
    """Return a mask: 1 where an image is white, at least half."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return (torch.from_numpy(np.array(image, dtype=np.float32))[None, None] / 255 >= 0.5).float()

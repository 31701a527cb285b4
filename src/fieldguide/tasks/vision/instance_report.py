"""Masks of objects drawn over their image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from fieldguide.core.packed_masks import Arrays, decode_mask, unpack_masks
from fieldguide.tasks.vision.detection_report import class_color, draw_boxes

MASK_OPACITY = 0.5


def paint_masks(picture: Image.Image, objects: Arrays, image: int, which: np.ndarray) -> Image.Image:
    """Return a picture of any size with the masks of some objects of an image.

    Objects of one class differ in brightness, and borders are opaque, which separates neighbors.
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    masks, places = unpack_masks(objects, image), np.flatnonzero(which)
    for number, place in enumerate(places[::-1]):  # the most certain one last, on top
        inside = decode_mask(masks[place])
        if inside.shape != pixels.shape[:2]:
            small = Image.fromarray(inside).resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.NEAREST)
            inside = np.asarray(small, dtype=bool)
        tone = np.array(class_color(int(objects["labels"][image][place])), dtype=np.float32) * (1, 0.7, 0.85)[number % 3]
        whole = np.pad(inside, 1)
        core = whole[:-2, 1:-1] & whole[2:, 1:-1] & whole[1:-1, :-2] & whole[1:-1, 2:]
        opacity = np.where(inside & ~core, 1.0, np.where(inside, MASK_OPACITY, 0.0))[..., None]
        pixels = pixels * (1 - opacity) + tone * opacity
    return Image.fromarray(pixels.astype(np.uint8))


def draw_masks(
    picture: Image.Image, objects: Arrays, image: int, which: np.ndarray, names: Sequence[str], scale: float = 1.0
) -> Image.Image:
    """Return a picture, reduced by `scale`, with the masks of some objects of an image, and their boxes and names."""
    drawn = paint_masks(picture, objects, image, which)
    scores = objects["scores"][image][which] if "scores" in objects else None
    return draw_boxes(drawn, objects["boxes"][image][which] * scale, objects["labels"][image][which], names, scores)

"""A predicted mask drawn over its image, with a legend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MASK_OPACITY = 0.5
MIN_LEGEND_WIDTH = 160  # pixels; a narrower image gets no legend


def draw_mask(
    picture: Image.Image, mask: np.ndarray, names: Sequence[str], colors: Sequence[tuple[int, int, int]]
) -> Image.Image:
    """Return the image (RGB) with a mask (H, W, class indices) over it, and a legend of the classes in the mask below it.

    The borders between classes are drawn opaque. The legend lists the classes by their area.
    """
    pixels, tones = np.asarray(picture.convert("RGB"), dtype=np.float32), np.array(colors, dtype=np.float32)[mask]
    border = np.zeros(mask.shape, dtype=bool)
    border[1:] |= mask[1:] != mask[:-1]
    border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    opacity = np.where(border, 1.0, MASK_OPACITY)[..., None]
    drawn = Image.fromarray((pixels * (1 - opacity) + tones * opacity).astype(np.uint8))
    width, height = drawn.size
    if width < MIN_LEGEND_WIDTH:
        return drawn
    areas = np.bincount(mask.ravel(), minlength=len(names))
    present = [int(i) for i in np.argsort(-areas, kind="stable") if areas[i]]
    size = max(11, round(max(width, height) / 40))
    font, line = ImageFont.load_default(size), round(1.6 * size)
    out = Image.new("RGB", (width, height + line * len(present)), "white")
    out.paste(drawn, (0, 0))
    pen = ImageDraw.Draw(out)
    for row, index in enumerate(present):
        top = height + row * line
        pen.rectangle((4, top + 3, 4 + size, top + line - 4), fill=tuple(colors[index]))
        pen.text((10 + size, top + 2), f"{names[index]}  {100 * areas[index] / mask.size:.1f} %", fill="black", font=font)
    return out

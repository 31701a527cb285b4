"""Images of colored shapes with several captions each, as COCO JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

IMAGES, SIDE, FINE = 1500, 48, 4  # images, pixels per side, and the factor by which they are drawn larger
COLORS = {
    "red": (214, 44, 44),
    "green": (48, 160, 72),
    "blue": (52, 88, 214),
    "yellow": (236, 200, 48),
    "purple": (142, 68, 173),
    "black": (28, 28, 28),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
LARGE = 9  # pixels from the center to the edge, from which on a shape is large


def draw_shape(pen: Any, shape: str, color: tuple[int, int, int], x: float, y: float, size: float) -> None:
    """Draw a shape with its center and half its size in pixels of the final image."""
    left, top, right, bottom = (FINE * v for v in (x - size, y - size, x + size, y + size))
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=color)
    elif shape == "ring":
        pen.ellipse((left, top, right, bottom), outline=color, width=int(FINE * size * 0.4))
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), fill=color)
    elif shape == "triangle":
        pen.polygon(((left, bottom), (right, bottom), (FINE * x, top)), fill=color)
    else:
        third = FINE * size * 0.35
        pen.rectangle((left, FINE * y - third, right, FINE * y + third), fill=color)
        pen.rectangle((FINE * x - third, top, FINE * x + third, bottom), fill=color)


def describe_scene(things: list[tuple[str, str, float, float, float]]) -> list[str]:
    """Return three captions of a scene with one or two shapes: (color, shape, x, y, size) each."""
    names = [f"{color} {shape}" for color, shape, *_ in things]
    if len(things) == 1:
        _, _, x, y, size = things[0]
        where = f"{'top' if y < SIDE / 2 else 'bottom'} {'left' if x < SIDE / 2 else 'right'}"
        how = "large" if size >= LARGE else "small"
        return [
            f"a {how} {names[0]} at the {where}",
            f"a {names[0]} in the {where} corner",
            f"there is a {how} {names[0]}",
        ]
    (_, _, x1, y1, _), (_, _, x2, y2, _) = things
    if abs(x1 - x2) >= abs(y1 - y2):
        first, second = names if x1 < x2 else names[::-1]
        words = ("left of", "right of")
    else:
        first, second = names if y1 < y2 else names[::-1]
        words = ("above", "below")
    return [
        f"a {first} {words[0]} a {second}",
        f"a {second} {words[1]} a {first}",
        f"there are two shapes, a {first} and a {second}",
    ]


def write_described(folder: Path) -> None:
    """Write 1,500 scenes of one or two shapes, and their captions as COCO JSON."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for number in range(IMAGES):
        ground = Image.new("RGB", (FINE * SIDE, FINE * SIDE), tuple(int(v) for v in rng.integers(190, 250, 3)))
        pen, things = ImageDraw.Draw(ground), list[tuple[str, str, float, float, float]]()
        wanted = int(rng.integers(1, 3))
        while len(things) < wanted:
            size = float(rng.uniform(5, 12))
            x, y = (float(v) for v in rng.uniform(size + 1, SIDE - size - 1, 2))
            if any(max(abs(x - x2), abs(y - y2)) < size + size2 + 1 for *_, x2, y2, size2 in things):
                continue
            color, shape = str(rng.choice(list(COLORS))), str(rng.choice(SHAPES))
            draw_shape(pen, shape, COLORS[color], x, y, size)
            things.append((color, shape, x, y, size))
        name = f"{number:04d}.png"
        ground.resize((SIDE, SIDE), Image.Resampling.BOX).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        for caption in describe_scene(things):
            annotations.append({"id": len(annotations), "image_id": number, "caption": caption})
    content = {"images": images, "annotations": annotations}
    (folder / "captions.json").write_text(json.dumps(content), encoding="utf-8")

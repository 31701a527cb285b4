"""A sample for anomaly detection in images: photos of a woven fabric, some with a defect, in the layout of MVTec AD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIDE, FINE = 64, 2  # pixels per side; drawn with this many times as many
DEFECTS = ("hole", "misweave", "scratch", "stain")
COLORS = ((150.0, 120.0, 90.0), (90.0, 105.0, 130.0))  # of the threads in both directions
TRAINED, NORMAL, DEFECTIVE = 200, 60, 20  # images: for training, normal in the test, of each defect


def write_fabric(folder: Path) -> None:
    """Write 200 normal images for training; 60 normal and 80 defective ones with masks for the test."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    parts = [("train/good", "", TRAINED), ("test/good", "", NORMAL), *((f"test/{d}", d, DEFECTIVE) for d in DEFECTS)]
    for place, defect, count in parts:
        (folder / place).mkdir(parents=True)
        if defect:
            (folder / "ground_truth" / defect).mkdir(parents=True)
        for number in range(count):
            pixels, mask = make_fabric(rng, defect)
            Image.fromarray(pixels).save(folder / place / f"{number:03d}.png")
            if defect:
                Image.fromarray(mask).save(folder / "ground_truth" / defect / f"{number:03d}_mask.png")


def make_fabric(rng: Any, defect: str = "") -> tuple[Any, Any]:
    """Return a photo of fabric (uint8, 64 64 3) and the mask of its defect (uint8, 64 64, 255 where it is)."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFilter

    n = SIDE * FINE
    y, x = np.mgrid[0:n, 0:n].astype(float)
    period, turn = rng.normal(8, 0.25) * FINE, np.deg2rad(rng.normal(0, 4))
    u = (x * np.cos(turn) + y * np.sin(turn)) / period + rng.uniform()
    v = (y * np.cos(turn) - x * np.sin(turn)) / period + rng.uniform()
    across, along = (np.sqrt(np.abs(np.sin(np.pi * place)))[..., None] for place in (u, v))  # threads are bright in the middle
    over = ((np.floor(u) + np.floor(v)) % 2 == 0)[..., None]
    warp, weft = (np.array(color) + rng.normal(0, 4, 3) for color in COLORS)
    pixels = np.where(over, warp * (0.45 + 0.55 * across), weft * (0.45 + 0.55 * along))
    drawing = Image.new("L", (n, n))
    pen, (cx, cy) = ImageDraw.Draw(drawing), rng.uniform(0.2 * n, 0.8 * n, 2)
    if defect == "hole":
        radius, flat = rng.uniform(2.5, 5) * FINE, rng.uniform(0.6, 1.2)
        pen.ellipse((cx - radius, cy - flat * radius, cx + radius, cy + flat * radius), fill=255)
    elif defect == "scratch":
        angle, half = rng.uniform(0, np.pi), rng.uniform(8, 17) * FINE
        dx, dy = half * np.cos(angle), half * np.sin(angle)
        pen.line((cx - dx, cy - dy, cx + dx, cy + dy), fill=255, width=int(rng.integers(3, 5)))
    elif defect == "stain":
        reach = rng.uniform(3.5, 8.5, (8, 2)) * FINE
        pen.polygon([(cx + a * np.cos(t), cy + b * np.sin(t)) for (a, b), t in zip(reach, np.arange(8) * np.pi / 4)], fill=255)
    elif defect == "misweave":  # a thread that passes over its neighbors
        thread = (np.floor(v) == np.floor(v[int(cy), int(cx)])) & (np.abs(x - cx) < rng.uniform(12, 24) * FINE / 2)
        drawing = Image.fromarray(thread.astype(np.uint8) * 255)
    soft = drawing.filter(ImageFilter.GaussianBlur(1)) if defect in ("hole", "stain") else drawing
    part = np.asarray(soft, dtype=float)[..., None] / 255
    changed = {
        "hole": np.array([25.0, 22.0, 20.0]),
        "scratch": 0.5 * pixels + 95,
        "stain": pixels * np.array([0.95, 0.8, 0.6]),
        "misweave": warp * (0.45 + 0.55 * along),
    }.get(defect, pixels)
    pixels = pixels * (1 - part) + changed * part
    slope = rng.normal(0, 0.08, 2)
    pixels = pixels * (1 + rng.normal(0, 0.04) + (x / n - 0.5) * slope[0] + (y / n - 0.5) * slope[1])[..., None]
    reduce = lambda image: image.reshape(SIDE, FINE, SIDE, FINE, -1).mean((1, 3))
    small = reduce(pixels) + rng.normal(0, 3, (SIDE, SIDE, 3))
    mask = (reduce(np.asarray(drawing, dtype=float))[..., 0] > 127) * 255
    return np.clip(small, 0, 255).astype(np.uint8), mask.astype(np.uint8)

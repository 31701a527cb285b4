"""Samples from scikit-learn's data sets: tables, and handwritten digits as images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fieldguide.data.samples.writers import write_csv


def write_digits(folder: Path) -> None:
    """Write 1,797 handwritten digits of 8 x 8 pixels as PNG, one folder per class; 17 gray levels are scaled to 0 to 255."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    for digit in range(10):
        (folder / str(digit)).mkdir()
    for i, (pixels, digit) in enumerate(zip(data.images, data.target)):
        gray = (pixels * (255 / 16)).round().astype("uint8")
        Image.fromarray(gray).save(folder / str(digit) / f"{i:04d}.png")


CANVAS, DIGIT_SIDE = 32, 22  # pixels per side of drawings, and of the digit in them
INK_THRESHOLD = 0.45  # of the brightness of an enlarged digit: more is inside of its stroke


def draw_digits() -> list[Any]:
    """Return each scanned digit enlarged to a smooth stroke at a random place: bool arrays of `CANVAS` pixels per side."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    rng, drawn = np.random.default_rng(0), []
    for pixels in load_digits().images:
        gray = Image.fromarray((pixels * (255 / 16)).round().astype("uint8")).resize(
            (DIGIT_SIDE,) * 2, Image.Resampling.BICUBIC
        )
        top, left = rng.integers(0, CANVAS - DIGIT_SIDE + 1, 2)
        inside = np.zeros((CANVAS, CANVAS), dtype=bool)
        inside[top : top + DIGIT_SIDE, left : left + DIGIT_SIDE] = np.asarray(gray) > 255 * INK_THRESHOLD
        drawn.append(inside)
    return drawn


def write_outlines(folder: Path) -> None:
    """Write pairs: A holds the outlines of digits, B the digits filled with a gradient from orange to blue, 32 x 32 pixels."""
    import numpy as np
    from PIL import Image

    (folder / "A").mkdir()
    (folder / "B").mkdir()
    gradient = np.linspace((255, 150, 40), (40, 110, 255), CANVAS)[:, None]  # S 1 3
    for i, inside in enumerate(draw_digits()):
        moved = [np.roll(inside, step, axis) for axis in (0, 1) for step in (-1, 1)]
        outline = inside & ~np.logical_and.reduce(moved)
        Image.fromarray(np.where(outline, 0, 255).astype("uint8")).save(folder / "A" / f"{i:04d}.png")
        filled = np.where(inside[..., None], gradient, (24.0, 24.0, 32.0))
        Image.fromarray(filled.round().astype("uint8")).save(folder / "B" / f"{i:04d}.png")


def write_inks(folder: Path) -> None:
    """Write two domains without pairs, 32 x 32 pixels: digits in chalk on a green board, and other digits in ink on paper."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(1)
    colors = {"chalk": ((38, 70, 54), (236, 236, 226)), "ink": ((244, 236, 214), (30, 44, 120))}  # ground and stroke
    for name in colors:
        (folder / name).mkdir()
    for i, inside in enumerate(draw_digits()):
        name = ("chalk", "ink")[i % 2]
        ground, stroke = colors[name]
        image = np.where(inside[..., None], stroke, ground) + rng.normal(0, 4, (CANVAS, CANVAS, 3))
        Image.fromarray(image.round().clip(0, 255).astype("uint8")).save(folder / name / f"{i:04d}.png")


def build_table_writer(loader: str, target: str) -> Callable[[Path], None]:
    """Return a generator that writes a classification data set of scikit-learn as CSV, with class names as targets."""

    def make(folder: Path) -> None:
        import sklearn.datasets

        data = getattr(sklearn.datasets, loader)()
        rows = ([*(f"{v:g}" for v in x), str(data.target_names[y])] for x, y in zip(data.data, data.target))
        write_csv(folder / "data.csv", [*(column_name(n) for n in data.feature_names), target], rows)

    return make


def write_diabetes(folder: Path) -> None:
    """Write scikit-learn's diabetes data set as CSV."""
    from sklearn.datasets import load_diabetes

    names = (
        "age",
        "sex",
        "bmi",
        "blood_pressure",
        "cholesterol",
        "ldl",
        "hdl",
        "cholesterol_hdl_ratio",
        "log_triglycerides",
        "blood_sugar",
    )
    data = load_diabetes(scaled=False)
    rows = ([*(f"{v:.10g}" for v in x), f"{y:g}"] for x, y in zip(data.data, data.target))
    write_csv(folder / "data.csv", [*names, "progression"], rows)


def column_name(name: str) -> str:
    """Return a feature name as an identifier."""
    return name.replace(" (cm)", "_cm").replace(" ", "_").replace("/", "_")

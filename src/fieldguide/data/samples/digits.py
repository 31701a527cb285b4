"""Samples from scikit-learn's data sets: tables, and handwritten digits as images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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

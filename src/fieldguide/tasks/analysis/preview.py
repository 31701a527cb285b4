"""A look at the data: the distribution of the target, and a few examples."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.numbers import format_plain
from fieldguide.core.report_elements import Bars, Gallery, Picture, Quote, Quotes, ReportElement, Sound, Sounds, Table
from fieldguide.data.dataset import Column, Data
from fieldguide.data.media import images
from fieldguide.data.preprocessing.image_transform import learn_scale
from fieldguide.data.text_values import count_values

SHOWN_IMAGES, SHOWN_TEXTS, SHOWN_ROWS, SHOWN_SOUNDS = 12, 4, 6, 4
SHOWN_COLUMNS = 12  # of a table
THUMBNAIL_SIDE = 192  # pixels
HISTOGRAM_BINS = 15
MAX_BARS = 12  # classes that are counted one by one
MAX_CELL_CHARACTERS, MAX_TEXT_CHARACTERS = 80, 600
MAX_SOUND_BYTES = 300_000  # of a recording that is shown
READ_ROLES = ("feature", "target", "user", "item", "rating", "time", "series")


def build_preview(training: Data, columns: Sequence[Column]) -> list[ReportElement]:
    """Return the distribution of the target in the training rows, and some random ones of them."""
    columns = [c for c in columns if c.role in READ_ROLES and c.name in training.rows.columns]
    return [*build_distribution(training, columns), *show_examples(training, columns)]


# The target


def build_distribution(training: Data, columns: Sequence[Column]) -> list[ReportElement]:
    """Return bars of the values of the target, or a histogram of numbers; nothing for other targets, such as texts."""
    target = next((c for c in columns if c.role == "target"), None)
    if target is None:
        return []
    values = training.rows[target.name]
    title, note = f"Distribution of {target.name}", f"Of the {len(training):,} training examples."
    if target.kind == "number" and values.n_unique() > MAX_BARS:
        numbers = values.cast(pl.Float64).drop_nulls().drop_nans().to_numpy()
        counts, edges = np.histogram(numbers, bins=HISTOGRAM_BINS)
        names = [f"{format_plain(a)} to {format_plain(b)}" for a, b in pairwise(edges)]
        return [Bars(title, note, {name: int(n) for name, n in zip(names, counts)})]
    if target.kind == "boxes":
        values, note = values.explode().struct.field("label"), f"Boxes in the {len(training):,} training examples."
    elif values.dtype == pl.List(pl.String):
        values = values.explode()
    elif target.kind not in ("category", "boolean", "identifier", "number", "constant"):
        return []
    names, sizes = count_values(values.drop_nulls().cast(pl.String))
    if not names:
        return []
    bars: dict[str, float] = dict(zip(names[:MAX_BARS], sizes[:MAX_BARS]))
    if len(names) > MAX_BARS:
        bars[f"{len(names) - MAX_BARS:,} others"] = sum(sizes[MAX_BARS:])
    return [Bars(title, note, bars)]


# Examples


def show_examples(training: Data, columns: Sequence[Column]) -> list[ReportElement]:
    """Return a few random training rows: as images, recordings or texts if they have one, else as a table."""
    chosen = np.random.default_rng(0).permutation(len(training))[:SHOWN_IMAGES]
    inputs = [c for c in columns if c.role != "target"]
    for column in inputs:
        if column.kind not in ("image", "audio") and not (column.kind in ("text", "messages") and len(inputs) == 1):
            continue
        others = [c for c in columns if c.name != column.name]
        captions = [describe_cells(training, row, others) for row in chosen]
        cells = [training.rows[column.name][int(row)] for row in chosen]
        if column.kind == "image":
            pictures = [Picture(image, text) for image, text in zip(read_thumbnails(training, cells), captions) if image]
            return [Gallery("Examples", "Random training examples.", pictures)] if pictures else []
        if column.kind == "audio":
            sounds = [Sound(content, text) for path, text in zip(cells, captions) if (content := read_sound(path))]
            return [Sounds("Examples", "Random training examples.", sounds[:SHOWN_SOUNDS])] if sounds else []
        quotes = [Quote(describe_cell(cell, MAX_TEXT_CHARACTERS), text) for cell, text in zip(cells, captions)]
        return [Quotes("Examples", "Random training examples.", quotes[:SHOWN_TEXTS])]
    shown = [c.name for c in columns][:SHOWN_COLUMNS]
    if not shown:
        return []
    left_out = f" The first {SHOWN_COLUMNS} of {len(columns)} columns." if len(columns) > SHOWN_COLUMNS else ""
    rows = [[to_cell(training.rows[name][int(row)]) for name in shown] for row in chosen[:SHOWN_ROWS]]
    return [Table("Examples", f"Random training rows.{left_out}", shown, rows)]


def describe_cells(data: Data, row: int, columns: Sequence[Column]) -> str:
    """Return the other cells of a row as a caption."""
    cells = [(c.name, data.rows[c.name][int(row)]) for c in columns if c.kind not in ("mask", "image", "video", "audio")]
    return " · ".join(f"{name}: {describe_cell(value, MAX_CELL_CHARACTERS)}" for name, value in cells if value is not None)


def describe_cell(value: Any, most: int) -> str:
    """Return a cell as text: boxes as counts of their classes, conversations as their turns."""
    if isinstance(value, pl.Series):
        value = value.to_list()
    if isinstance(value, list) and value and isinstance(value[0], dict):
        if "content" in value[0]:
            text = "\n".join(f"{turn.get('role', '')}: {turn['content']}" for turn in value)
        else:
            labels = [str(each.get("label", each.get("text", ""))) for each in value]
            counts = {label: labels.count(label) for label in labels}
            text = ", ".join(f"{count} {label}" if count > 1 else label for label, count in counts.items())
    elif isinstance(value, list):
        text = " ".join(map(str, value))
    else:
        text = format_plain(value) if isinstance(value, float) else str(value)
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def to_cell(value: Any) -> Any:
    """Return a cell for a table of the report: numbers as they are."""
    return value if value is None or isinstance(value, int | float) else describe_cell(value, MAX_CELL_CHARACTERS)


def read_thumbnails(data: Data, paths: Sequence[str]) -> list[bytes | None]:
    """Return small images of files; None for those that cannot be read any more."""
    scale = learn_scale(data.rows)
    found: list[bytes | None] = []
    for path in paths:
        try:
            with images.suppress_warnings(), images.open_image(path) as image:
                image.draft("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE))
                small = images.convert_mode(image, "RGB", scale).copy()
        except images.DECODE_ERRORS:
            found.append(None)
            continue
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        out = io.BytesIO()
        small.save(out, "PNG" if max(small.size) <= 64 else "JPEG", quality=85)
        found.append(out.getvalue())
    return found


def read_sound(path: str) -> bytes | None:
    """Return a recording as it is, if it is small."""
    file = Path(path)
    return file.read_bytes() if file.exists() and file.stat().st_size <= MAX_SOUND_BYTES else None

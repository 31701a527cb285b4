"""Images with several captions each, converted to one row per caption.

Read are: a column of lists of texts, in Parquet or JSON Lines or written as JSON in a CSV; a column of lists of objects, or an
object of lists, with the text in `raw`, `caption`, `sentence` or `text` (COCO, Flickr30k); and numbered columns such as `caption_0`
to `caption_4` (Flickr8k).
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

import polars as pl
from polars import selectors

from fieldguide.data.column_spec import CAPTION_NAMES, normalize_name
from fieldguide.data.dataset import BOOKKEEPING, Finding, Kind
from fieldguide.data.text_values import IMAGE_FILE_PATTERN

TEXT_FIELDS = ("raw", "caption", "sentence", "text")  # fields of an object that hold its text, most likely first
LIST_NAMES = (*CAPTION_NAMES, "sentences", "raw", "text", "texts", "description", "descriptions")
NUMBERED = re.compile(r"(.*?)[_ .-]?\d+")
SAMPLED_ROWS = 200
MIN_MATCHED_FRACTION = 0.9  # minimum fraction of sampled values that are lists of texts, or names of images
TEXTS = pl.List(pl.String)


def find_image_column(rows: pl.DataFrame, kinds: dict[str, Kind]) -> str | None:
    """Return the first column with images, or None."""
    texts = [n for n, dtype in rows.schema.items() if dtype == pl.String and n not in BOOKKEEPING]
    sampled = selectors.by_name(*texts).drop_nulls().head(SAMPLED_ROWS).str.contains(IMAGE_FILE_PATTERN).mean()
    shares = rows.select(sampled).row(0, named=True) if texts else {}  # all columns at once: single rows are predicted as well
    return next((n for n in rows.columns if kinds.get(n) == "image" or (shares.get(n) or 0) >= MIN_MATCHED_FRACTION), None)


def find_caption_lists(rows: pl.DataFrame, kinds: dict[str, Kind], target: str | None) -> tuple[str, pl.Series] | None:
    """Return the name and the lists of the captions of a table with images, or None if it has no such lists.

    A column other than `target` must have a usual name of captions.
    """
    names = [n for n in rows.columns if n not in BOOKKEEPING and n not in kinds and is_named(n, target)]
    if not names or find_image_column(rows, kinds) is None:
        return None
    for name in [target] if target in names else names:
        lists = to_lists(rows[name]) if NUMBERED.fullmatch(name) is None else None
        if lists is not None:
            return name.partition(".")[0], lists
    found = find_numbered(rows, names)
    return found if found and target in (None, found[0]) else None


def is_named(name: str, target: str | None) -> bool:
    """Return whether a column may hold captions: the target, one with a usual name, or one of several numbered ones."""
    stem = match[1] if (match := NUMBERED.fullmatch(name)) else name.partition(".")[0]
    return name == target or normalize_name(stem) in LIST_NAMES


def to_lists(values: pl.Series) -> pl.Series | None:
    """Return a column as lists of texts, or None if it holds something else."""
    kind = values.dtype
    if isinstance(kind, pl.List | pl.Array):
        if isinstance(kind.inner, pl.Struct):
            fields = {f.name: f.dtype for f in kind.inner.fields}
            field = next((f for f in TEXT_FIELDS if fields.get(f) == pl.String), None)
            return values.list.eval(pl.element().struct.field(field)) if field else None
        return values.cast(TEXTS) if kind.inner == pl.String else None
    if kind != pl.String:
        return None
    some = values.drop_nulls().head(SAMPLED_ROWS)
    written = sum(parse_list(v) is not None for v in some)
    if not some.len() or written < MIN_MATCHED_FRACTION * some.len():
        return None
    return pl.Series(values.name, [parse_list(v) or [v] if v is not None else None for v in values], dtype=TEXTS)


def parse_list(text: str) -> list[str] | None:
    """Return the texts of a list written as JSON or as a Python literal, or None."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            found: Any = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and found and all(isinstance(v, str) for v in found):
            return found
    return None


def find_numbered(rows: pl.DataFrame, names: list[str]) -> tuple[str, pl.Series] | None:
    """Return the lists of captions in columns such as caption_0, caption_1, ..., or None."""
    stems: dict[str, list[str]] = {}
    for name in names:
        if rows.schema[name] == pl.String and (match := NUMBERED.fullmatch(name)):
            stems.setdefault(match[1], []).append(name)
    for stem, columns in stems.items():
        if len(columns) > 1 and normalize_name(stem) in LIST_NAMES and stem not in rows.columns:
            return stem, rows.select(pl.concat_list(columns).alias(stem)).to_series()
    return None


def explode(rows: pl.DataFrame, name: str, lists: pl.Series) -> tuple[pl.DataFrame, pl.Series]:
    """Return one row per caption, and the number of the former row of each. Empty texts are dropped; a row without text stays."""
    kept = lists.list.eval(pl.element().filter(pl.element().str.strip_chars().str.len_chars() > 0))
    kept = pl.select(pl.when(kept.list.len() == 0).then(None).otherwise(kept)).to_series().alias(name)
    old = [c for c in rows.columns if c.partition(".")[0] == name or ((m := NUMBERED.fullmatch(c)) and m[1] == name)]
    place = rows.columns.index(old[0])
    number = "row of the list"
    rows = rows.drop(old).insert_column(place, kept).with_row_index(number).explode(name)
    return rows.drop(number), rows[number]


def describe_lists(name: str, before: int, after: int) -> Finding:
    """Return the note that lists of captions became rows."""
    what = f"{name!r} holds several captions of an image: the {before:,} rows become {after:,}, one for each caption"
    return Finding("caption-lists", "note", what, (f"column {name!r}",), 1)

"""Duplicates: detection of rows with equal inputs, which are reported and kept in the same split."""

from __future__ import annotations

import numpy as np
import polars as pl

from fieldguide.data.dataset import HASH, Data, Kind

MEDIA: tuple[Kind, ...] = ("image", "audio", "video")


def same_inputs(data: Data) -> np.ndarray | None:
    """Return a number per row that is equal for rows with equal features; None if there is nothing to compare.

    Images, recordings and videos are compared by content, texts ignoring case and whitespace.
    """
    parts = []
    for column in data.features():
        if column.kind in MEDIA or column.name not in data.rows.columns:  # rows that are windows of series have no such columns
            continue
        values = data.rows[column.name]
        if values.dtype.is_nested():
            values = pl.Series(column.name, [str(v) for v in values.to_list()])
        if column.kind == "text":
            values = values.str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
        parts.append(values)
    if HASH in data.rows.columns and data.features(*MEDIA):
        parts.append(data.rows[HASH])
    return number_rows(pl.DataFrame(parts)) if parts else None


def number_rows(rows: pl.DataFrame) -> np.ndarray:
    """Return numbers from 0 that are equal for equal rows, by a 64-bit hash of each row."""
    return np.unique(rows.hash_rows(seed=0).to_numpy(), return_inverse=True)[1]

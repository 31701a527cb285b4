"""Duplicates: which rows have equal inputs. Splits keep them on one side; the doctor reports them."""

from __future__ import annotations

import numpy as np
import polars as pl

from fieldguide.data.dataset import HASH, Data

MEDIA = ("image", "audio", "video")


def same_inputs(data: Data) -> np.ndarray | None:
    """A number for each row, equal for rows with equal features; None if there is nothing to compare.

    Pictures and recordings are compared by their content, texts without regard to case and blanks.
    """
    parts = []
    for column in data.features():
        if column.kind in MEDIA:
            continue
        values = data.rows[column.name]
        if values.dtype.is_nested():
            values = pl.Series(column.name, [str(v) for v in values.to_list()])
        if column.kind == "text":
            values = values.str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
        parts.append(values)
    if HASH in data.rows.columns and data.features(*MEDIA):
        parts.append(data.rows[HASH])
    return dense(pl.DataFrame(parts)) if parts else None


def dense(rows: pl.DataFrame) -> np.ndarray:
    """Numbers from 0, equal for equal rows, by a 64-bit hash of each row."""
    return np.unique(rows.hash_rows(seed=0).to_numpy(), return_inverse=True)[1]

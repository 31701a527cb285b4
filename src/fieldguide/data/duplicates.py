"""Duplicates: which rows have equal inputs. Splits keep them on one side; the doctor reports them."""

from __future__ import annotations

import numpy as np
import polars as pl

from fieldguide.data.dataset import HASH, Data


def same_inputs(data: Data) -> np.ndarray | None:
    """A number for each row, equal for rows with equal features; None if there is nothing to compare.

    Pictures are compared by their pixels, texts without regard to case and blanks.
    """
    parts = []
    for column in data.features():
        if column.kind == "image":
            continue
        values = data.rows[column.name]
        if column.kind == "text":
            values = values.str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
        parts.append(values)
    if HASH in data.rows.columns and data.features("image"):
        parts.append(data.rows[HASH])
    return dense(pl.DataFrame(parts)) if parts else None


def dense(rows: pl.DataFrame) -> np.ndarray:
    """Numbers from 0, equal for equal rows, by a 64-bit hash of each row."""
    return np.unique(rows.hash_rows(seed=0).to_numpy(), return_inverse=True)[1]

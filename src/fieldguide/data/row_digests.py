"""Digests of rows by content, with which evaluation recognizes rows that were used in training, in any file and order."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl

from fieldguide.core.archives import read_arrays
from fieldguide.core.errors import RunError
from fieldguide.core.validation import guard
from fieldguide.data.dataset import HASH, Column, Data

FILE_NAME = "row_digests.npz"
MEDIA = ("image", "audio", "video")
MIN_DISTINCT_FRACTION = 0.5  # of rows that differ from all others; below, equal rows are expected by chance
MIN_COPIED_FRACTION = 0.9  # of the training rows that data must contain to be a copy of them


def compute_digests(data: Data, columns: list[Column]) -> np.ndarray | None:
    """Return a 64-bit digest of the inputs and targets of each row, N uint64; None if no column can be compared.

    Images, recordings and videos are compared by the content of their files.
    """
    parts: list[pl.Series] = []
    has_inputs = False
    for column in columns:
        if column.role not in ("feature", "target") or column.name not in data.rows.columns:
            continue
        values = data.rows[column.name]
        if column.kind in MEDIA:
            if HASH not in data.rows.columns:
                continue
            values = data.rows[HASH]
        elif values.dtype.is_nested() or values.dtype == pl.Object:
            values = pl.Series(column.name, [str(v) for v in values.to_list()], dtype=pl.String)
        elif column.kind == "number":
            values = values.cast(pl.Float64, strict=False)  # whole numbers may be stored as either type
        parts.append(values.cast(pl.String).fill_null("\x00").alias(str(len(parts))))
        has_inputs |= column.role == "feature"
    if not has_inputs or not len(data):  # equal targets alone do not make equal rows
        return None
    joined = pl.DataFrame(parts).select(pl.concat_str(pl.all(), separator="\x1f")).to_series()
    digest = lambda text: int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )
    return np.fromiter(map(digest, joined), dtype=np.uint64, count=len(joined))


def save_digests(folder: Path, digests: np.ndarray) -> None:
    """Write the digests of the rows that were used for training and model selection."""
    np.savez_compressed(folder / FILE_NAME, used=np.sort(digests))


def find_used(folder: Path, digests: np.ndarray | None) -> tuple[np.ndarray, bool]:
    """Return which rows were used in training (N bool), and whether that is certain.

    Each row of the training data explains one equal row. If most training rows are distinct, an equal row is the same row.
    Otherwise equal rows are expected by chance, and rows count as used only if nearly all training rows occur in the data.
    """
    nothing = np.zeros(0 if digests is None else len(digests), dtype=bool)
    if digests is None or not (folder / FILE_NAME).is_file():
        return nothing, True
    with guard(folder / FILE_NAME, RunError, "Restore the file from a copy."):
        used = read_arrays(folder / FILE_NAME)["used"]
    left = Counter(used.tolist())
    found = nothing.copy()
    for i in np.flatnonzero(np.isin(digests, used)):
        key = int(digests[i])
        if left[key]:
            left[key] -= 1
            found[i] = True
    is_distinct = len(np.unique(used)) >= MIN_DISTINCT_FRACTION * len(used)
    return found, is_distinct or found.sum() >= MIN_COPIED_FRACTION * len(used)

"""Numbers that stand for missing values, such as -999, found as values that recur far outside of all others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fieldguide.data.dataset import Data, Finding
from fieldguide.data.validation.findings import places

MIN_RECURRENCE = 3  # minimum number of cells with such a value
MAX_FRACTION = 0.5  # maximum fraction of cells with it
MIN_OTHERS = 5  # minimum number of distinct other values
MIN_DISTANCE = 2.0  # minimum distance to all other values, in units of their range


def check_sentinels(data: Data) -> Iterator[Finding]:
    """Report numeric columns with a value that recurs far outside of all others."""
    for column in data.columns.values():
        if column.kind != "number" or column.role == "ignored" or column.name not in data.rows.columns:
            continue
        values = data.rows[column.name].cast(float).to_numpy()
        if (value := find_sentinel(values[np.isfinite(values)])) is None:
            continue
        rows = values == value
        rest = values[np.isfinite(values) & ~rows]
        yield Finding(
            "sentinel",
            "warning",
            f"column {column.name!r} holds {value:.15g} in {int(rows.sum()):,} rows, and otherwise {rest.min():.15g} to "
            f"{rest.max():.15g}",
            places(data, rows),
            1,
            "If it stands for a missing value, leave these cells empty.",
        )


def find_sentinel(values: np.ndarray) -> float | None:
    """Return the smallest or largest value if it recurs far outside of all others, else None.

    Numbers of nines, such as -999, need less distance, and none if all others are positive.
    """
    if len(values) < MIN_OTHERS or values.min() == values.max():
        return None
    for value in (float(values.min()), float(values.max())):
        rest = values[values != value]
        count = len(values) - len(rest)
        if count < MIN_RECURRENCE or count > MAX_FRACTION * len(values) or len(np.unique(rest)) < MIN_OTHERS or value == 0:
            continue
        distance = rest.min() - value if value < rest.min() else value - rest.max()
        nines = str(int(abs(value))).strip("9") == "" and abs(value) >= 9
        if distance > (MIN_DISTANCE / 4 if nines else MIN_DISTANCE) * np.ptp(rest) or (nines and value < 0 <= rest.min()):
            return value
    return None

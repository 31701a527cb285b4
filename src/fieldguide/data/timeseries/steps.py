"""Steps of series as examples: a table with a time column, sorted by series and time, with the values before each step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import Column, Data, Finding
from fieldguide.data.former_formats import as_numbers
from fieldguide.data.validation.findings import places

STEP = "#step"  # column of an example: the number of its step
TRAIN_FRACTION, VALIDATION_FRACTION = 0.6, 0.2  # of the steps of each series; the rest is the test


@dataclass
class Steps:
    """Series one after the other: N steps, C channels; `begin` is the first step of the series of each step."""

    values: np.ndarray  # N C float64, NaN where missing
    begin: np.ndarray  # N
    channels: list[str]
    names: list[str]  # N, the series of each step; "" if there is only one
    times: list[Any]  # N
    columns: dict[str, Column] = field(default_factory=dict)  # of the table

    def cut(self, steps: np.ndarray, length: int, filled: np.ndarray) -> np.ndarray:  # B -> B length C
        """Return the last `length` rows of `filled` until each step; before its start, a series repeats its first value."""
        at = steps[:, None] + np.arange(1 - length, 1)
        return filled[np.maximum(at, self.begin[steps][:, None])]

    def fill(self, values: np.ndarray) -> np.ndarray:  # N C -> N C
        """Return values whose missing ones are the last before them in the series; leading ones are 0."""
        at = np.arange(len(values))[:, None]
        last = np.maximum.accumulate(np.where(np.isfinite(values), at, -1), 0)
        known = last >= self.begin[:, None]
        return np.where(known, np.take_along_axis(values, np.maximum(last, 0), 0), 0.0)


def find_channels(data: Data) -> list[str]:
    """Return the numeric feature columns."""
    return [c.name for c in data.features("number", "boolean") if c.name in data.rows.columns]


def check(data: Data) -> Iterator[Finding]:
    """Report repeated times in a series, which would make the order of steps arbitrary."""
    if not data.columns_with_role("time"):
        return
    keys = [c.name for c in (*data.columns_with_role("series"), *data.columns_with_role("time")) if c.name in data.rows.columns]
    again = ~data.rows.select(pl.struct(keys).is_first_distinct()).to_series().to_numpy()
    if again.any():
        rows = np.flatnonzero(again)
        yield Finding(
            "repeated-step",
            "error",
            "rows with a repeated time in a series",
            places(data, rows),
            len(rows),
            "Correct them. If they belong to several series, name the column that tells them apart: --set role.series=COLUMN.",
        )


def build_steps(data: Data) -> Data:
    """Return the data with one row per step, sorted by series and time, and split by time unless the source has splits.

    Raises `DataError` if there is no numeric column or a time is missing.
    """
    channels = find_channels(data)
    if not channels:
        raise DataError(
            f"{data.source}: there is no numeric column to watch. Besides the time, a table of series needs numbers."
        )
    time = data.columns_with_role("time")[0].name
    names = [c.name for c in data.columns_with_role("series") if c.name in data.rows.columns]
    moments = data.rows[time]
    if moments.dtype == pl.String:
        numbers = as_numbers(moments)
        moments = numbers if numbers.null_count() == moments.null_count() else moments.rank("dense")
    if moments.null_count():
        first = data.locate_row(int(np.flatnonzero(moments.is_null().to_numpy())[0]))
        raise DataError(
            f"{data.source}: {moments.null_count():,} rows have no time, first {first}. Fill it in, or remove them."
        )
    ids = (
        data.rows.select(pl.concat_str([pl.col(n).cast(pl.String).fill_null("") for n in names], separator=", ")).to_series()
        if names
        else pl.Series([""] * len(data))
    )
    codes = ids.rank("dense").to_numpy().astype(np.int64)
    order = np.lexsort((moments.to_physical().cast(pl.Float64).to_numpy(), codes))
    rows = data.rows[order]
    codes = codes[order]
    first = np.r_[True, np.diff(codes) != 0]
    begin = np.maximum.accumulate(np.where(first, np.arange(len(codes)), 0))
    values = rows.select(pl.col(channels).cast(pl.Float64)).fill_null(np.nan).to_numpy().astype(float)
    context = Steps(values, begin, channels, ids.gather(order).to_list(), rows[time].to_list(), data.columns)
    splits, about = None if data.splits is None else data.splits[order], data.split_description
    if splits is None:
        end = np.r_[np.flatnonzero(first)[1:], len(codes)][np.cumsum(first) - 1]
        place = (np.arange(len(codes)) - begin) / (end - begin)
        splits = np.where(
            place < TRAIN_FRACTION, "train", np.where(place < TRAIN_FRACTION + VALIDATION_FRACTION, "val", "test")
        ).astype(object)
        shares = f"the first {TRAIN_FRACTION:.0%} of each series, then {VALIDATION_FRACTION:.0%} for validation"
        about = f"by time: {shares}, the rest is the test"
    columns = {name: replace(c, role="ignored") if c.role == "time" else c for name, c in data.columns.items()}
    rows = rows.with_columns(pl.Series(STEP, np.arange(len(rows))))
    return replace(data, rows=rows, columns=columns, context=context, splits=splits, split_description=about, inputs=None)

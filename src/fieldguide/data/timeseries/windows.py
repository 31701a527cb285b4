"""Windows: cutting series into a past that the model reads and a future that it predicts, without look-ahead.

An example is a pair (series, cut): the model reads `length` steps before the cut and predicts `horizon` steps from it on.
The splits are consecutive periods: the futures of training windows end before validation begins, those of validation
before the test. The past of a window may extend into the previous split, as it does in practice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError, SettingsError
from fieldguide.data.dataset import FILE, LINE, Data, Finding
from fieldguide.data.timeseries.frequency import default_horizon, estimate_season
from fieldguide.data.timeseries.panel import Panel, build_panel
from fieldguide.data.validation.findings import MAX_SHOWN_PLACES

SERIES, CUT = "#series", "#cut"
MIN_MANY_SERIES = 30  # with at least this many series, the last horizon of each is the test and the one before it validation
TEST_FRACTION, VALIDATION_FRACTION = 0.2, 0.1  # fractions of each series if there are fewer
INPUT_HORIZONS = 4  # default input length in horizons
MIN_DEFAULT_HORIZONS = (
    4  # of a series, so that training, validation and test have some; a horizon that the user sets may be longer
)
MAX_WINDOWS = {"train": 2_000_000, "val": 4_000, "test": 40_000}  # maximum windows per split; beyond that every n-th is used


@dataclass
class Windows:
    """The data that windows refer to: all series, the resolved options, and where the splits end (absolute steps of the
    panel, U each)."""

    panel: Panel
    table: pl.DataFrame
    options: Any
    train_end: np.ndarray
    val_end: np.ndarray
    test_end: np.ndarray


def resolve_options(found: Panel, options: Any) -> Any:
    """Return the options with season, horizon and length filled in. Raises SettingsError for values below 1."""
    season = options.season or found.frequency.season or estimate_season([found.series_values(i) for i in range(len(found))])
    typical = float(np.median(found.high - found.low))
    most = max(1, int(typical / MIN_DEFAULT_HORIZONS))
    horizon = options.horizon or min(default_horizon(found.frequency, season), most)
    length = options.length
    if length is None:
        length = max(INPUT_HORIZONS * horizon, 2 * season if 2 * season <= typical / 4 else 0)
        length = -(-length // season) * season if season <= length else length
        length = max(2, min(length, int(typical - 2 * horizon) // 2))
    for name, value in (("season", season), ("horizon", horizon), ("length", length)):
        if value < 1:
            raise SettingsError(f"task.{name}={value} must be at least 1.")
    return replace(options, season=season, horizon=horizon, length=length)


def build_windows(data: Data, options: Any) -> Data:
    """Return one row per window of every split. Raises DataError if a split has no windows."""
    found = build_panel(data)
    options = resolve_options(found, options)
    ends = read_ends(data, found, options) if data.splits is not None else choose_ends(found, options)
    windows = Windows(found, data.rows, options, *ends)
    least = min(options.length, max(2, min(options.season, options.horizon)))  # minimum steps of the past
    short = found.low + least + options.horizon > windows.train_end
    if short.all():
        longest = int((found.high - found.low).max())
        raise DataError(
            f"{data.source}: the longest of {len(found):,} series has {longest:,} steps, too few to train with a horizon "
            f"of {options.horizon} and keep steps for validation and test. Provide longer series, or "
            "lower task.horizon (and task.test, task.validation)."
        )
    findings = [f for f in data.findings if f.check != "short-series"]
    if short.any():
        names = [repr(found.names[i]) for i in np.flatnonzero(short)[:MAX_SHOWN_PLACES]]
        findings.append(
            Finding(
                "short-series",
                "warning",
                f"series too short to train on with a horizon of {options.horizon} steps in addition to validation and test",
                tuple(names),
                int(short.sum()),
                "Provide longer series, or lower task.horizon.",
            )
        )
    parts, counts = [], []
    begins = {"train": found.low, "val": windows.train_end, "test": windows.val_end}
    stops = {"train": windows.train_end, "val": windows.val_end, "test": windows.test_end}
    for name, most in MAX_WINDOWS.items():
        first, last = begins[name], stops[name] - options.horizon
        if name == "train":  # only full pasts, except in short series, where half of the steps are enough
            first = first + np.minimum(options.length, np.maximum(least, (last - first) // 2))
            last = np.where(short, 0, last)
        series, at, stride = find_cuts(windows, np.maximum(first, found.low + least), last, most)
        if not len(at):
            raise DataError(
                f"{data.source}: no windows for {name}: none has a known value both in its past and in the "
                f"{options.horizon} steps of its future. Lower task.horizon, or assign more steps to that split."
            )
        parts.append((name, series, at))
        counts.append(f"{name} {len(at):,}" + (f" (every {stride}th)" if stride > 1 else ""))
    series, at = (np.concatenate([p[i] for p in parts]) for i in (1, 2))
    made = window_rows(data, windows, series, at)
    made.findings = findings
    made.splits = np.repeat(np.array([p[0] for p in parts], dtype=object), [len(p[1]) for p in parts])
    made.split_description = f"by time, {describe_splits(windows)}; windows: {', '.join(counts)}"
    return made


def windows_at_end(data: Data, found: Panel, options: Any) -> Data:
    """Return one window at the end of every series, for prediction."""
    windows = Windows(found, data.rows, options, found.high, found.high, found.high)
    return window_rows(data, windows, np.arange(len(found)), found.high)


def all_windows(data: Data, found: Panel, options: Any) -> Data:
    """Return windows at every step of series for evaluation, or at every n-th if there are too many.

    Raises DataError if no series has a complete future and some past.
    """
    windows = Windows(found, data.rows, options, found.high, found.high, found.high)
    first = found.low + np.minimum(options.length, np.maximum(1, (found.high - found.low - options.horizon) // 2))
    series, at, _ = find_cuts(windows, first, found.high - options.horizon, MAX_WINDOWS["test"])
    if not len(at):
        raise DataError(f"{data.source}: no series has {options.horizon} known steps (the horizon) after some past steps.")
    return window_rows(data, windows, series, at)


def find_cuts(windows: Windows, first: np.ndarray, last: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return (series, cut, n) of the windows from `first` to `last` of each series.

    Every n-th window, counted back from the last, is used so that there are at most about `most`. Windows without a known
    value in their past or their future are dropped.
    """
    found, options = windows.panel, windows.options
    stride = max(1, -(-int(np.maximum(last - first + 1, 0).sum()) // most))
    cuts = [np.arange(b, a - 1, -stride)[::-1] for a, b in zip(first, last)]
    series = np.repeat(np.arange(len(found)), [len(c) for c in cuts])
    at, column = np.concatenate(cuts), found.column[series]
    seen = np.concatenate([np.zeros((1, len(found.columns)), dtype=int), found.observed.cumsum(0)])
    past = seen[at, column] - seen[np.maximum(at - options.length, found.low[series]), column]
    future = seen[at + options.horizon, column] - seen[at, column]
    keep = (past > 0) & (future > 0)
    return series[keep], at[keep], stride


def window_rows(data: Data, windows: Windows, series: np.ndarray, at: np.ndarray) -> Data:
    """Return windows as rows; the location of each is the first step of its future, else the last of its past."""
    row, end = windows.panel.row, windows.panel.start[windows.panel.group[series] + 1]
    source = np.where((at < end) & (row[np.minimum(at, len(row) - 1)] >= 0), row[np.minimum(at, len(row) - 1)], row[at - 1])
    source = np.where(source >= 0, source, row[windows.panel.low[series]])
    table = data.rows.select(c for c in (FILE, LINE) if c in data.rows.columns)[source]
    table = table.with_columns(pl.Series(SERIES, series), pl.Series(CUT, at))
    return Data(data.source, table, data.columns, data.manifest, data.findings, None, windows)


def choose_ends(found: Panel, options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ends of training, validation and test of every series.

    Counted from the end of the series, or from the start if the number of training steps is specified. Raises
    SettingsError if a part is shorter than the horizon or the parts exceed a series.
    """
    many, size = len(found) >= MIN_MANY_SERIES, found.high - found.low

    def steps(value: float | None, share: float) -> np.ndarray:
        if value is None and many:
            return np.full(len(found), options.horizon)
        if value is None:
            return np.maximum(np.round(share * size), options.horizon).astype(int)
        return np.round(value * size).astype(int) if value < 1 else np.full(len(found), int(value))

    test, validation = steps(options.test, TEST_FRACTION), steps(options.validation, VALIDATION_FRACTION)
    for name, part in (("test", test), ("validation", validation)):
        if (part < options.horizon).any():
            raise SettingsError(f"task.{name} has {int(part.min())} steps, fewer than the horizon of {options.horizon}.")
    if options.train is None:
        return found.high - test - validation, found.high - test, found.high
    train = found.low + steps(options.train, 0)
    if (train + validation + test > found.high).any():
        raise SettingsError(
            f"task.train, task.validation and task.test exceed the {int(size.min()):,} steps of the shortest series."
        )
    return train, train + validation, train + validation + test


def read_ends(data: Data, found: Panel, options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ends of the splits that the source assigns to rows; without validation, the end of training is used.

    Raises DataError if the splits are not consecutive in time.
    """
    codes = np.where(data.splits == "test", 2, np.where(data.splits == "val", 1, 0))
    step = np.where(found.row >= 0, codes[np.maximum(found.row, 0)], -1)
    for start, stop in pairwise(found.start):  # a step without a row belongs to the same split as the one before
        part = step[start:stop]
        step[start:stop] = part[np.maximum.accumulate(np.where(part >= 0, np.arange(len(part)), 0))]
    train, val, test = [], [], []
    for i, (low, high) in enumerate(zip(found.low, found.high)):
        part = step[low:high]
        if (np.diff(part) < 0).any():
            where = low + int(np.argmax(np.diff(part) < 0)) + 1
            raise DataError(
                f"{data.locate_row(int(found.row[where]))}: the splits of the source are not consecutive "
                f"in time: in series {found.names[i]!r}, training rows follow validation or test rows."
            )
        a, b = low + int((part < 1).sum()), low + int((part < 2).sum())
        if a == b and options.horizon < a - low:
            a -= max(options.horizon, round(VALIDATION_FRACTION * (a - low)) if len(found) < MIN_MANY_SERIES else 0)
        if b == high and b - a > 2 * options.horizon:
            b -= (b - a) // 2
        train.append(a)
        val.append(b)
        test.append(high)
    return np.array(train), np.array(val), np.array(test)


def describe_splits(windows: Windows) -> str:
    """Describe the splits: numbers of steps, and the start of the test if all series share it."""
    found = windows.panel
    spans = [
        np.unique(x)
        for x in (windows.train_end - found.low, windows.val_end - windows.train_end, windows.test_end - windows.val_end)
    ]
    words = ", ".join(
        f"{name} {span[0]:,}{f' to {span[-1]:,}' if len(span) > 1 else ''}"
        for name, span in zip(("training", "validation", "test"), spans)
    )
    unused = int((found.high - windows.test_end).sum())
    rest = f", {unused:,} steps after the test unused" if unused else ""
    first = windows.val_end[0]
    alone = len(found.start) == 2 and first < len(found.times)
    since = f", test from {found.frequency.label(found.times[first])} on" if alone else ""
    return f"steps of {'each' if len(found) > 1 else 'the'} series: {words}{since}{rest}"

"""Panels: a table as time series on regular grids, and the data checks for time series.

Three layouts are distinguished by the columns:
    long    a time column and one or more series columns: a row is one time of one series
    wide    no series column: a row is one time, and every target is a series
    rows    no time column, and one column that is distinct in every row: a row is a whole series, in column order

Missing steps are inserted. The model reads the last value before them (never one after, which would leak the future);
they are excluded from training and evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data import column_types, text_values
from fieldguide.data.dataset import Data, Finding, Severity
from fieldguide.data.former_formats import as_numbers, holds_words
from fieldguide.data.number_formats import infer_format
from fieldguide.data.time_zones import LOCAL
from fieldguide.data.timeseries.frequency import (
    DAY,
    MIN_REGULAR_STEPS,
    Frequency,
    are_regular_steps,
    continues,
    infer_frequency,
)
from fieldguide.data.timestamps import infer_dates
from fieldguide.data.validation.findings import MAX_SHOWN_PLACES, places
from fieldguide.data.validation.sentinels import check_sentinels

PLAIN_STEP = Frequency("number", 1.0, "step")
PLAIN_ROLES = ("feature", "target", "ignored")  # of tables whose columns have no role by their names
MIN_STEPS_OF_SEVERAL = 10  # minimum number of steps of each of several series
MIN_REGULAR_SERIES_FRACTION = 0.9  # minimum fraction of series with regular steps for a table to be series
MIN_DISTINCT_FRACTION = 0.9  # minimum fraction of distinct values in a column that names one series per row
STEP_FACTOR = 1.5  # a series has another time step if its median step differs by more than this factor
MIN_STEPS_OF_SERIES = 4  # minimum number of rows of a series for its time step to be compared
MAX_MISSING_FRACTION = 0.5  # maximum fraction of missing steps; with more, the data are events rather than series

FILL_NOTE = "the model reads the last value before them, and they are excluded from training and evaluation"
REPEATED = "rows with a repeated series and time"
FINDINGS: dict[str, tuple[Severity, str, str]] = {  # name: severity, description, remedy
    "layout": (
        "note",
        "read as one series per row: {name!r} is its name, the {columns:,} other columns are its values in "
        "order; there is no time column",
        "",
    ),
    "text-in-series": (
        "error",
        "the column {column!r} holds text, such as {value!r}, but with one series per row all columns except {name!r} are steps",
        "Correct the cells, or ignore the column with --set 'column.{column}=identifier' (in Python: kinds=).",
    ),
    "repeated-series": (
        "error",
        "rows with a repeated {name!r} but no time column: each row must be a whole series, or have a time",
        "Give each series a unique name, or specify the time column with --time, or another column of names with --set role.series=COLUMN.",
    ),
    "no-time": (
        "note",
        "there is no time column: rows are treated as equally spaced steps in order",
        "Specify it with --time.",
    ),
    "frequency": ("note", "the time step is {step}", ""),
    "time-missing": ("warning", "rows without a time", "Fill in the values or remove the rows."),
    "time-backwards": ("note", "rows are in descending order of time; they are sorted", ""),
    "time-order": (
        "warning",
        "timestamps out of order: rows that follow a later time of their series; they are sorted",
        "Check that the times are correct.",
    ),
    "duplicate-time": ("note", REPEATED + " and an equal value; they are dropped", ""),
    "conflicting-time": (
        "warning",
        REPEATED + " but a different value; the first is used",
        "Correct or aggregate them. If they belong to several series, specify the column that identifies "
        "them: --set role.series=COLUMN.",
    ),
    "off-grid": (
        "warning",
        "rows between the time steps of their series, which are {step} apart; they are dropped",
        "Round their times, or resample the data to equal steps.",
    ),
    "missing-steps": ("warning", "time steps without a row: " + FILL_NOTE, "Add them if the values are known."),
    "missing-values": (
        "warning",
        "rows without a value between others of their series: " + FILL_NOTE,
        "Fill them in if the values are known.",
    ),
    "empty-series": ("warning", "series without values: {names}", "Fill them in or remove them."),
    "constant-series": ("note", "series that are constant: {names}", ""),
    "nothing-changes": ("error", "all series are constant", "Check that the columns are correct."),
    "no-target": ("error", "there is no numeric column to forecast", "Specify it with --target."),
    "no-series": ("error", "no row has a series, a time and a value", "Check that the columns are correct."),
    "one-moment": ("error", "no series has two time steps, so there is nothing to forecast", "{hint}"),
    "time-unreadable": (
        "error",
        "the time column {name!r} contains neither dates nor numbers, such as {value!r}",
        "Write dates as 2024-12-31 or 2024-12-31 18:00:00.",
    ),
    "irregular-steps": (
        "error",
        "the times are irregular: with steps of {step}, most rows lie between steps or more than half of the steps are missing",
        "Resample the data to equal steps first: sum or average by hour, day, ... {hint}",
    ),
    "opening-hours": (
        "error",
        "the times are irregular: with steps of {step}, more than half of the steps are missing, because there are rows only from "
        "{first} to {last}{days}",
        "Add a column that numbers the rows of each series, and use it as the time: --time COLUMN. Each row is then one step.",
    ),
    "mixed-steps": (
        "warning",
        "series whose time step differs from that of the others, {step}: {names}",
        "Train on series with the same time step, or resample them.",
    ),
}
UNUSABLE = {"time-missing", "conflicting-time", "off-grid"}


def make_finding(
    data: Data, check_name: str, rows: Any = (), count: int | None = None, shown: Sequence[str] = (), **words: Any
) -> Finding:
    """Return a finding about these rows (a mask or indices), or about the locations in `shown`."""
    severity, what, remedy = FINDINGS[check_name]
    rows = np.asarray(rows)
    rows = np.flatnonzero(rows) if rows.dtype.kind == "b" else rows.astype(int)
    count = count if count is not None else max(len(rows), 1)
    return Finding(
        check_name,
        severity,
        what.format(**words),
        tuple(shown) or places(data, rows.tolist()),
        count,
        remedy.format(**words).strip(),
        count if check_name in UNUSABLE else 0,
    )


@dataclass
class Panel:
    """Many series, concatenated. N steps in total, C columns, G groups (each on its own grid), U series.

    A group of a long table is one id; a wide table is one group. A series is one column of one group.
    """

    layout: str
    frequency: Frequency
    columns: list[str]  # C targets
    values: np.ndarray  # N C float64, NaN where missing
    row: np.ndarray  # N, the table row of each step; -1 for inserted steps
    times: np.ndarray  # N, microseconds since 1970 or plain numbers
    start: np.ndarray  # G + 1, where groups begin
    group: np.ndarray  # U, group of each series
    column: np.ndarray  # U, column of each series
    low: np.ndarray  # U, first step with a value
    high: np.ndarray  # U, one after the last step with a value
    names: list[str]  # U
    findings: list[Finding] = field(default_factory=list)
    filled: np.ndarray = field(init=False)  # N C, forward-filled values
    observed: np.ndarray = field(init=False)  # N C bool

    def __post_init__(self) -> None:
        self.observed = np.isfinite(self.values)
        self.filled = forward_fill(self.values, self.start)

    def __len__(self) -> int:
        return len(self.names)

    def series_values(self, series: int) -> np.ndarray:
        """Return the values of one series from its first to its last."""
        return self.values[self.low[series] : self.high[series], self.column[series]]


def forward_fill(values: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Forward-fill missing values within groups; leading ones get the first value, groups without values 0."""
    at = np.arange(len(values))[:, None]
    begin = np.repeat(start[:-1], np.diff(start))[:, None]
    known = np.isfinite(values)
    last = np.maximum.accumulate(np.where(known, at, -1), 0)
    first = np.minimum.accumulate(np.where(known, at, len(values))[::-1], 0)[::-1]
    source = np.where(last >= begin, last, np.minimum(first, len(values) - 1))
    filled = np.take_along_axis(values, source, 0)
    end = np.repeat(start[1:], np.diff(start))[:, None]
    return np.where(np.isfinite(filled) & (source < end), filled, 0.0)


def check(data: Data) -> Iterator[Finding]:
    """Run the data checks for time series."""
    yield from arrange_series(data)[1]
    yield from check_sentinels(data)


def build_panel(data: Data) -> Panel:
    """Return the series of a table. Raises DataError if there are none that can be used."""
    made, findings = arrange_series(data)
    if made is None:
        raise DataError(f"{data.source}: " + " ".join(str(f) for f in findings if f.severity == "error"))
    return made


def arrange_series(data: Data, known: Frequency | None = None) -> tuple[Panel | None, list[Finding]]:
    """Return the series and all findings; the series are None if a finding is an error.

    `known` is the frequency of training, which is used if the times allow it.
    """
    layout = find_layout(data)
    if layout == "rows":
        return rows_as_series(data)
    return moments_as_series(data, layout, known)


def find_plain_series(data: Data) -> str | None:
    """Return the column of dates if they are regular steps of a numeric target, and there is no other feature than the name of the
    series, else None.
    """
    target, features = data.target, data.features()
    if target is None or target.kind != "number" or any(c.role not in PLAIN_ROLES for c in data.columns.values()):
        return None
    dates, names = [c.name for c in features if c.kind == "date"], [c.name for c in features if c.kind == "category"]
    if len(dates) != 1 or len(names) > 1 or len(features) != 1 + len(names) or data.rows[dates[0]].null_count():
        return None
    table = data.rows.select(*names, pl.col(dates[0]).cast(column_types.DATE_DTYPE).cast(pl.Int64))
    series = table.partition_by(names) if names else [table]
    least = MIN_STEPS_OF_SEVERAL if len(series) > 1 else MIN_REGULAR_STEPS
    regular = sum(are_regular_steps(one[dates[0]].to_numpy(), least) for one in series)
    return dates[0] if regular >= MIN_REGULAR_SERIES_FRACTION * len(series) else None


def find_layout(data: Data) -> str:
    """Return the layout of a table: "long", "wide" or "rows"."""
    if data.columns_with_role("time"):
        return "long" if data.columns_with_role("series") else "wide"
    return "rows" if series_name_column(data) else "wide"


def series_name_column(data: Data) -> str | None:
    """Return the column that names one series per row, or None.

    It is the series column, or the only text column if nearly all of its values are distinct.
    """
    if data.columns_with_role("series"):
        return data.require_role("series").name
    chosen = [n for n in data.columns if holds_words(data.rows[n])]
    if len(chosen) == 1 and len(data.columns) > 2 and data.rows[chosen[0]].n_unique() >= MIN_DISTINCT_FRACTION * len(data):
        return chosen[0]
    return None


def list_steps(data: Data, name: str) -> list[pl.Series]:
    """Return the columns of one series per row in order, whatever their type: all except its name and identifiers of words."""
    others = [c for c in data.columns.values() if c.name != name]
    return [data.rows[c.name] for c in others if c.kind != "identifier" or not holds_words(data.rows[c.name])]


def row_values(data: Data, name: str) -> np.ndarray:
    """Return the values, rows x steps, float64."""
    columns = list_steps(data, name)
    numbers = [as_numbers(c) if c.dtype == pl.String else c.cast(pl.Float64) for c in columns]
    return pl.DataFrame(numbers).to_numpy().astype(float)


def rows_as_series(data: Data) -> tuple[Panel | None, list[Finding]]:
    """Build one series per row; trailing blanks are after its end, other blanks are missing values."""
    name = series_name_column(data)
    assert name is not None  # tables with this layout have one
    again = ~data.rows[name].is_first_distinct().to_numpy()
    if again.any():
        return None, [make_finding(data, "repeated-series", again, name=name)]
    for column in list_steps(data, name):
        if holds_words(column):
            wrong = (as_numbers(column).is_null() & column.is_not_null()).to_numpy()
            value = column.filter(wrong)[0]
            return None, [make_finding(data, "text-in-series", wrong, column=column.name, value=value, name=name)]
    table = row_values(data, name)
    known = np.isfinite(table)
    findings = [make_finding(data, "layout", name=name, columns=table.shape[1])]
    ends = np.where(known.any(1), table.shape[1] - known[:, ::-1].argmax(1), 0)
    ids = data.rows[name].cast(pl.String).to_list()
    start, inside = np.r_[0, ends.cumsum()], np.arange(table.shape[1]) < ends[:, None]
    values = np.where(known, table, np.nan)[inside][:, None]
    times = np.concatenate([np.arange(n) for n in ends]).astype(float)
    return finish_panel(
        data, "rows", PLAIN_STEP, ["value"], values, np.repeat(np.arange(len(data)), ends), times, start, ids, findings
    )


def moments_as_series(data: Data, layout: str, known: Frequency | None = None) -> tuple[Panel | None, list[Finding]]:
    """Build series from long and wide tables: sort, drop duplicates and rows off the grid, and place rows on the grid."""
    targets = [c.name for c in data.columns_with_role("target") if data.rows[c.name].dtype.is_numeric()]
    if not targets:
        return None, [make_finding(data, "no-target")]
    findings, dates = [], False
    times = pl.Series(np.arange(len(data), dtype=float))
    if data.columns_with_role("time"):
        times, dates = row_times(data)
        if times.dtype == pl.String:
            column = data.require_role("time").name
            wrong = times.is_not_null().to_numpy()
            return None, [make_finding(data, "time-unreadable", wrong, name=column, value=times.drop_nulls()[0])]
    else:
        findings.append(make_finding(data, "no-time"))
    frame = pl.DataFrame({"id": row_series(data), "time": times, "row": np.arange(len(data))})
    if (gone := frame["time"].is_null()).any():  # rows without a series were dropped by the reader
        findings.append(make_finding(data, "time-missing", gone.to_numpy()))
    frame = frame.drop_nulls()
    if not frame.height:
        return None, [*findings, make_finding(data, "no-series")]
    names = frame["id"].unique(maintain_order=True).to_list()  # in file order
    codes = frame["id"].replace_strict(names, list(range(len(names)))).to_numpy()
    at, row = frame["time"].to_numpy(), frame["row"].to_numpy()
    findings += check_order(data, codes, at, row)
    order = np.lexsort((row, at, codes))
    codes, at, row = codes[order], at[order], row[order]
    table = data.rows.select(pl.col(targets).cast(pl.Float64)).to_numpy()
    again, doubles = find_repeats(data, codes, at, row, table)
    findings += doubles
    codes, at, row = codes[~again], at[~again], row[~again]
    cuts = np.r_[0, np.flatnonzero(np.diff(codes)) + 1, len(codes)]
    frequency: Frequency | None = PLAIN_STEP
    if data.columns_with_role("time"):
        groups = [at[a:b] for a, b in pairwise(cuts)]
        if known is not None and continues(known, groups, dates):
            frequency = known
        else:
            frequency = infer_frequency(groups, dates, time_zone(data))
    if frequency is None:
        return None, [*findings, make_finding(data, "one-moment", hint=series_hint(data))]
    findings += check_steps(data, frequency, at, row, cuts, [names[codes[a]] for a in cuts[:-1]], dates)
    placed = place_on_grid(data, frequency, at, row, cuts)
    if placed is None and findings and findings[-1].check == "mixed-steps":
        return None, [*findings[:-1], replace(findings[-1], severity="error")]
    if placed is None and (hours := find_opening_hours(frequency, at)):
        return None, [
            *findings,
            make_finding(data, "opening-hours", row[:MAX_SHOWN_PLACES], len(row), step=frequency.article, **hours),
        ]
    if placed is None:
        return None, [
            *findings,
            make_finding(
                data, "irregular-steps", row[:MAX_SHOWN_PLACES], len(row), step=frequency.article, hint=series_hint(data)
            ),
        ]
    where, start, moments, more = placed
    values, source = np.full((start[-1], len(targets)), np.nan), np.full(start[-1], -1)
    source[where[where >= 0]] = row[where >= 0]
    values[where[where >= 0]] = table[row[where >= 0]]
    return finish_panel(data, layout, frequency, targets, values, source, moments, start, names, [*findings, *more])


def find_opening_hours(frequency: Frequency, at: np.ndarray) -> dict[str, str]:
    """Return the first and last time of day, and the days of the week if some lack rows, of steps within hours of the day; else {}."""
    if frequency.unit != "clock" or frequency.size >= DAY:
        return {}
    clock, counts = np.unique(at % DAY, return_counts=True)
    if len(clock) < 2 or (np.diff(clock) != frequency.size).any() or np.ptp(clock) + 2 * frequency.size > DAY:
        return {}
    if counts.min() < MAX_MISSING_FRACTION * counts.max():
        return {}
    first, last = (str(np.int64(t).astype("M8[us]").astype("M8[m]"))[11:] for t in (clock[0], clock[-1]))
    weekdays = bool(np.is_busday(at.astype("M8[us]").astype("M8[D]")).all()) and np.ptp(at) >= 7 * DAY
    return {"first": first, "last": last, "days": " on Monday to Friday" if weekdays else ""}


def row_series(data: Data) -> pl.Series:
    """Return the series of each row: the joined values of the series columns; null if missing, "" in a wide table."""
    keys = [pl.col(c.name).cast(pl.String) for c in data.columns_with_role("series")] or [pl.repeat("", len(data))]
    return data.rows.select(pl.concat_str(keys, separator=", ").alias("id")).to_series()


def row_times(data: Data) -> tuple[pl.Series, bool]:
    """Return the time of every row and whether it is in microseconds (else numbers); text if it is neither."""
    values = data.rows[data.require_role("time").name]
    if values.dtype == pl.String:
        numbers, dates = infer_format(values).values, infer_dates(values)
        least = text_values.MIN_TYPE_FRACTION * (len(values) - values.null_count())
        values = numbers if len(values) - numbers.null_count() >= max(least, 1) else values if dates is None else dates.values
    if values.dtype.is_temporal():
        return values.cast(column_types.DATE_DTYPE).cast(pl.Int64), True
    return (values.cast(pl.Float64) if values.dtype.is_numeric() else values.cast(pl.String)), False


def time_zone(data: Data) -> str:
    """Return the time zone in which the times are kept, "" if they are local times."""
    zone = str((data.require_role("time").date_format or {}).get("zone", ""))
    return "" if zone == LOCAL else zone


def check_steps(
    data: Data, frequency: Frequency, at: np.ndarray, row: np.ndarray, cuts: np.ndarray, names: list[str], dates: bool
) -> list[Finding]:
    """Report series with another time step than most: sorted times `at` of groups that begin at `cuts`."""
    groups = [(i, a, b) for i, (a, b) in enumerate(pairwise(cuts)) if b - a >= MIN_STEPS_OF_SERIES]
    if len(groups) < 2:
        return []
    usual = {i: float(np.median(np.diff(at[a:b]))) for i, a, b in groups}
    size = {"month": 30.4 * DAY * frequency.size, "business": DAY}.get(frequency.unit, frequency.size)
    other = [(i, a, b) for i, a, b in groups if not 1 / STEP_FACTOR < usual[i] / max(size, 1e-9) < STEP_FACTOR]
    if not other:
        return []
    shown = []
    for i, a, b in other[:MAX_SHOWN_PLACES]:
        own = infer_frequency([at[a:b]], dates)
        shown.append(f"{names[i]!r} ({own.article if own else 'no step'})")
    more = ", ..." if len(other) > len(shown) else ""
    return [
        make_finding(
            data,
            "mixed-steps",
            [int(row[a]) for _, a, _ in other[:MAX_SHOWN_PLACES]],
            len(other),
            step=frequency.article,
            names=", ".join(shown) + more,
        )
    ]


def check_order(data: Data, codes: np.ndarray, at: np.ndarray, row: np.ndarray) -> list[Finding]:
    """Report rows that follow a later time of their series; a file in descending order is only noted."""
    by = np.lexsort((row, codes))
    codes, at, row = codes[by], at[by], row[by]
    same, steps = np.diff(codes) == 0, np.diff(at)
    back = same & (steps < 0)
    if not back.any():
        return []
    if (steps[same] <= 0).all():
        return [make_finding(data, "time-backwards", row[:1])]
    peak = np.zeros(len(by), dtype=bool)  # rows before the latest time so far
    for a, b in pairwise(np.r_[0, np.flatnonzero(~same) + 1, len(by)]):
        peak[a:b] = at[a:b] < np.maximum.accumulate(at[a:b])
    return [make_finding(data, "time-order", row[peak])]


def find_repeats(
    data: Data, codes: np.ndarray, at: np.ndarray, row: np.ndarray, table: np.ndarray
) -> tuple[np.ndarray, list[Finding]]:
    """Return which of the sorted rows repeat a series and time, and the findings about them."""
    again = np.r_[False, (np.diff(codes) == 0) & (np.diff(at) == 0)]
    first = row[np.maximum.accumulate(np.where(again, 0, np.arange(len(again))))]
    same = ((table[row] == table[first]) | (np.isnan(table[row]) & np.isnan(table[first]))).all(1)
    findings = []
    for check_name, which in (("duplicate-time", again & same), ("conflicting-time", again & ~same)):
        if which.any():
            pairs = [
                f"{data.locate_row(int(row[i]))} = {data.locate_row(int(first[i]))}"
                for i in np.flatnonzero(which)[:MAX_SHOWN_PLACES]
            ]
            findings.append(make_finding(data, check_name, row[which], shown=pairs))
    return again, findings


def series_hint(data: Data) -> str:
    """Return the remedy for rows that may belong to several series."""
    columns = ", ".join(repr(c.name) for c in data.columns_with_role("series"))
    return (
        f"Series are identified by {columns}; specify others with --set role.series=COLUMN."
        if columns
        else "If the rows belong to several series, specify the column that identifies them: --set role.series=COLUMN."
    )


def place_on_grid(
    data: Data, frequency: Frequency, at: np.ndarray, row: np.ndarray, cuts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Finding]] | None:
    """Return the step of every row (-1 if between steps), the start of each group, the time of every step, and findings.

    Returns None if the times are irregular.
    """
    where, sizes, times, jumps = np.empty(len(at), dtype=np.int64), [], [], []
    for a, b in pairwise(cuts):
        position = frequency.position(at[a:b])
        phase = np.round(position % 1, 5) % 1
        values, counts = np.unique(phase, return_counts=True)
        base = values[counts.argmax()]  # the most common phase, since the first row may be off the grid
        step = np.round(position - base).astype(np.int64)
        on = np.minimum(abs(phase - base), 1 - abs(phase - base)) < 1e-4
        on &= np.r_[True, np.diff(step) > 0]  # two days in the same month are the same step
        step -= step[on][0]
        where[a:b] = np.where(on, step, -1)
        sizes.append(int(step[on][-1]) + 1)
        if sizes[-1] > 100 + 4 * (b - a):  # avoids allocating an extremely long grid
            return None
        times.append(frequency.times(at[a:b][on][0], sizes[-1]))
        gaps = np.diff(step[on], prepend=0)
        jumps += [(int(gaps[i]) - 1, int(row[a:b][on][i])) for i in np.flatnonzero(gaps > 1)]
    off, start = where < 0, np.r_[0, np.cumsum(sizes)]
    missing = int(start[-1] - (~off).sum())
    if off.mean() > MAX_MISSING_FRACTION or missing > MAX_MISSING_FRACTION * start[-1]:
        return None
    findings = [make_finding(data, "frequency", step=frequency.article)]
    if off.any():
        findings.append(make_finding(data, "off-grid", row[off], step=frequency.article))
    if missing:
        locations = [f"{count} before {data.locate_row(r)}" for count, r in jumps[:MAX_SHOWN_PLACES]]
        findings.append(make_finding(data, "missing-steps", shown=locations, count=missing))
    return np.where(off, -1, where + np.repeat(start[:-1], np.diff(cuts))), start, np.concatenate(times), findings


def finish_panel(
    data: Data,
    layout: str,
    frequency: Frequency,
    targets: list[str],
    values: np.ndarray,
    row: np.ndarray,
    times: np.ndarray,
    start: np.ndarray,
    ids: list[str],
    findings: list[Finding],
) -> tuple[Panel | None, list[Finding]]:
    """Build the panel and report gaps between values, empty series and constant series."""
    known, inside = np.isfinite(values), np.zeros(values.shape, dtype=bool)
    units, names = [], []
    unusual: dict[str, list[str]] = {"empty-series": [], "constant-series": []}
    for g, (a, b) in enumerate(pairwise(start)):
        for c, target in enumerate(targets):
            name = target if not ids[g] else ids[g] if len(targets) == 1 else f"{ids[g]}: {target}"
            own = a + np.flatnonzero(known[a:b, c])
            if not len(own):
                unusual["empty-series"].append(name)
                continue
            inside[own[0] : own[-1] + 1, c] = True
            if len(own) > 1 and np.ptp(values[own, c]) == 0:
                unusual["constant-series"].append(name)
            units.append((g, c, own[0], own[-1] + 1))
            names.append(name)
    gaps = (inside & ~known).any(1) & (row >= 0)
    if gaps.any():
        findings.append(
            make_finding(data, "missing-values", list(dict.fromkeys(row[gaps].tolist()))[:MAX_SHOWN_PLACES], int(gaps.sum()))
        )
    for check_name, series in unusual.items():
        if series:
            findings.append(
                make_finding(
                    data,
                    check_name,
                    shown=[repr(n) for n in series[:MAX_SHOWN_PLACES]],
                    count=len(series),
                    names=", ".join(map(repr, series[:MAX_SHOWN_PLACES])),
                )
            )
    if not units or len(unusual["constant-series"]) == len(units):
        return None, [*findings, make_finding(data, "nothing-changes" if units else "no-series")]
    group, column, low, high = (np.array(x) for x in zip(*units))
    return Panel(layout, frequency, targets, values, row, times, start, group, column, low, high, names, findings), findings

"""Labeled series: a table as one series per example, and the checks of such tables.

Two layouts are distinguished:
    long    a series column whose values repeat: a row is one step of one series, and every numeric column is a channel
    rows    a row is a whole series, in the order of the columns; columns such as x_0, x_1, ..., y_0, y_1, ... are channels

Series may have different lengths. Missing values are NaN; blanks at the end of a row are after its end.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FILE, LINE, Column, Data, Finding, Severity
from fieldguide.data.former_formats import as_numbers
from fieldguide.data.validation.findings import places

CASE = "#case"  # column of an example: the number of its series
MIN_STEPS = 2  # of a series
NUMBERED = re.compile(r"(.*?)[_.\- ]?(\d+)")
MAX_MISSING_FRACTION = 0.5  # of the values of a series, above which it is reported

FINDINGS: dict[str, tuple[Severity, str, str]] = {  # name: severity, description, remedy
    "layout": ("note", "{what}", ""),
    "no-channels": ("error", "there is no numeric column that could be a series", "Give the values of the series as numbers."),
    "not-a-number": ("error", "cells of series that are not numbers: {cells}", "Correct them, or leave them empty."),
    "conflicting-labels": (
        "error",
        "series whose rows have different labels: {names}",
        "Each series needs one label. If rows belong to different series, name the column that tells them apart: "
        "--set role.series=COLUMN.",
    ),
    "missing-label": ("warning", "series without a label; they are dropped", "Fill the label in."),
    "empty-series": ("warning", "series without values; they are dropped", "Fill the values in or remove the series."),
    "short-series": (
        "warning",
        "series with a single step; they are dropped",
        "Provide longer series. If a row is one step of a series, name the column that tells the series apart: --set "
        "role.series=COLUMN.",
    ),
    "repeated-step": (
        "error",
        "rows with a repeated series and time: {names}",
        "Correct them. If they belong to several series, name the column that tells them apart: --set role.series=COLUMN.",
    ),
    "missing-values": ("note", "values that are missing within series; they are interpolated", ""),
    "mostly-missing": (
        "warning",
        "series of which more than half of the values are missing; they are interpolated",
        "Fill the values in or remove the series.",
    ),
    "unequal-lengths": ("note", "series have {least:,} to {most:,} steps", ""),
    "constant-series": ("warning", "series in which nothing changes", "Check that the columns are correct."),
    "repeated-series": (
        "warning",
        "series that equal an earlier one",
        "Remove them: a copy of a training series among the test series makes scores too good.",
    ),
}


@dataclass
class Cases:
    """Series, each C x T float64 with NaN for missing values; `row` is the first table row of each."""

    values: list[np.ndarray]
    channels: list[str]
    names: list[str]
    row: np.ndarray
    labels: list[Any] = field(default_factory=list)  # of the target column; None if missing
    layout: str = "rows"
    columns: dict[str, Column] = field(default_factory=dict)  # of the table, those of values as numbers

    def __len__(self) -> int:
        return len(self.values)

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of steps of each series."""
        return np.array([v.shape[1] for v in self.values], dtype=int)

    def take(self, index: Sequence[int] | np.ndarray) -> Cases:
        """Return some series, in this order."""
        pick = lambda items: [items[i] for i in index]
        return replace(
            self,
            values=pick(self.values),
            names=pick(self.names),
            row=self.row[np.asarray(index, dtype=int)],
            labels=pick(self.labels) if self.labels else [],
        )


def check(data: Data) -> Iterator[Finding]:
    """Run the checks of labeled series."""
    yield from arrange_cases(data)[1]


def build_cases(data: Data, is_labeled: bool = True) -> Data:
    """Return the data with one row per series. Raises `DataError` if there are none that can be used.

    Without `is_labeled`, series need no label.
    """
    found, findings = arrange_cases(data, is_labeled)
    if found is None or not len(found):
        raise DataError(f"{data.source}: " + " ".join(str(f) for f in findings if f.severity != "note"))
    rows = data.rows[found.row].with_columns(pl.Series(CASE, np.arange(len(found))))
    kept = [c for c in (FILE, LINE) if c in rows.columns]
    target = data.target
    if target is not None and target.name in rows.columns:
        rows = rows.with_columns(pl.Series(target.name, found.labels, dtype=rows.schema[target.name]))
        kept.append(target.name)
    kept += [c.name for c in data.columns_with_role("group") if c.name in rows.columns]
    splits = None if data.splits is None else data.splits[found.row]
    columns = {name: column for name, column in data.columns.items() if name in kept}
    values, _ = read_channels(data, [c.name for c in data.columns_with_role("series")])
    found.columns = {
        name: replace(column, kind="number", role="feature") if name in values else column
        for name, column in data.columns.items()
    }
    return replace(data, rows=rows.select([*kept, CASE]), columns=columns, context=found, splits=splits, inputs=None)


def arrange_cases(data: Data, is_labeled: bool = True) -> tuple[Cases | None, list[Finding]]:
    """Return the series that can be used, and all findings; the series are None if a finding is an error."""
    names = [c for c in data.columns_with_role("series") if c.name in data.rows.columns]
    key = None
    if names:
        parts = [pl.col(FILE)] if FILE in data.rows.columns else []
        frame = data.rows.select([*parts, *(pl.col(c.name).cast(pl.String) for c in names)])
        key = frame.select(pl.struct(pl.all()).rank("dense").alias("key")).to_series().to_numpy() - 1
        if len(np.unique(key)) == len(key):
            key = None  # a name for each row
    channels, problems = read_channels(data, [c.name for c in names])
    if any(f.severity == "error" for f in problems):
        return None, problems
    found = gather_long(data, key, names, channels) if key is not None else gather_rows(data, names, channels)
    if isinstance(found, list):
        return None, [*problems, *found]
    findings = [*problems, *inspect(data, found, is_labeled)]
    if any(f.severity == "error" for f in findings):
        return None, findings
    lengths = found.lengths
    use = np.array([np.isfinite(v).any() for v in found.values], dtype=bool) & (lengths >= MIN_STEPS)
    if is_labeled and found.labels:
        use &= np.array([label is not None for label in found.labels])
    return found.take(np.flatnonzero(use)), findings


def read_channels(data: Data, names: Sequence[str]) -> tuple[dict[str, np.ndarray], list[Finding]]:
    """Return the columns of values as float64, in order."""
    other = {c.name for c in data.columns.values() if c.role in ("target", "time", "group", "split", "user", "item")} | {*names}
    columns = [c for c in data.columns.values() if c.name not in other and c.name in data.rows.columns]
    found: dict[str, np.ndarray] = {}
    wrong: list[tuple[int, str]] = []
    for column in columns:
        values = data.rows[column.name]
        if values.dtype == pl.String:
            numbers = as_numbers(values)
            lost = (numbers.is_null() & values.is_not_null()).to_numpy()
            if lost.all() or (lost.mean() > MAX_MISSING_FRACTION and column.role == "ignored"):
                continue  # words, such as a remark
            wrong += [(int(i), f"{column.name}={values[int(i)]!r}") for i in np.flatnonzero(lost)[:3]]
        elif values.dtype.is_numeric() or values.dtype == pl.Boolean:
            numbers = values.cast(pl.Float64)
        else:
            continue
        found[column.name] = numbers.cast(pl.Float64).fill_null(np.nan).to_numpy()
    if wrong:
        shown = ", ".join(text for _, text in wrong[:3])
        return found, [make_finding(data, "not-a-number", [i for i, _ in wrong], cells=shown)]
    return (found, []) if found else (found, [make_finding(data, "no-channels")])


def gather_long(data: Data, key: np.ndarray, names: Sequence[Column], channels: dict[str, np.ndarray]) -> Cases | list[Finding]:
    """Return one series for each value of the key, in order of first appearance, sorted by time if there is one."""
    _, first, codes = np.unique(key, return_index=True, return_inverse=True)
    order_of = np.argsort(np.argsort(first))  # in file order
    codes = order_of[codes]
    time = next((c.name for c in data.columns_with_role("time") if c.name in data.rows.columns), None)
    moments = np.arange(len(data), dtype=float)
    if time is not None:
        values = data.rows[time]
        if values.dtype == pl.String:
            values = as_numbers(values) if as_numbers(values).null_count() == values.null_count() else values.rank("dense")
        moments = values.to_physical().cast(pl.Float64).fill_null(np.nan).to_numpy()
    order = np.lexsort((np.arange(len(data)), moments, codes))
    codes, moments = codes[order], moments[order]
    again = np.flatnonzero((np.diff(codes) == 0) & (np.diff(moments) == 0))
    if len(again):
        words = ", ".join(str(data.rows[names[0].name][int(i)]) for i in order[again[:3]])
        return [make_finding(data, "repeated-step", order[again + 1], names=words)]
    table = np.stack(list(channels.values()))[:, order]
    cuts = np.r_[0, np.flatnonzero(np.diff(codes)) + 1, len(codes)]
    rows = np.array([order[a:b].min() for a, b in itertools.pairwise(cuts)])
    labels: list[Any] = []
    target = data.target
    if target is not None and target.name in data.rows.columns:
        column = data.rows[target.name]
        clash = []
        for a, b in itertools.pairwise(cuts):
            values = column[order[a:b]].drop_nulls().unique()
            labels.append(values[0] if len(values) else None)
            if len(values) > 1:
                clash.append(int(order[a]))
        if clash:
            words = ", ".join(str(data.rows[names[0].name][i]) for i in clash[:3])
            return [make_finding(data, "conflicting-labels", clash, names=words)]
    ids = [" ".join(str(data.rows[c.name][int(i)]) for c in names) for i in rows]
    return Cases([table[:, a:b] for a, b in itertools.pairwise(cuts)], list(channels), ids, rows, labels, "long")


def gather_rows(data: Data, names: Sequence[Column], channels: dict[str, np.ndarray]) -> Cases:
    """Return each row as a series. Columns with several prefixes and the same numbers are channels."""
    groups = group_columns(list(channels))
    table = np.stack([np.stack([channels[c] for c in group], 1) for group in groups.values()], 1)  # rows C T
    known = np.isfinite(table).any(1)
    ends = np.where(known.any(1), table.shape[2] - known[:, ::-1].argmax(1), 0)
    ids = (
        [" ".join(str(data.rows[c.name][i]) for c in names) for i in range(len(data))]
        if names
        else [data.locate_row(i) for i in range(len(data))]
    )
    target = data.target
    labels = data.rows[target.name].to_list() if target is not None and target.name in data.rows.columns else []
    return Cases([v[:, :end] for v, end in zip(table, ends)], list(groups), ids, np.arange(len(data)), labels)


def group_columns(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the columns of each channel: those with a common prefix and numbers, if all prefixes have the same numbers."""
    groups: dict[str, dict[int, str]] = {}
    for name in names:
        match = NUMBERED.fullmatch(name)
        if match is None or int(match[2]) in groups.setdefault(match[1], {}):
            return {"value": list(names)}
        groups[match[1]][int(match[2])] = name
    numbers = [sorted(group) for group in groups.values()]
    if len(groups) < 2 or any(other != numbers[0] for other in numbers) or len(numbers[0]) < MIN_STEPS:
        return {"value": list(names)}
    return {prefix: [group[n] for n in numbers[0]] for prefix, group in groups.items()}


def inspect(data: Data, found: Cases, is_labeled: bool) -> Iterator[Finding]:
    """Yield what is worth knowing about the series."""
    channels = f"{len(found.channels)} channels ({', '.join(found.channels[:5])}{', ...' if len(found.channels) > 5 else ''})"
    channels = channels if len(found.channels) > 1 else "one channel"
    form = "a row is one step of a series" if found.layout == "long" else "a row is a whole series, in the order of the columns"
    yield make_finding(data, "layout", what=f"{len(found):,} series, {channels}: {form}")
    lengths = found.lengths
    size = np.maximum(lengths, 1) if found.layout == "long" else np.ones_like(lengths)
    empty = np.array([not np.isfinite(v).any() for v in found.values])
    if empty.any():
        yield make_finding(data, "empty-series", found.row[empty], int(size[empty].sum()))
    short = ~empty & (lengths < MIN_STEPS)
    if short.any():
        yield make_finding(data, "short-series", found.row[short], int(size[short].sum()))
    used = ~empty & ~short
    if is_labeled and found.labels:
        lacking = np.array([label is None for label in found.labels]) & used
        if lacking.any():
            yield make_finding(data, "missing-label", found.row[lacking], int(size[lacking].sum()))
    if not used.any():
        return
    missing = np.array([np.isnan(v).mean() if v.size else 0 for v in found.values])
    if (gaps := used & (missing > 0) & (missing <= MAX_MISSING_FRACTION)).any():
        yield make_finding(data, "missing-values", found.row[gaps])
    if (gaps := used & (missing > MAX_MISSING_FRACTION)).any():
        yield make_finding(data, "mostly-missing", found.row[gaps])
    if np.ptp(lengths[used]):
        yield make_finding(data, "unequal-lengths", least=int(lengths[used].min()), most=int(lengths[used].max()))
    still = np.array([bool(u) and is_constant(v) for u, v in zip(used, found.values)])
    if still.any():
        yield make_finding(data, "constant-series", found.row[still])
    seen: dict[bytes, int] = {}
    twins = [i for i in np.flatnonzero(used & ~still) if seen.setdefault(digest(found.values[i]), int(i)) != i]
    if twins:
        yield make_finding(data, "repeated-series", found.row[twins])


def is_constant(values: np.ndarray) -> bool:
    """Return whether no channel changes."""
    return all(len(np.unique(channel[np.isfinite(channel)])) <= 1 for channel in values)


def digest(values: np.ndarray) -> bytes:
    """Return a short digest of a series."""
    import hashlib

    return hashlib.blake2b(np.ascontiguousarray(values).tobytes() + str(values.shape).encode(), digest_size=16).digest()


def make_finding(data: Data, name: str, rows: Any = (), unusable: int = 0, **words: Any) -> Finding:
    """Return a finding about these table rows. `unusable` is the number of rows that are dropped."""
    severity, what, remedy = FINDINGS[name]
    rows = [int(i) for i in rows]
    return Finding(name, severity, what.format(**words), tuple(places(data, rows)), max(len(rows), 1), remedy, unusable)

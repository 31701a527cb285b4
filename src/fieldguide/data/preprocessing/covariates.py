"""Covariates of time series: additional columns as numeric features, and calendar features of each step.

Numbers are standardized by their training values, booleans are 0 and 1, categories are one-hot over the values seen in
training. Missing values of past covariates are forward-filled; those of future covariates become the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from fieldguide.data.dataset import Column
from fieldguide.data.text_values import count_values
from fieldguide.data.timeseries.frequency import DAY, HOUR, MINUTE, WEEK, Frequency

if TYPE_CHECKING:
    from fieldguide.data.timeseries.panel import Panel

MAX_CATEGORIES = 20  # maximum number of one-hot columns per category; rarer values are all zeros
SUPPORTED_TYPES = ("number", "boolean", "category")
PERIOD_NAMES: dict[Any, str] = {
    HOUR: "minute of the hour",
    DAY: "hour of the day",
    WEEK: "day of the week",
    "month": "day of the month",
    "year": "day of the year",
}
# (maximum step, period): calendar features for series with shorter steps; microseconds, or "month" and "year".
CALENDAR_PERIODS = ((MINUTE, HOUR), (HOUR + 1, DAY), (DAY + 1, WEEK), (DAY + 1, "month"), (370 * DAY, "year"))


@dataclass(frozen=True)
class Covariate:
    """A covariate column with the mean and standard deviation of its values, or its one-hot categories."""

    column: str
    ahead: bool  # also known for the future
    mean: float = 0.0
    std: float = 1.0
    values: tuple[str, ...] = ()
    static: bool = False  # constant in each series

    @property
    def width(self) -> int:
        """Number of features."""
        return max(1, len(self.values))

    def apply(self, values: pl.Series) -> np.ndarray:
        """Return the features, rows x width, with NaN for missing values."""
        if not self.values:
            return (values.cast(pl.Float64).fill_null(np.nan).to_numpy()[:, None] - self.mean) / self.std
        text = values.cast(pl.String)
        found = np.stack([(text == v).fill_null(False).to_numpy() for v in self.values], 1).astype(float)
        found[text.is_null().to_numpy()] = np.nan
        return found


@dataclass
class Covariates:
    """The fitted covariates of a table. `turns` are the calendar periods used as features, `series` the names of series that
    networks with static inputs tell apart.
    """

    columns: list[Covariate] = field(default_factory=list)
    turns: list[Any] = field(default_factory=list)
    series: list[str] = field(default_factory=list)

    @classmethod
    def fit(
        cls,
        rows: pl.DataFrame,
        columns: Sequence[Column],
        ahead: Sequence[str],
        frequency: Frequency,
        steps: int = 0,
        static: Sequence[str] = (),
        series: Sequence[str] = (),
    ) -> Covariates:
        """Fit on training rows; constant columns and unsupported types are dropped.

        `steps` is the length of the longest training series: calendar periods that it does not cover twice are not used. `static`
        names columns that are constant in each series; `series` are the names of the series.
        """
        told_apart = list(series) if 1 < len(series) <= MAX_CATEGORIES else []
        found = []
        for column in columns:
            if column.kind not in SUPPORTED_TYPES:
                continue
            values, known = rows[column.name].drop_nulls(), column.name in ahead
            if column.kind == "category":
                names = count_values(values.cast(pl.String))[0][:MAX_CATEGORIES]
                same = column.name in static and not known
                found += [Covariate(column.name, known, values=tuple(sorted(names)), static=same)] if len(names) > 1 else []
            elif values.n_unique() > 1:
                numbers = values.cast(pl.Float64).to_numpy()
                same = column.name in static and not known
                found.append(Covariate(column.name, known, float(numbers.mean()), float(numbers.std()), static=same))
        return cls(found, choose_periods(frequency, steps), told_apart)

    @property
    def past(self) -> int:
        """Number of features known only for the past, with those that are constant in each series."""
        return sum(c.width for c in self.columns if not c.ahead)

    @property
    def known(self) -> int:
        """Number of features known for the future, including the calendar."""
        return sum(c.width for c in self.columns if c.ahead) + 2 * len(self.turns)

    def group_variables(self) -> dict[str, dict[str, int]]:
        """Return the number of features of each variable, for networks with static inputs: `past`, `known` and `static`."""
        sizes = lambda kept: {c.column: c.width for c in self.columns if kept(c)}
        return {
            "past": sizes(lambda c: not c.ahead and not c.static),
            "known": sizes(lambda c: c.ahead) | {PERIOD_NAMES[turn]: 2 for turn in self.turns},
            "static": sizes(lambda c: c.static) | ({"series": len(self.series)} if self.series else {}),
        }

    def static_values(self, rows: pl.DataFrame, found: Panel) -> np.ndarray:
        """Return the static features of each series, U x static, float32: its first known value; missing values are 0."""
        parts = []
        for covariate in (c for c in self.columns if c.static):
            values = self.values_at(covariate, rows, found.row)
            part = np.zeros((len(found.names), covariate.width))
            for i, (low, high) in enumerate(zip(found.low, found.high)):
                known = np.flatnonzero(np.isfinite(values[low:high]).all(1))
                part[i] = values[low + known[0]] if len(known) else 0
            parts.append(part)
        if self.series:
            parts.append(np.array(found.names)[:, None] == np.array(self.series))
        return (np.concatenate(parts, 1) if parts else np.zeros((len(found.names), 0))).astype(np.float32)

    def past_values(self, rows: pl.DataFrame, row: np.ndarray, start: np.ndarray, static: bool = True) -> np.ndarray:
        """Return the past covariates, N x past, float32; `row` is the table row of each step, or -1 for none. Without `static`,
        those that are constant in each series are left out.
        """
        from fieldguide.data.timeseries.panel import forward_fill

        parts = [self.values_at(c, rows, row) for c in self.columns if not c.ahead and (static or not c.static)]
        return (
            forward_fill(np.concatenate(parts, 1), start).astype(np.float32) if parts else np.zeros((len(row), 0), np.float32)
        )

    def future_values(self, rows: pl.DataFrame, row: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Return the future covariates and calendar features, N x known, float32; missing values are 0, the mean."""
        parts = [self.values_at(c, rows, row) for c in self.columns if c.ahead]
        for turn in self.turns:
            phase = 2 * np.pi * period_phase(turn, times)[:, None]
            parts += [np.sin(phase), np.cos(phase)]
        joined = np.concatenate(parts, 1) if parts else np.zeros((len(row), 0))
        return np.nan_to_num(joined).astype(np.float32)

    def values_at(self, covariate: Covariate, rows: pl.DataFrame, row: np.ndarray) -> np.ndarray:
        """Return the features of one covariate at the given rows, NaN for row -1."""
        values = covariate.apply(rows[covariate.column])
        return np.where((row >= 0)[:, None], values[np.maximum(row, 0)], np.nan)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-compatible dictionary."""
        return {"columns": [asdict(c) for c in self.columns], "turns": self.turns, "series": self.series}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Covariates:
        """Restore from `to_json`."""
        columns = [Covariate(**{**c, "values": tuple(c["values"])}) for c in saved["columns"]]
        return cls(columns, saved["turns"], saved.get("series", []))


def choose_periods(frequency: Frequency, steps: int) -> list[Any]:
    """Return the calendar periods that are longer than a step and occur at least twice in `steps` steps."""
    if frequency.unit == "number":
        return []
    step = {"business": 1.4 * DAY, "month": 30 * DAY * frequency.size}.get(frequency.unit, frequency.size)
    days = {"month": 30 * DAY, "year": 365 * DAY}
    length = lambda turn: days[turn] if isinstance(turn, str) else turn
    return [turn for shorter, turn in CALENDAR_PERIODS if step < shorter and 2 * length(turn) <= steps * step]


def period_phase(turn: Any, times: np.ndarray) -> np.ndarray:
    """Return the position of each time within its hour, day, week (from Monday), month or year: 0 to 1."""
    if turn in ("month", "year"):
        begin = times.astype("M8[us]").astype("M8[M]" if turn == "month" else "M8[Y]")
        first, after = (x.astype("M8[us]").astype(np.int64) for x in (begin, begin + 1))
        return (times - first) / (after - first)
    return ((times + (3 * DAY if turn == WEEK else 0)) % turn) / turn  # 1970-01-01 was a Thursday

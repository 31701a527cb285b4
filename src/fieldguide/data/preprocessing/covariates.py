"""Covariates: what stands beside series as numbers, and what the calendar says of each step.

Amounts become standard by their training values, truth values 0 and 1, categories a column for each value seen in
training. Of what is measured, a missing value is the last one before; of what is known ahead, the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import polars as pl

from fieldguide.data.dataset import Column
from fieldguide.data.timeseries.frequency import DAY, HOUR, MINUTE, WEEK, Frequency

MANY = 20  # values of a category that get a column; those that come less often are as none
KINDS = ("number", "boolean", "category")
# Of a step shorter than (first), this turn (microseconds, or "month" and "year") tells where in it a moment is.
TURNS = ((MINUTE, HOUR), (HOUR + 1, DAY), (DAY + 1, WEEK), (DAY + 1, "month"), (370 * DAY, "year"))


@dataclass(frozen=True)
class Covariate:
    """One column: its values' mean and deviation, or the categories that have a column each."""

    column: str
    ahead: bool  # known for the future too
    mean: float = 0.0
    std: float = 1.0
    values: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        return max(1, len(self.values))

    def apply(self, values: pl.Series) -> np.ndarray:
        """rows x width, NaN where the value is missing."""
        if not self.values:
            return (values.cast(pl.Float64).fill_null(np.nan).to_numpy()[:, None] - self.mean) / self.std
        text = values.cast(pl.String)
        found = np.stack([(text == v).fill_null(False).to_numpy() for v in self.values], 1).astype(float)
        found[text.is_null().to_numpy()] = np.nan
        return found


@dataclass
class Covariates:
    """What is learnt of the covariates of a table. `turns` are those of the calendar that its frequency leaves open."""

    columns: list[Covariate] = field(default_factory=list)
    turns: list[Any] = field(default_factory=list)

    @classmethod
    def fit(
        cls, rows: pl.DataFrame, columns: Sequence[Column], ahead: Sequence[str], frequency: Frequency, steps: int = 0
    ) -> Covariates:
        """From training rows; what is constant there, or of another kind, is left out. `steps` is how long the longest
        series is in training: a turn of the calendar that it did not see twice tells nothing but when that was."""
        found = []
        for column in columns:
            if column.kind not in KINDS:
                continue
            values, known = rows[column.name].drop_nulls(), column.name in ahead
            if column.kind == "category":
                names = values.cast(pl.String).value_counts(sort=True)[column.name].to_list()[:MANY]
                found += [Covariate(column.name, known, values=tuple(sorted(names)))] if len(names) > 1 else []
            elif values.n_unique() > 1:
                numbers = values.cast(pl.Float64).to_numpy()
                found.append(Covariate(column.name, known, float(numbers.mean()), float(numbers.std())))
        return cls(found, turns_of(frequency, steps))

    @property
    def past(self) -> int:
        return sum(c.width for c in self.columns if not c.ahead)

    @property
    def known(self) -> int:
        return sum(c.width for c in self.columns if c.ahead) + 2 * len(self.turns)

    def measured(self, rows: pl.DataFrame, row: np.ndarray, start: np.ndarray) -> np.ndarray:
        """N x past, float32: at each step the row `row`, or none where that is -1."""
        from fieldguide.data.timeseries.panel import forward

        parts = [self.at(c, rows, row) for c in self.columns if not c.ahead]
        return forward(np.concatenate(parts, 1), start).astype(np.float32) if parts else np.zeros((len(row), 0), np.float32)

    def ahead(self, rows: pl.DataFrame, row: np.ndarray, times: np.ndarray) -> np.ndarray:
        """N x known, float32; 0, the mean, where a value is missing."""
        parts = [self.at(c, rows, row) for c in self.columns if c.ahead]
        for turn in self.turns:
            phase = 2 * np.pi * share_of(turn, times)[:, None]
            parts += [np.sin(phase), np.cos(phase)]
        joined = np.concatenate(parts, 1) if parts else np.zeros((len(row), 0))
        return np.nan_to_num(joined).astype(np.float32)

    def at(self, covariate: Covariate, rows: pl.DataFrame, row: np.ndarray) -> np.ndarray:
        values = covariate.apply(rows[covariate.column])
        return np.where((row >= 0)[:, None], values[np.maximum(row, 0)], np.nan)

    def to_json(self) -> dict[str, Any]:
        return {"columns": [asdict(c) for c in self.columns], "turns": self.turns}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Covariates:
        return cls([Covariate(**{**c, "values": tuple(c["values"])}) for c in saved["columns"]], saved["turns"])


def turns_of(frequency: Frequency, steps: int) -> list[Any]:
    """The turns of the calendar that steps of this length go through, at least twice in so many of them."""
    if frequency.unit == "number":
        return []
    step = {"business": 1.4 * DAY, "month": 30 * DAY * frequency.size}.get(frequency.unit, frequency.size)
    days = {"month": 30 * DAY, "year": 365 * DAY}
    return [turn for shorter, turn in TURNS if step < shorter and 2 * days.get(turn, turn) <= steps * step]


def share_of(turn: Any, times: np.ndarray) -> np.ndarray:
    """Where in its hour, day, week (from Monday), month or year a moment is: 0 to 1."""
    if turn in ("month", "year"):
        begin = times.astype("M8[us]").astype("M8[M]" if turn == "month" else "M8[Y]")
        first, after = (x.astype("M8[us]").astype(np.int64) for x in (begin, begin + 1))
        return (times - first) / (after - first)
    return ((times + (3 * DAY if turn == WEEK else 0)) % turn) / turn  # 1970 began on a Thursday

"""Features of users and items: from columns of the events that depend on one of the two only, or from tables of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data import read
from fieldguide.data.column_spec import ColumnSpec, normalize_name
from fieldguide.data.dataset import Column, Role
from fieldguide.data.preprocessing.table import TablePreparer

KEY = "#id"
USABLE_KINDS = ("number", "date", "category", "boolean")


class Features:
    """The features of users, or of items: a table with one row per id (`KEY`), and how they become codes and numbers."""

    def __init__(self, table: pl.DataFrame, preparer: TablePreparer):
        self.table, self.preparer = table, preparer
        self.place = {key: row for row, key in enumerate(table[KEY].to_list())}

    @classmethod
    def fit(cls, known: Sequence[str], tables: Sequence[tuple[pl.DataFrame, Sequence[Column]]]) -> Features:
        """Join tables of features; the preparation is fitted on the ids of the training data, `known`, alone."""
        table = pl.DataFrame({KEY: list(known)}, schema={KEY: pl.String})
        columns: list[Column] = []
        for one, described in tables:
            new = [c for c in described if c.name not in table.columns]
            columns += new
            table = table.join(
                one.select(KEY, *(c.name for c in new)), on=KEY, how="full", coalesce=True, maintain_order="left"
            )
        return cls(table, TablePreparer.fit(table.head(len(known)), columns))

    def apply(self, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the codes, N K, and the numbers, N n, of ids; an unknown id has zeros."""
        numbers, codes = self.preparer.apply(self.table)
        place = np.array([self.place.get(key, -1) for key in ids], dtype=np.int64)
        known = (place >= 0)[:, None]
        return codes[place] * known, (numbers[place] * known).astype(np.float32)


def read_features(path: str, role: Role) -> tuple[pl.DataFrame, list[Column]]:
    """Read a table with one row per user or item. The id is the column with a usual name, else the first one.

    Raises `DataError` if an id occurs twice with different features, or nothing else can be read.
    """
    spec = ColumnSpec("none", roles=(role,), kinds={role: "identifier"})
    data = read(Path(path), column_spec=spec)
    keys = [c.name for c in data.columns_with_role(role)] or [next(iter(data.columns))]
    usable = [c for c in data.columns.values() if c.kind in USABLE_KINDS and c.name != keys[0]]
    if not usable:
        raise DataError(
            f"{path}: no column can be used as a feature of {role}s. It has {', '.join(data.columns)}; features are numbers, "
            "dates, categories and truth values."
        )
    rows = data.rows.select(pl.col(keys[0]).cast(pl.String).alias(KEY), *(c.name for c in usable)).unique(maintain_order=True)
    if twice := rows.filter(pl.col(KEY).is_duplicated())[KEY].unique(maintain_order=True).to_list():
        raise DataError(
            f"{path}: {len(twice)} {role}s have several rows ({', '.join(twice[:3])}). Keep one row for each {role}."
        )
    return rows.filter(pl.col(KEY).is_not_null()), usable


def find_features(events: pl.DataFrame, key: str, columns: Sequence[Column]) -> tuple[pl.DataFrame, list[Column]]:
    """Return the columns that have one value for each `key`, in a table of one row per key. Missing values do not count."""
    if not columns:
        return events.select(pl.col(key).alias(KEY)).unique(maintain_order=True), []
    grouped = events.group_by(key, maintain_order=True)
    counts = grouped.agg(pl.col(c.name).drop_nulls().n_unique() for c in columns)
    found = [c for c in columns if counts[c.name].max() <= 1 and events[c.name].n_unique() > 1]  # type: ignore[operator]
    table = grouped.agg(pl.col(c.name).drop_nulls().first() for c in found)
    return table.rename({key: KEY}), found


def is_feature(column: Column) -> bool:
    """Return whether a column of the events may be a feature of users or items."""
    return column.role == "feature" and column.kind in USABLE_KINDS and not normalize_name(column.name).startswith("#")

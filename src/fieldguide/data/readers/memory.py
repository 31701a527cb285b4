"""Reader for in-memory data: polars and pandas data frames, and dictionaries of arrays."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FILE, LINE, FileEntry
from fieldguide.data.readers.table import split_by_column
from fieldguide.data.source import Options, RawTable, sha256

NAME = "memory"
UNDERSTANDS = "data frames in Python: of polars or pandas, a dictionary of arrays, or rows as dictionaries or pandas series"
SCALARS = (str, int, float, bool, np.generic, date, type(None))


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    return 10 if isinstance(source, pl.DataFrame | dict) or is_pandas(source) else 0


def is_pandas(source: Any) -> bool:
    """Return whether the object is a pandas data frame, without importing pandas."""
    return type(source).__module__.split(".")[0] == "pandas" and hasattr(source, "to_dict")


def load(source: Any, options: Options) -> RawTable:
    """Convert a data frame, a row or a dictionary of arrays. Raises DataError if it has no rows or lengths differ."""
    if (table := as_table(source)) is not None:
        rows = table
    elif isinstance(source, pl.DataFrame):
        rows = source
    else:
        columns = {str(k): source[k] for k in source}
        lengths = {k: len(v) for k, v in columns.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"the arrays differ in length: {lengths}.")
        rows = pl.DataFrame([to_series(k, v) for k, v in columns.items()])
    if rows.height == 0:
        raise DataError("the table in memory has no rows.")
    content = rows.write_ipc(None).getvalue() if not any(t == pl.Object for t in rows.dtypes) else b""
    rows = rows.with_columns(pl.lit(0, pl.Int32).alias(FILE), pl.Series(LINE, range(1, rows.height + 1)))
    files = [FileEntry("memory", len(content), sha256(content), rows=rows.height)]
    return split_by_column(RawTable(rows, files, Path.cwd()))


def as_row(source: Any) -> dict[str, Any] | None:
    """Return a dictionary of single values or a pandas series as a row; None for anything else.

    A list of dictionaries, such as the messages of a conversation, is a single value; other lists may be columns.
    """
    if is_pandas(source) and getattr(source, "ndim", 0) == 1:
        return {str(name): value for name, value in source.items()}
    if isinstance(source, dict) and source and all(isinstance(v, SCALARS) or is_nested(v) for v in source.values()):
        return {str(name): value for name, value in source.items()}
    return None


def is_nested(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def as_table(source: Any) -> pl.DataFrame | None:
    """Return a row, or a list of rows, as a data frame; None for anything else."""
    if isinstance(source, list | tuple):  # in a list, a dictionary is a row, whatever its values
        rows = [dict(value) if isinstance(value, dict) and value else as_row(value) for value in source]
    else:
        rows = [as_row(source)]
    present = [row for row in rows if row is not None]
    if not rows or len(present) < len(rows):
        return None
    names = dict.fromkeys(name for row in present for name in row)
    cells = {name: [row.get(name) for row in present] for name in names}
    return pl.DataFrame([to_cells(name, values) for name, values in cells.items()])


def to_cells(name: str, values: list[Any]) -> pl.Series:
    """Convert the values of one column of rows; lists stay lists."""
    if any(isinstance(value, list | tuple) for value in values):
        return pl.Series(name, values, strict=False)
    return to_series(name, np.array(values, dtype=object))


def to_series(name: str, values: Any) -> pl.Series:
    """Convert an array, list or pandas series to a column; objects of mixed types become text. Raises DataError if the
    values are not one-dimensional."""
    if isinstance(values, pl.Series):
        return values.rename(name)
    array = values.to_numpy() if hasattr(values, "to_numpy") else np.asarray(values)
    if array.ndim != 1:
        raise DataError(f"{name!r} has shape {array.shape}; a column must be one-dimensional.")
    if array.dtype != object:
        return pl.Series(name, array)
    cells = [None if v is None or v != v else v for v in array.tolist()]  # v != v: NaN and pandas' NaT
    try:
        return pl.Series(name, cells, strict=True)
    except (TypeError, pl.exceptions.PolarsError):
        return pl.Series(name, [None if v is None else str(v) for v in cells], dtype=pl.String)

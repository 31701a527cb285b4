"""`Predictions`: the records that a predictor returns, as a list, as a data frame, or as files."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.core.files import make_folder, report_write_errors, write_atomically
from fieldguide.core.media import Media
from fieldguide.data.dataset import BOOKKEEPING, CellProblems

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
MEDIA_FOLDER = "predictions"  # folder of predictions that are files, unless the user names another


class Predictions(list):
    """One record for each input, as dictionaries.

    `notes` say what was truncated or guessed; `problems` are the cells of the inputs that do not fit the training data:
    malformed ones, categories that training did not have, and values far outside the training range. `inputs` is the table that
    was read, with one row for each record and all of its columns; None if the inputs were no table.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        notes: Sequence[str] = (),
        problems: Sequence[CellProblems] = (),
        inputs: pl.DataFrame | None = None,
    ):
        super().__init__(records)
        self.notes, self.problems = list(notes), list(problems)
        self.inputs = inputs if inputs is not None and inputs.height == len(self) else None

    def to_frame(self) -> pl.DataFrame:
        """Return the inputs and the predictions as a data frame, with one row for each record.

        Class probabilities become one column for each class (`probability_NAME`). A prediction whose name an input column has
        already is called `predicted_NAME`. Media are columns of bytes until `save_media` has written them.
        """
        taken = [] if self.inputs is None else [c for c in self.inputs.columns if c not in BOOKKEEPING]
        columns: dict[str, list[Any]] = {}
        for i, record in enumerate(self):
            for name, value in flatten(record, hide_input=self.inputs is not None).items():
                columns.setdefault(name, [None] * len(self))[i] = value
        predicted = {rename(name, taken): to_column(values) for name, values in columns.items()}
        frame = pl.DataFrame([values.alias(name) for name, values in predicted.items()])
        return frame if self.inputs is None else pl.concat([self.inputs.select(taken), frame], how="horizontal")

    def to_pandas(self) -> Any:
        """Return `to_frame()` as a pandas data frame. Raises `ImportError` if pandas is not installed."""
        pandas: Any = importlib.import_module("pandas")  # the user's own library, never required
        return pandas.DataFrame(self.to_frame().to_dict(as_series=False))

    def save(self, path: str | Path) -> Path:
        """Write `to_frame()` as .csv, .tsv, .parquet or .jsonl, and media into a folder next to it; return the path.

        Nested values are written as JSON in .csv and .tsv. Raises `DataError` for another suffix and for a file that exists.
        """
        path = Path(path)
        check_output(path)
        self.save_media(path.with_suffix(""))
        frame, suffix = self.to_frame(), path.suffix.lower()
        make_folder(path.parent)
        if suffix in (".csv", ".tsv"):
            nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
            frame = frame.with_columns(pl.Series(n, [to_json(v) for v in frame[n].to_list()], dtype=pl.String) for n in nested)
            content = frame.write_csv(separator="," if suffix == ".csv" else "\t").encode()
        elif suffix == ".parquet":
            from io import BytesIO

            buffer = BytesIO()
            frame.write_parquet(buffer)
            content = buffer.getvalue()
        else:
            content = "".join(f"{to_json(row)}\n" for row in frame.iter_rows(named=True)).encode()
        write_atomically(path, content)
        return path

    def save_media(self, folder: str | Path | None = None) -> Predictions:
        """Write images and videos to a folder, and replace them in the records by their paths.

        Files are named after their input (`cat.jpg` gives `cat.png`, or `cat-mask.png` if there are several for each input), else
        numbered. Existing files are never overwritten: the name gets a number. Returns self.
        """
        folder = Path(folder or MEDIA_FOLDER)
        for number, record in enumerate(self, 1):
            media = {name: value for name, value in record.items() if isinstance(value, Media)}
            for name, value in media.items():
                make_folder(folder)
                stem = input_stem(record) or f"{number:05d}"
                path = write_new(folder, stem if len(media) == 1 else f"{stem}-{name}", value)
                record[name] = str(path)
        return self


def check_output(path: Path) -> None:
    """Raise `DataError` if predictions cannot be written to a path: before anything is computed."""
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise DataError(f"{path}: predictions are written as {', '.join(TABLE_SUFFIXES)}.")
    if path.exists():
        raise DataError(f"{path} exists. Choose another name, or remove it.")


def write_new(folder: Path, stem: str, media: Media) -> Path:
    """Write a file under a name that does not exist yet, and return its path."""
    for number in range(1_000_000):
        path = folder / f"{stem}{f'-{number}' if number else ''}{media.suffix}"
        with report_write_errors(path):
            try:
                with path.open("xb") as file:
                    file.write(media.content)
            except FileExistsError:
                continue
            except OSError:
                path.unlink(missing_ok=True)
                raise
            return path
    raise DataError(f"{folder}: no free name for {stem}{media.suffix}. Choose another folder with --out.")


def input_stem(record: Mapping[str, Any]) -> str:
    """Return the name without suffix of the file that a record's input came from; "" if it was no file of its own."""
    name = os.path.basename(str(record.get("input") or ""))
    stem, suffix = os.path.splitext(name)
    return stem if suffix and ":" not in suffix and len(name) < 200 else ""


def flatten(record: Mapping[str, Any], hide_input: bool) -> dict[str, Any]:
    """Return the values of a record by column name."""
    columns: dict[str, Any] = {}
    for name, value in record.items():
        if name == "probabilities" and isinstance(value, dict):
            columns |= {f"probability_{label}": p for label, p in value.items()}
        elif isinstance(value, dict):
            columns |= {f"{name}_{key}": item for key, item in value.items()}
        elif name != "input" or not hide_input:
            columns[name] = value.content if isinstance(value, Media) else value
    return columns


def rename(name: str, taken: Sequence[str]) -> str:
    """Return the name of a predicted column, which differs from those of the inputs."""
    while name in taken:
        name = f"predicted_{name}"
    return name


def to_column(values: list[Any]) -> pl.Series:
    """Return values as a column; values that fit in no type of column are written as JSON."""
    try:
        return pl.Series(values, strict=True)
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError):
        return pl.Series([v if v is None or isinstance(v, str) else to_json(v) for v in values], dtype=pl.String)


def to_json(value: Any) -> str | None:
    """Return a value as JSON; dates and other objects as text."""
    return None if value is None else json.dumps(value, ensure_ascii=False, default=str)

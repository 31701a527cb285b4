"""Reader for tables: CSV, TSV, Parquet and JSON Lines; one file, or a folder with one file per split."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FILE, LINE, FileEntry, Finding
from fieldguide.data.readers import delimited
from fieldguide.data.source import SPLIT_NAMES, Options, RawTable, list_visible, relative_path, sha256, split_of

NAME = "table"
UNDERSTANDS = (
    "a table: .csv, .tsv, .parquet or .jsonl; a folder with one such file, or with one for each of train, val and test"
)
DELIMITED, PARQUET, JSON = (".csv", ".tsv", ".tab", ".inter"), (".parquet", ".pq"), (".jsonl", ".ndjson")
SUPPORTED_SUFFIXES = DELIMITED + PARQUET + JSON
SPLIT_COLUMNS = ("split", "subset", "partition")


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path):
        return 0
    if source.is_file():
        return 10 if source.suffix.lower() in SUPPORTED_SUFFIXES else 0
    return 8 if list_tables(source) else 0


def list_tables(folder: Path) -> list[Path]:
    """Return the table files in a folder."""
    return [p for p in list_visible(folder)[0] if p.is_file() and p.suffix.lower() in SUPPORTED_SUFFIXES]


def load(source: Path, options: Options) -> RawTable:
    """Read one table, or one table per split. Raises DataError if a folder holds several other tables."""
    if source.is_file():
        raw = load_file(source, source.parent, options)
        return split_by_column(raw)
    files = list_tables(source)
    if len(files) == 1:
        return split_by_column(load_file(files[0], source, options))
    named = {p: split_of(p.name) for p in files}
    if None in named.values() or len(set(named.values())) < len(files):
        listed = ", ".join(p.name for p in files)
        raise DataError(
            f"{source}: contains several tables ({listed}). Specify one, or name them train, val and test, one file each."
        )
    return join_splits([(load_file(p, source, options), str(s)) for p, s in named.items()], source)


def load_file(path: Path, root: Path, options: Options) -> RawTable:
    """Read one file. Raises DataError if it is empty or invalid."""
    name, suffix = relative_path(path, root), path.suffix.lower()
    if path.stat().st_size == 0:
        raise DataError(f"{name}: the file is empty.")
    content = path.read_bytes()
    entry = (len(content), sha256(content))
    findings: list[Finding] = []
    if suffix in DELIMITED:
        text, findings = delimited.decode(content, name)
        del content
        table = delimited.parse(text, name, header=options.header, names=options.names, target=options.target)
        rows, findings = table.rows, findings + table.findings
    elif suffix in PARQUET:
        rows = read_parquet(content, name)
    else:
        content, findings = delimited.decode(content, name)
        rows = read_json_lines(content, name)
    rows.insert_column(rows.width, pl.repeat(0, rows.height, dtype=pl.Int32, eager=True).alias(FILE))
    return RawTable(rows, [FileEntry(name, *entry, rows=rows.height)], root, findings)


def read_parquet(content: bytes, name: str) -> pl.DataFrame:
    """Read Parquet. Raises DataError if it is invalid or has no rows."""
    try:
        rows = pl.read_parquet(io.BytesIO(content))
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{name}: not a readable Parquet file ({str(error).splitlines()[0]}).") from error
    if rows.height == 0:
        raise DataError(f"{name}: the file has no rows.")
    return rows.with_columns(pl.Series(LINE, range(1, rows.height + 1), dtype=pl.Int64))


def read_json_lines(content: bytes, name: str) -> pl.DataFrame:
    """Read JSON Lines; nested objects become columns such as a.b. Raises DataError for the first invalid line."""
    lines = [i for i, l in enumerate(content.split(b"\n"), 1) if l.strip()]
    try:
        rows = pl.read_ndjson(io.BytesIO(content), infer_schema_length=None)
    except (pl.exceptions.PolarsError, RuntimeError):
        rows = None
    if rows is None or rows.height != len(lines):
        for number, line in enumerate(content.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                ok = isinstance(json.loads(line), dict)
            except ValueError:
                ok = False
            if not ok:
                raise DataError(f"{name}:{number}: not a JSON object. JSON Lines has one {{...}} per line.")
        raise DataError(f"{name}: could not be read as JSON Lines.")
    for name, kind in rows.schema.items():
        if not isinstance(kind, pl.Struct):
            continue
        fields = [f"{name}.{field.name}" for field in kind.fields]  # {"a": {"b": 1}} -> a.b
        rows = rows.with_columns(pl.col(name).struct.rename_fields(fields)).unnest(name)
    return rows.with_columns(pl.Series(LINE, lines, dtype=pl.Int64))


def split_by_column(raw: RawTable) -> RawTable:
    """Use a column named `split` that contains only train, val and test as the splits."""
    for name in raw.rows.columns:
        if name.lower() not in SPLIT_COLUMNS or raw.rows[name].dtype != pl.String:
            continue
        values = raw.rows[name].str.strip_chars().str.to_lowercase()
        if values.null_count() == 0 and bool(values.is_in(list(SPLIT_NAMES)).all()):
            raw.splits = values.replace_strict(SPLIT_NAMES).to_numpy().astype(object)
            raw.kinds[name] = "category"
            raw.split_column = name
    return raw


def join_splits(parts: list[tuple[RawTable, str]], root: Path) -> RawTable:
    """Concatenate files with the same columns, one per split. Raises DataError if the columns differ."""
    order = {"train": 0, "val": 1, "test": 2}
    parts = sorted(parts, key=lambda p: order[p[1]])
    first = parts[0][0]
    names = [c for c in first.rows.columns if c not in (FILE, LINE)]
    for raw, _ in parts[1:]:
        other = [c for c in raw.rows.columns if c not in (FILE, LINE)]
        if set(other) != set(names):
            lacks, extra = sorted(set(names) - set(other)), sorted(set(other) - set(names))
            raise DataError(
                f"{raw.files[0].path} and {first.files[0].path} have different columns: the "
                f"first lacks {lacks or 'none'} and additionally has {extra or 'none'}."
            )
    tables = [
        raw.rows.with_columns(pl.lit(i, pl.Int32).alias(FILE)).select([*names, FILE, LINE]) for i, (raw, _) in enumerate(parts)
    ]
    rows = pl.concat(tables, how="vertical_relaxed")
    splits = np.repeat(np.array([s for _, s in parts], dtype=object), [t.height for t in tables])
    findings = [f for raw, _ in parts for f in raw.findings]
    return RawTable(rows, [raw.files[0] for raw, _ in parts], root, findings, splits)

"""Reader for tables: CSV, TSV, Parquet, JSON Lines and lists of JSON objects; one file, or a folder with one file per split."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.core.hardware import ram
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import FILE, LINE, FileEntry, Finding
from fieldguide.data.readers import delimited
from fieldguide.data.readers.json_tables import is_list_of_objects, read_json_lines, read_json_list
from fieldguide.data.source import SPLIT_NAMES, Options, RawTable, folder_split, list_visible, relative_path, sha256, split_of

NAME = "table"
UNDERSTANDS = (
    "tables (.csv, .tsv, .parquet, .jsonl, or .json with a list of objects): one file, a folder with one such file, or with one for "
    "each of train, val and test"
)
DELIMITED, PARQUET, JSON = (".csv", ".tsv", ".tab", ".inter"), (".parquet", ".pq"), (".jsonl", ".ndjson")
OTHER_DELIMITED = (".data", ".dat")  # of repositories such as UCI's; not searched for in folders
SUPPORTED_SUFFIXES = DELIMITED + PARQUET + JSON
CELL_BYTES = 16  # of memory for a cell, at least
NOTES = (".md", ".txt", ".pdf", "")  # files next to a folder of data, such as a readme or license
MAX_JSON_FILES = 10  # JSON files of a folder that may be tables
SPLIT_COLUMNS = ("split", "subset", "partition")


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path):
        return 0
    if source.is_file():
        suffix = source.suffix.lower()
        return (
            10 if suffix in SUPPORTED_SUFFIXES else 8 if suffix in OTHER_DELIMITED else 3 if is_list_of_objects(source) else 0
        )
    tables = list_tables(source)
    return 0 if not tables else 3 if any(p.suffix.lower() == ".json" for p in tables) else 8


def list_tables(folder: Path) -> list[Path]:
    """Return the table files in a folder; if there are none, JSON files that are lists of objects."""
    files = [p for p in list_visible(folder)[0] if p.is_file()]
    found = [p for p in files if p.suffix.lower() in SUPPORTED_SUFFIXES]
    lists = [p for p in files if p.suffix.lower() == ".json"] if not found else []
    return found or [p for p in lists[:MAX_JSON_FILES] if is_list_of_objects(p)]


def find_table_folder(folder: Path) -> Path:
    """Return the folder of tables: the folder itself, or one that it contains alone (data/metadata.csv); else the folder."""
    inner = folder
    while not list_tables(inner):
        found = list_visible(inner)[0]
        folders = [p for p in found if p.is_dir() and not p.is_symlink()]
        if len(folders) != 1 or any(p.suffix.lower() not in NOTES for p in found if p.is_file()):
            return folder
        inner = folders[0]
    return inner


def load(source: Path, options: Options) -> RawTable:
    """Read one table, or one table per split. Raises DataError if a folder holds several other tables."""
    if source.is_file():
        raw = load_file(source, source.parent, options)
        return split_by_column(raw)
    files, submissions = set_submissions_aside(list_tables(source))
    if len(files) == 1:
        raw = split_by_column(load_file(files[0], source, options))
        raw.findings += submissions
        return raw
    named = {p: split_of(p.name) or folder_split(p.stem) for p in files}
    if None in named.values() or len(set(named.values())) < len(files):
        listed = ", ".join(p.name for p in files)
        raise DataError(
            f"{source}: contains several tables ({listed}). Specify one, or name them train, val and test, one file each."
        )
    raw = join_splits([(load_file(p, source, options), str(s)) for p, s in named.items()], source, options.target)
    raw.findings += submissions
    return raw


def set_submissions_aside(files: list[Path]) -> tuple[list[Path], list[Finding]]:
    """Return the files without examples of submissions to a competition (`sample_submission.csv`), and a note about them."""
    kept = [p for p in files if "submission" not in p.stem.lower()]
    other = [p.name for p in files if p not in kept]
    if not other or not kept:
        return files, []
    return kept, [Finding("submission-file", "note", "examples of submissions are not read", tuple(other), len(other))]


def load_file(path: Path, root: Path, options: Options) -> RawTable:
    """Read one file. Raises DataError if it is empty or invalid."""
    name, suffix = relative_path(path, root), path.suffix.lower()
    if path.stat().st_size == 0:
        raise DataError(f"{name}: the file is empty.")
    content = path.read_bytes()
    entry = (len(content), sha256(content))
    findings: list[Finding] = []
    delimiter = None
    if suffix in DELIMITED + OTHER_DELIMITED:
        text, findings = delimited.decode(content, name)
        del content
        table = delimited.parse(text, name, header=options.header, names=options.names, target=options.target)
        rows, findings, delimiter = table.rows, findings + table.findings, table.delimiter
    elif suffix in PARQUET:
        rows = read_parquet(content, name)
    else:
        content, findings = delimited.decode(content, name)
        rows = (read_json_list if suffix == ".json" else read_json_lines)(content, name)
    rows.insert_column(rows.width, pl.repeat(0, rows.height, dtype=pl.Int32, eager=True).alias(FILE))
    return RawTable(rows, [FileEntry(name, *entry, rows=rows.height)], root, findings, delimiter=delimiter)


def read_parquet(content: bytes, name: str) -> pl.DataFrame:
    """Read Parquet. Raises DataError if it is invalid or has no rows."""
    try:
        check_size(content, name)
        rows = pl.read_parquet(io.BytesIO(content))
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{name}: not a readable Parquet file ({str(error).splitlines()[0]}).") from error
    if rows.height == 0:
        raise DataError(f"{name}: the file has no rows.")
    return rows.with_columns(pl.Series(LINE, range(1, rows.height + 1), dtype=pl.Int64))


def check_size(content: bytes, name: str) -> None:
    """Raise DataError for a Parquet file with more cells than fit into memory, which a small file may hold."""
    table = pl.scan_parquet(io.BytesIO(content))
    width, height = table.collect_schema().len(), int(table.select(pl.len()).collect().item())
    delimited.check_width(width, name)
    if width * height * CELL_BYTES > ram():
        raise DataError(
            f"{name}: {height:,} rows of {width:,} columns do not fit into the memory of this machine ({ram() >> 30} GiB). Use fewer."
        )


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


def value_columns(raw: RawTable) -> list[str]:
    """Return the columns of a file that hold values."""
    return [c for c in raw.rows.columns if c not in (FILE, LINE)]


def filled_columns(raw: RawTable) -> set[str]:
    """Return the columns of a file that hold at least one value."""
    return {c for c in value_columns(raw) if raw.rows[c].null_count() < raw.rows.height}


def set_unlabeled_aside(
    parts: list[tuple[RawTable, str]], target: str | None
) -> tuple[list[tuple[RawTable, str]], str | None, list[Finding]]:
    """Return the parts without a test file that lacks the target, the name of the target, and a note about that file.

    Such a file is the set to predict, as in the competitions of Kaggle. Without `target`, the only column that it lacks is the
    target.
    """
    known = {c for raw, split in parts if split == "train" for c in filled_columns(raw)}
    kept: list[tuple[RawTable, str]] = []
    findings: list[Finding] = []
    for raw, split in parts:
        lacks, extra = known - filled_columns(raw), set(value_columns(raw)) - known
        targets = {n.strip() for n in target.split(",")} if target else set()
        if not target and len(lacks) == 1 and not extra - lacks and not ColumnSpec().by_name("target", sorted(known - lacks)):
            targets = lacks
        if split != "test" or not targets or not targets <= lacks or not known:
            kept.append((raw, split))
            continue
        if target is None:
            what = f"no target was specified: column {min(lacks)!r} was chosen because only {raw.files[0].path} lacks it"
            remedy = "Specify another with --target (in Python: target=)."
            findings.append(Finding("target-chosen", "note", what, (f"column {min(lacks)!r}",), 1, remedy))
        target = target or next(iter(targets))
        shown = raw.files[0].path
        rest = sorted(lacks - targets)
        findings.append(
            Finding(
                "unlabeled-test",
                "warning" if rest else "note",
                f"{shown} has no values in the target column {target!r}: it is the set to predict, and the test set is taken "
                "from the training rows"
                + (f". It also lacks {', '.join(map(repr, rest))}, which prediction will need" if rest else ""),
                (shown,),
                1,
                f"Predict with `fieldguide predict RUN {shown}`."
                + (f" To train without a column: --set 'column.{rest[0]}=identifier'." if rest else ""),
            )
        )
    return kept, target, findings


def join_splits(parts: list[tuple[RawTable, str]], root: Path, target: str | None = None) -> RawTable:
    """Concatenate files with the same columns, one per split. Raises DataError if the columns differ.

    A test file without the target is set aside.
    """
    order = {"train": 0, "val": 1, "test": 2}
    parts, named, aside = set_unlabeled_aside(sorted(parts, key=lambda p: order[p[1]]), target)
    first = parts[0][0]
    if len(parts) == 1 and aside:
        first.findings += aside
        first.target = named if target is None else None
        return split_by_column(first)
    names = [c for c in first.rows.columns if c not in (FILE, LINE)]
    for raw, _ in parts[1:]:
        other = [c for c in raw.rows.columns if c not in (FILE, LINE)]
        if set(other) != set(names):
            lacks, extra = sorted(set(names) - set(other)), sorted(set(other) - set(names))
            raise DataError(
                f"{raw.files[0].path} and {first.files[0].path} have different columns: the "
                f"first lacks {lacks or 'none'} and additionally has {extra or 'none'}. If {raw.files[0].path} is to be predicted, "
                "name the target with --target; otherwise give both the same columns."
            )
    tables = [
        raw.rows.with_columns(pl.lit(i, pl.Int32).alias(FILE)).select([*names, FILE, LINE]) for i, (raw, _) in enumerate(parts)
    ]
    rows = pl.concat(tables, how="vertical_relaxed")
    splits = np.repeat(np.array([s for _, s in parts], dtype=object), [t.height for t in tables])
    findings = [f for raw, _ in parts for f in raw.findings] + aside
    joined = RawTable(rows, [raw.files[0] for raw, _ in parts], root, findings, splits, delimiter=first.delimiter)
    joined.target = named if target is None else None
    return joined

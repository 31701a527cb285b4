"""Reader for the `.ts` files of the UCR and UEA archives: one labeled series per line, channels separated by colons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FILE, LINE, FileEntry
from fieldguide.data.readers import delimited
from fieldguide.data.readers.table import join_splits
from fieldguide.data.source import Options, RawTable, list_visible, relative_path, sha256, split_of

NAME = "ts"
UNDERSTANDS = (
    "series of the UCR and UEA archives (.ts): values, then channels after colons, then the label, one series per line"
)
MISSING = {"?", "nan", ""}


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path):
        return 0
    files = [source] if source.is_file() else find_files(source)
    return 8 if files and all(is_series_file(path) for path in files) else 0


def find_files(folder: Path) -> list[Path]:
    """Return the `.ts` files of a folder; other files, such as descriptions, are not read."""
    return [path for path in list_visible(folder)[0] if path.is_file() and path.suffix.lower() == ".ts"]


def is_series_file(path: Path) -> bool:
    """Return whether a file has the line `@data`; `.ts` is also the suffix of programs and videos."""
    if path.suffix.lower() != ".ts":
        return False
    with path.open("rb") as file:
        return b"@data" in file.read(1 << 16).lower()


def load(source: Path, options: Options) -> RawTable:
    """Read one file, or a folder with one file per split (`NAME_TRAIN.ts`, `NAME_TEST.ts`)."""
    if source.is_file():
        return load_file(source, source.parent)
    files = find_files(source)
    if len(files) == 1:
        return load_file(files[0], source)
    if lacking := [path.name for path in files if split_of(path.name) is None]:
        raise DataError(f"{source}: {', '.join(lacking)}: not named after a split, such as NAME_TRAIN.ts and NAME_TEST.ts.")
    parts = [(load_file(path, source), str(split_of(path.name))) for path in files]
    if len({split for _, split in parts}) < len(parts):
        raise DataError(f"{source}: several files for one split: {', '.join(raw.files[0].path for raw, _ in parts)}.")
    raw = join_splits(parts, source)
    first = parts[0][0]
    raw.kinds, raw.target, raw.roles = first.kinds, first.target, first.roles
    return raw


def load_file(path: Path, root: Path) -> RawTable:
    """Read one file as a long table: a row per step, with the number of its series, the channels and the label."""
    name, content = relative_path(path, root), path.read_bytes()
    text, findings = delimited.decode(content, name)
    lines = text.decode().replace("\r\n", "\n").split("\n")
    header, start = read_header(lines, name)
    is_labeled = header.get("classlabel", ["false"])[0].lower() == "true"
    known = header["classlabel"][1:] if is_labeled else []
    numbers: list[int] = []
    labels: list[str | None] = []
    series: list[np.ndarray] = []
    for number, line in enumerate(lines[start:], start + 1):
        line = line.strip()
        if not line or line.startswith(("#", "%")):
            continue
        parts = line.split(":")
        if is_labeled:
            label = parts.pop().strip()
            if known and label not in known and label not in MISSING:
                raise DataError(
                    f"{name}:{number}: the label {label!r} is none of those in @classLabel: {', '.join(known[:10])}."
                )
            labels.append(None if label in MISSING else label)
        series.append(read_series(parts, f"{name}:{number}"))
        numbers.append(number)
        if len(series[-1]) != len(series[0]):
            raise DataError(
                f"{name}:{number}: {count(len(series[-1]))}, but line {numbers[0]} has {count(len(series[0]))}. Channels are "
                f"separated by colons{', and the label follows the last one' if is_labeled else ''}."
            )
    if not series:
        raise DataError(f"{name}: no series after @data.")
    lengths = np.array([s.shape[1] for s in series])
    columns: dict[str, Any] = {
        "series": np.repeat(np.arange(1, len(series) + 1), lengths),
        "step": np.concatenate([np.arange(n) for n in lengths]),
    }
    table = np.concatenate(series, 1)
    names = ["value"] if len(table) == 1 else [f"channel_{i}" for i in range(1, len(table) + 1)]
    columns |= dict(zip(names, table))
    rows = pl.DataFrame(columns).with_columns(pl.col(names).fill_nan(None))
    if is_labeled:
        rows = rows.with_columns(pl.Series("label", labels, dtype=pl.String)[np.repeat(np.arange(len(series)), lengths)])
    rows = rows.with_columns(
        pl.lit(0, pl.Int32).alias(FILE), pl.Series(LINE, np.repeat(numbers, lengths)), pl.col("series").cast(pl.String)
    )
    raw = RawTable(rows, [FileEntry(name, len(content), sha256(content), rows=rows.height)], root, findings)
    raw.kinds = {"series": "category", **dict.fromkeys(names, "number")}
    raw.roles = {"series": "series", "step": "time"}
    if is_labeled:
        raw.target, raw.kinds["label"] = "label", "category"
    return raw


def read_header(lines: list[str], name: str) -> tuple[dict[str, list[str]], int]:
    """Return the words of each `@` line by its name, and the index of the first line of data."""
    header: dict[str, list[str]] = {}
    for i, line in enumerate(lines):
        words = line.split()
        if words and words[0].startswith("@"):
            if words[0].lower() == "@data":
                return header, i + 1
            header[words[0][1:].lower()] = words[1:]
        elif words and not words[0].startswith(("#", "%")):
            raise DataError(f"{name}:{i + 1}: {line[:40]!r} is before @data. Header lines begin with @, comments with #.")
    raise DataError(f"{name}: there is no line @data.")


def read_series(parts: list[str], place: str) -> np.ndarray:  # -> C T
    """Return the channels of a line; shorter ones are missing at their end. Time stamps, `(time, value)`, are left out."""
    channels = []
    for number, part in enumerate(parts, 1):
        words = [word.strip(" ()") for word in part.split("),(")] if "(" in part else part.split(",")
        cells = [word.rpartition(",")[2] if "(" in part else word for word in words]
        values = []
        for cell in cells:
            try:
                values.append(np.nan if cell.strip().lower() in MISSING else float(cell))
            except ValueError:
                raise DataError(
                    f"{place}: {cell.strip()[:30]!r} in channel {number} is not a number; missing values are ?."
                ) from None
        channels.append(values)
    steps = max(len(values) for values in channels)
    return np.array([values + [np.nan] * (steps - len(values)) for values in channels])


def count(channels: int) -> str:
    return f"{channels} channel{'s' if channels > 1 else ''}"

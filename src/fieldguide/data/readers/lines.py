"""Reader for labeled lines: a class, a space and a text on every line; one file, or a folder with one file per split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FILE, LINE, FileEntry, Finding
from fieldguide.data.readers import delimited
from fieldguide.data.readers.table import join_splits
from fieldguide.data.source import Options, RawTable, list_visible, relative_path, sha256, split_of

NAME = "lines"
UNDERSTANDS = "labeled lines: a text file (.txt, .train, ...) with `class text` on every line"
OTHER_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".zip", ".gz", ".py", ".md", ".html", ".xml")


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path):
        return 0
    files = [source] if source.is_file() else list_files(source)
    return 4 if files and all(is_labeled(p) for p in files) else 0


def list_files(folder: Path) -> list[Path]:
    """Return the files of a folder if all are named after splits, else an empty list."""
    found = list_visible(folder)[0]
    return found if found and all(p.is_file() and split_of(p.name) for p in found) else []


def is_labeled(path: Path) -> bool:
    """Return whether the first lines start with few distinct words, each followed by more text."""
    if path.suffix.lower() in OTHER_SUFFIXES or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        head = file.read(1 << 16)
    if b"\0" in head:
        return False
    lines = [l.split(None, 1) for l in head.split(b"\n")[:-1] if l.strip()]
    firsts = {l[0] for l in lines}
    return len(lines) >= 4 and all(len(l) == 2 for l in lines) and 2 <= len(firsts) <= max(2, len(lines) // 4)


def load(source: Path, options: Options) -> RawTable:
    """Read one file or a folder with one file per split."""
    if source.is_file():
        return load_file(source, source.parent)
    parts = [(load_file(p, source), str(split_of(p.name))) for p in list_files(source)]
    if len({s for _, s in parts}) < len(parts):
        raise DataError(f"{source}: several files for one split: {', '.join(r.files[0].path for r, _ in parts)}.")
    raw = join_splits(parts, source)
    raw.kinds, raw.target = {"text": "text"}, "label"
    return raw


def load_file(path: Path, root: Path) -> RawTable:
    """Read one file of labeled lines."""
    name = relative_path(path, root)
    content = path.read_bytes()
    text, findings = delimited.decode(content, name)
    lines = pl.Series("line", text.decode().split("\n")).str.strip_chars()
    rows = pl.DataFrame({LINE: pl.Series(range(1, lines.len() + 1), dtype=pl.Int64), "line": lines})
    rows = rows.filter(pl.col("line") != "")
    parts = pl.col("line").str.extract_groups(r"^(?P<label>\S+)\s+(?P<text>(?s:.+))$")
    rows = rows.with_columns(parts.alias("parts")).unnest("parts").drop("line")
    bad = rows.filter(pl.col("text").is_null())[LINE].to_list()
    if bad:
        findings.append(
            Finding(
                "label-only",
                "warning",
                "lines with a class but no text",
                tuple(f"{name}:{l}" for l in bad[:5]),
                len(bad),
                "Add the text or remove the line.",
            )
        )
    rows = rows.select("text", "label", pl.lit(0, pl.Int32).alias(FILE), LINE)
    return RawTable(
        rows,
        [FileEntry(name, len(content), sha256(content), rows=rows.height)],
        root,
        findings,
        kinds={"text": "text"},
        target="label",
    )

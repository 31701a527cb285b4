"""Reader for folders of text files: a folder per class, as for images; each file is one text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FILE, LINE, FileEntry, Finding
from fieldguide.data.readers import delimited
from fieldguide.data.readers.image_folder import is_hidden, load_classes, relative_paths
from fieldguide.data.source import Options, RawTable, relative_path, sha256

NAME = "texts"
UNDERSTANDS = "texts: a folder with a folder of .txt files for each class, optionally below train, val and test"
SUFFIXES = frozenset((".txt", ".text"))


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path) or not source.is_dir():
        return 0
    for at, folders, files in os.walk(source):
        folders[:] = [f for f in folders if not is_hidden(f)]
        texts = [f for f in files if os.path.splitext(f)[1].lower() in SUFFIXES and not is_hidden(f)]
        if texts and Path(at) != source:
            return 3
    return 0


def load(source: Path, options: Options) -> RawTable:
    """Read all text files below class folders."""
    raw = load_classes(source, options, SUFFIXES, "text")
    texts: list[str | None] = []
    other: list[Path] = []
    for index, path in enumerate(map(Path, raw.rows["text"])):
        name, content = relative_path(path, source.absolute()), path.read_bytes()
        texts.append(None)
        if path.suffix.lower() not in SUFFIXES:
            other.append(path)
        else:
            try:
                text, findings = delimited.decode(content, name)
                texts[index] = text.decode().strip() or None
                raw.findings += findings
            except DataError as error:
                raw.findings.append(Finding("unreadable-file", "warning", str(error), (name,), 1))
        raw.files.append(FileEntry(name, len(content), sha256(content)))
    if other:
        raw.findings.append(
            Finding(
                "not-a-text",
                "warning",
                "files in class folders that are not .txt files",
                relative_paths(other, source.absolute()),
                len(other),
                "Remove them.",
            )
        )
    raw.rows = raw.rows.with_columns(
        pl.Series("text", texts, dtype=pl.String),
        pl.Series(FILE, range(len(texts)), dtype=pl.Int32),
        pl.lit(None, pl.Int64).alias(LINE),
    )
    return raw

"""Reader for plain texts: a .txt or .md file, or a folder of them; each file is one text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FILE, LINE, FileEntry, Finding
from fieldguide.data.readers import delimited
from fieldguide.data.source import Options, RawTable, list_visible, relative_path, sha256, split_of

NAME = "documents"
UNDERSTANDS = "plain texts: a .txt or .md file, or a folder of them; files named train, val and test define the splits"
SUFFIXES = (".txt", ".text", ".md")


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path):
        return 0
    return 2 if (source.suffix.lower() in SUFFIXES if source.is_file() else list_files(source)) else 0


def list_files(folder: Path) -> list[Path]:
    """Return the text files in a folder."""
    return [p for p in list_visible(folder)[0] if p.is_file() and p.suffix.lower() in SUFFIXES]


def load(source: Path, options: Options) -> RawTable:
    """Read one text file or a folder of them. Raises DataError if none can be used."""
    root = source if source.is_dir() else source.parent
    paths = list_files(source) if source.is_dir() else [source]
    texts, files, findings, kept, unusable = [], [], [], [], 0
    for path in paths:
        name, content = relative_path(path, root), path.read_bytes()
        try:
            decoded, found = delimited.decode(content, name)
            text, problem = decoded.decode(), None if content.strip() else "the file is empty"
            findings += found
        except DataError as error:
            problem = str(error)
        if problem:
            findings.append(
                Finding(
                    "unreadable-text",
                    "warning",
                    "files that cannot be read as text",
                    (f"{name} ({problem})",),
                    1,
                    "Save them again as UTF-8 text, or remove them.",
                    1,
                )
            )
            unusable += 1
        else:
            texts.append(text)
            kept.append(path)
        files.append(FileEntry(name, len(content), sha256(content), rows=int(not problem), dropped=int(bool(problem))))
    if not texts:
        raise DataError(f"{source}: no usable text." + "".join(f"\n  - {f}" for f in findings))
    index = [i for i, f in enumerate(files) if f.rows]
    rows = pl.DataFrame(
        {"text": texts, FILE: index, LINE: [1] * len(texts)}, schema={"text": pl.String, FILE: pl.Int32, LINE: pl.Int64}
    )
    named = [split_of(p.name) for p in kept]
    splits = np.array(named, dtype=object) if len(kept) > 1 and all(named) and len(set(named)) == len(named) else None
    return RawTable(rows, files, root, findings, splits, {"text": "text"}, unusable=unusable)

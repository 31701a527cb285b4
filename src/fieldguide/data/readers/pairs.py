"""Reader for parallel texts: two files with corresponding lines, `train.de` and `train.en`, or `de.txt` and `en.txt`; one
pair or a folder of pairs."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FILE, LINE, FileEntry
from fieldguide.data.readers import delimited
from fieldguide.data.source import Options, RawTable, list_visible, relative_path, sha256, split_of

NAME = "pairs"
UNDERSTANDS = (
    "parallel texts: a folder with two line-aligned files per split, named by language (train.de, train.en, "
    "test.de, test.en; or de.txt, en.txt), or one of two such files"
)


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    return 7 if isinstance(source, Path) and find_languages(source) else 0


def find_languages(source: Path) -> list[str]:
    """Return the two languages of a folder or file by their extensions, or an empty list if there are not exactly two."""
    folder = source if source.is_dir() else source.parent
    files = [p for p in list_visible(folder)[0] if p.is_file() and find_language(p)]
    if source.is_file():
        files = [p for p in files if pair_stem(p) == pair_stem(source)] if find_language(source) else []
    found = sorted({find_language(p) for p in files})
    return found if len(found) == 2 and len(files) >= 2 else []


def find_language(path: Path) -> str:
    """Return the language in a file name (`de` for train.de, `pt-br` for train.pt-br), or ""."""
    suffix = strip_txt(path).rpartition(".")[2].lower()
    plain = suffix.replace("-", "").replace("_", "")
    return (
        suffix
        if 2 <= len(plain) <= 5
        and plain.isalpha()
        and (len(suffix) <= 3 or len(plain) < len(suffix))
        and suffix not in NO_LANGUAGE
        else ""
    )


NO_LANGUAGE = {
    "txt",
    "csv",
    "tsv",
    "tab",
    "md",
    "zip",
    "gz",
    "py",
    "xml",
    "htm",
    "pdf",
    "doc",
    "jpg",
    "png",
    "gif",
    "wav",
    "mp",
    "ogg",
    "log",
    "cfg",
    "ini",
    "yml",
    "all",
    "dat",
    "bin",
    "json",
}


def strip_txt(path: Path) -> str:
    """Return the name without .txt if a language precedes it: `train.de` for train.de and train.de.txt."""
    return path.name[:-4] if path.suffix.lower() == ".txt" and len(path.name[:-4].rpartition(".")[2]) == 2 else path.name


def pair_stem(path: Path) -> str:
    """Return the part of the name that a pair shares: `train` for train.de."""
    return strip_txt(path).rpartition(".")[0]


def load(source: Path, options: Options) -> RawTable:
    """Read all pairs. Raises DataError if a partner is missing or line counts differ."""
    root = source if source.is_dir() else source.parent
    first, second = find_languages(source)
    pairs: dict[str, dict[str, Path]] = defaultdict(dict)
    for path in list_visible(root)[0]:
        if path.is_file() and find_language(path) and (source.is_dir() or pair_stem(path) == pair_stem(source)):
            pairs[pair_stem(path)][find_language(path)] = path
    parts, files, findings, splits = [], [], [], []
    for stem, pair in pairs.items():
        if len(pair) < 2:
            lone = next(iter(pair.values()))
            other = second if first in pair else first
            partner = (f"{stem}." if stem else "") + other + (".txt" if lone.suffix == ".txt" else "")
            raise DataError(f"{relative_path(lone, root)}: the partner file {partner} is missing. Add it, or remove this file.")
        columns, names = {}, {}
        for code in (first, second):
            content = pair[code].read_bytes()
            names[code] = relative_path(pair[code], root)
            if not content.strip():
                raise DataError(f"{names[code]}: the file is empty.")
            text, found = delimited.decode(content, names[code])
            findings += found
            columns[code] = text.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
            files.append(FileEntry(names[code], len(content), sha256(content), rows=0))
        counts = {code: len(lines) for code, lines in columns.items()}
        if counts[first] != counts[second]:
            blank = {
                code: next((i for i, line in enumerate(lines, 1) if not line.strip()), None) for code, lines in columns.items()
            }
            hint = "".join(f" The first empty line of {names[c]} is {at}." for c, at in blank.items() if at)
            raise DataError(
                f"{names[first]} has {counts[first]:,} lines but {names[second]} has {counts[second]:,}, so they cannot be "
                f"aligned.{hint} Line n of one must be the translation of line n of the other."
            )
        rows = pl.DataFrame(columns, schema={first: pl.String, second: pl.String}).with_columns(
            pl.lit(len(files) - 2, pl.Int32).alias(FILE), pl.Series(LINE, range(1, counts[first] + 1), dtype=pl.Int64)
        )
        files[-2] = FileEntry(files[-2].path, files[-2].bytes, files[-2].sha256, rows=counts[first])
        parts.append(rows)
        splits += [split_of(stem)] * counts[first]
    named = np.array(splits, dtype=object)
    return RawTable(
        pl.concat(parts),
        files,
        root,
        findings,
        named if all(splits) and len(set(splits)) > 1 else None,
        {first: "text", second: "text"},
    )

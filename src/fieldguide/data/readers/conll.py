"""Reader for CoNLL columns: a word and its tag per line, blank lines between sentences; one file, or one file per split."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FILE, LINE, FileEntry
from fieldguide.data.readers import delimited
from fieldguide.data.readers.lines import list_files
from fieldguide.data.readers.table import join_splits
from fieldguide.data.source import Options, RawTable, relative_path, sha256, split_of

NAME = "conll"
UNDERSTANDS = "CoNLL columns (.conll, .iob, .bio, ...): word first and tag last on each line, blank lines between sentences"
SUFFIXES = {".conll", ".iob", ".iob2", ".bio", ".bioes", ".iobes"}
TAG_PATTERN = re.compile(r"O|[BIESLU]-\S+")
POS_PATTERN = re.compile(
    r"[A-Z][A-Z0-9$|_-]{0,9}|[^\w\s]{1,5}"
)  # parts of speech: NOUN, NNP, PRP$, and marks such as `` or -LRB-
MAX_POS_TAGS = 60
MIN_WORDS_PER_POS_TAG = 2


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path):
        return 0
    files = [source] if source.is_file() else list_files(source)
    return 8 if files and all(p.suffix.lower() in SUFFIXES or has_tag_columns(p) for p in files) else 0


def has_tag_columns(path: Path) -> bool:
    """Return whether the first lines have equally many columns with tags in the last, and contain blank lines."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    if b"\0" in head or b"\n" not in head:
        return False
    lines = [line.split() for line in head.decode("utf-8", "replace").split("\n")[:-1]]
    full = [line for line in lines if line and line[0] != "-DOCSTART-"]
    return (
        len(full) >= 2
        and len(full) < len(lines)
        and len({len(line) for line in full}) == 1
        and len(full[0]) > 1
        and (all(TAG_PATTERN.fullmatch(line[-1]) for line in full) or has_pos_tags(full))
    )


def has_pos_tags(lines: list[list[str]]) -> bool:
    """Return whether the last column holds parts of speech: a few upper-case tags, each of several words."""
    tags, words = {line[-1] for line in lines}, {line[0] for line in lines}
    return (
        all(POS_PATTERN.fullmatch(tag) for tag in tags)
        and any(tag.isalpha() for tag in tags)
        and 2 <= len(tags) <= MAX_POS_TAGS
        and len(words) >= MIN_WORDS_PER_POS_TAG * len(tags)
        and any(word.islower() for word in words)
    )


def load(source: Path, options: Options) -> RawTable:
    """Read one file or a folder with one file per split."""
    if source.is_file():
        return load_file(source, source.parent)
    parts = [(load_file(p, source), str(split_of(p.name))) for p in list_files(source)]
    if len({split for _, split in parts}) < len(parts):
        raise DataError(f"{source}: several files for one split: {', '.join(raw.files[0].path for raw, _ in parts)}.")
    raw = join_splits(parts, source)
    raw.kinds, raw.target = {"tokens": "list", "tags": "list"}, "tags"
    return raw


def load_file(path: Path, root: Path) -> RawTable:
    """Read one file with one row per sentence. Raises DataError for a line without a tag."""
    name, content = relative_path(path, root), path.read_bytes()
    text, findings = delimited.decode(content, name)
    sentences: list[tuple[int, list[str], list[str]]] = []
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*text.decode().replace("\r\n", "\n").split("\n"), ""], 1):
        parts = line.split("\t") if "\t" in line else line.split()
        parts = [part.strip() for part in parts]
        if not any(parts) or parts[0] == "-DOCSTART-":
            if words:
                sentences.append((number - len(words), words, tags))
            words, tags = [], []
        elif len(parts) < 2 or not parts[0] or not parts[-1]:
            raise DataError(
                f"{name}:{number}: {line[:40]!r} has no tag. Each line must hold a word, optional columns and a tag; "
                "blank lines separate sentences."
            )
        else:
            words.append(parts[0])
            tags.append(parts[-1])
    if not sentences:
        raise DataError(f"{name}: no sentences.")
    rows = pl.DataFrame(
        {"tokens": [s[1] for s in sentences], "tags": [s[2] for s in sentences], LINE: [s[0] for s in sentences]}
    ).with_columns(pl.lit(0, pl.Int32).alias(FILE))
    return RawTable(
        rows,
        [FileEntry(name, len(content), sha256(content), rows=rows.height)],
        root,
        findings,
        kinds={"tokens": "list", "tags": "list"},
        target="tags",
    )

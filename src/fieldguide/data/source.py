"""Sources: how a path or an object in memory becomes a raw table. A reader is one file in `readers/`.

A reader module has four names, and is found because its file is there:

    NAME         what messages call it: "table"
    UNDERSTANDS  for the user who gave something unknown: "a table: .csv, .tsv, .parquet or .jsonl; ..."
    accepts(source, options) -> int      0: not mine; the reader that answers highest reads it
    load(source, options) -> Raw         rows as found: text or native types; typing comes after, for all
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FileEntry, Finding, Kind, Role

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
IGNORED = {"__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db"}


@dataclass(frozen=True)
class Options:
    """What the user said about the source; a reader uses what concerns it."""

    target: str | None = None
    header: bool | None = None
    names: tuple[str, ...] = ()  # columns of a known schema, when predicting
    labels_optional: bool = False


@dataclass
class Raw:
    """What a reader found: a table, its files, what was wrong, and what the form of the source makes sure."""

    rows: pl.DataFrame
    files: list[FileEntry]
    root: Path
    findings: list[Finding] = field(default_factory=list)
    splits: np.ndarray | None = None
    kinds: dict[str, Kind] = field(default_factory=dict)
    target: str | None = None
    roles: dict[str, Role] = field(default_factory=dict)  # column -> role, beside the target
    split_column: str | None = None
    context: Any = None  # what rows refer to beside themselves: names of classes, whole series
    unusable: int = 0  # examples the reader met and could not put in `rows`


@cache
def readers() -> tuple[ModuleType, ...]:
    """Return the modules of `data/readers` that define `accepts`, in alphabetical order."""
    package = importlib.import_module("fieldguide.data.readers")
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__))
    modules = (importlib.import_module(f"{package.__name__}.{n}") for n in names)
    return tuple(module for module in modules if hasattr(module, "accepts"))


def load(source: Any, options: Options) -> Raw:
    """Read a source with the reader that is surest of it.

    Raises DataError for a path that does not exist and for a kind of source that no reader knows.
    """
    scores = [(r.accepts(source, options), r) for r in readers()]
    best, reader = max(scores, key=lambda s: s[0])
    if best <= 0:
        what = f"{source}" if isinstance(source, Path) else f"an object of type {type(source).__name__}"
        known = "\n".join(f"  - {r.UNDERSTANDS}" for r in readers())
        raise DataError(f"{what}: not a kind of data that is understood. Understood are:\n{known}")
    return reader.load(source, options)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def visible(folder: Path) -> tuple[list[Path], int]:
    """Entries of a folder in order of name, and how many were left out: dot files, __MACOSX, Thumbs.db."""
    every = sorted(folder.iterdir())
    kept = [p for p in every if not p.name.startswith(".") and p.name.lower() not in IGNORED]
    return kept, len(every) - len(kept)


def split_of(name: str) -> str | None:
    """The split that a file or folder name says, or None: `train`, `adult-test.csv`, `TREC.train.all`."""
    words = "".join(c if c.isalpha() else " " for c in name.lower()).split()
    found = {SPLITS[w] for w in words if w in SPLITS}
    return found.pop() if len(found) == 1 else None

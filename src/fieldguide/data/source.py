"""Sources: dispatch of a path or an in-memory object to the reader that turns it into a raw table.

Every file in `readers/` that defines these four names is a reader:

    NAME         name used in messages: "table"
    UNDERSTANDS  description for the list of supported formats: "a table: .csv, .tsv, .parquet or .jsonl; ..."
    accepts(source, options) -> int      0 if not supported; the reader with the highest value reads the source
    load(source, options) -> Raw         rows as text or native types; column types are determined later
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pkgutil
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.core.validation import guard
from fieldguide.data.dataset import FileEntry, Finding, Kind, Role

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
FOLDER_SPLIT_WORDS = {  # words in names of folders, in addition to `SPLIT_NAMES`
    **SPLIT_NAMES,
    "trainset": "train",
    "trainingset": "train",
    "traindata": "train",
    "trainval": "train",
    "trn": "train",
    "valset": "val",
    "valdata": "val",
    "validset": "val",
    "validationset": "val",
    "devset": "val",
    "eval": "val",
    "evaluation": "val",
    "testset": "test",
    "testdata": "test",
    "tst": "test",
    "holdout": "test",
}
ANNOTATION_SUFFIXES = (".json", ".yaml", ".yml", ".xml", ".data")
WORD_PATTERN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # words of snake_case, kebab-case and CamelCase names
IGNORED_NAMES = {"__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db"}


@dataclass(frozen=True)
class Options:
    """Options of the user for reading a source; each reader uses those that apply to it."""

    target: str | None = None
    header: bool | None = None
    names: tuple[str, ...] = ()  # columns of a known schema, for prediction
    labels_optional: bool = False
    target_kind: str | None = None  # type of the target that the task requires, such as "mask"
    target_names: tuple[str, ...] = ()  # names of the target that the task looks for


@dataclass
class RawTable:
    """The result of a reader: table, files, findings, and the types and roles implied by the format."""

    rows: pl.DataFrame
    files: list[FileEntry]
    root: Path
    findings: list[Finding] = field(default_factory=list)
    splits: np.ndarray | None = None
    kinds: dict[str, Kind] = field(default_factory=dict)
    target: str | None = None
    roles: dict[str, Role] = field(default_factory=dict)  # column -> role, except the target
    split_column: str | None = None
    context: Any = None  # data shared by all rows, such as class names or full series
    unusable: int = 0  # examples that could not be added to `rows`
    message_problems: dict[str, list[int]] = field(default_factory=dict)  # what messages hold other than text -> rows
    optional_media: tuple[str, ...] = ()  # columns of media whose cells may be empty
    boundary: Path | None = None  # the folder outside of which no media are opened; None for a table that the user named
    delimiter: str | None = None  # of a delimited file; a hint for its number formats


@cache
def find_readers() -> tuple[ModuleType, ...]:
    """Return the modules of `data/readers` that define `accepts`, in alphabetical order."""
    package = importlib.import_module("fieldguide.data.readers")
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__))
    modules = (importlib.import_module(f"{package.__name__}.{n}") for n in names)
    return tuple(module for module in modules if hasattr(module, "accepts"))


def load(source: Any, options: Options) -> RawTable:
    """Read a source with the best matching reader.

    Raises DataError if the format is not supported by any reader.
    """
    scores = [(r.accepts(source, options), r) for r in find_readers()]
    best, reader = max(scores, key=lambda s: s[0])
    if best <= 0:
        what = f"{source}" if isinstance(source, Path) else f"an object of type {type(source).__name__}"
        known = "; ".join(dict.fromkeys(r.UNDERSTANDS.partition(":")[0] for r in find_readers()))
        raise DataError(
            f"{what}: this kind of data is not supported. Supported are: {known}. `fieldguide tasks` lists what each task reads."
        )
    if not isinstance(source, Path):
        return reader.load(source, options)
    with guard(source, remedy="If the file is truncated, copy it again."):
        raw = reader.load(source, options)
    raw.boundary = find_boundary(source)
    return raw


def find_boundary(source: Path) -> Path | None:
    """Return the folder that files in a source may refer to: the folder itself; for a file of annotations, the folder above its own.

    A table that the user named may list media anywhere.
    """
    if source.is_dir():
        return source
    return source.absolute().parent.parent if source.suffix.lower() in ANNOTATION_SUFFIXES else None


def is_inside(path: str | Path, folder: Path) -> bool:
    """Return whether a path, without `..`, is in a folder. Symbolic links are not followed: whoever made them placed them there."""
    outer = os.path.abspath(folder).rstrip(os.sep)  # strings, since paths take .05 ms for each of many files
    return f"{os.path.abspath(path)}{os.sep}".startswith(outer + os.sep)


def sha256(content: bytes) -> str:
    """Return the SHA-256 of the content as a hexadecimal string."""
    return hashlib.sha256(content).hexdigest()


def relative_path(path: Path, root: Path) -> str:
    """Return the POSIX path relative to `root`, or the full path if it is outside."""
    full, start = os.fspath(path), os.fspath(root).rstrip(os.sep) + os.sep
    if full.startswith(start):  # the usual case, without the time that comparing paths takes
        return full[len(start) :].replace(os.sep, "/")
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def list_visible(folder: Path) -> tuple[list[Path], int]:
    """Return the sorted entries of a folder and the number of hidden ones (dot files, __MACOSX, Thumbs.db)."""
    every = sorted(os.listdir(folder))
    kept = [folder / name for name in every if not name.startswith(".") and name.lower() not in IGNORED_NAMES]
    return kept, len(every) - len(kept)


def list_folders(folder: Path) -> list[Path]:
    """Return the sorted visible folders in a folder, without links and without a look at its files."""
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
    return [folder / name for name in names if not name.startswith(".") and name.lower() not in IGNORED_NAMES]


def split_of(name: str) -> str | None:
    """Return the split in a file or folder name (`train`, `adult-test.csv`, `TREC.train.all`), or None."""
    words = "".join(c if c.isalpha() else " " for c in name.lower()).split()
    found = {SPLIT_NAMES[w] for w in words if w in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else None


def folder_split(name: str) -> str | None:
    """Return the split in the name of a folder (`train`, `test_set`, `01_train`, `TrainImages`, `train2017`), or None.

    A name with the words train and val is training data.
    """
    found = {FOLDER_SPLIT_WORDS[w] for word in WORD_PATTERN.findall(name) if (w := word.lower()) in FOLDER_SPLIT_WORDS}
    return found.pop() if len(found) == 1 else "train" if found == {"train", "val"} else None

"""Data: one table with one row per example, typed columns and a manifest of the files it was read from.

Every reader produces this structure. Media (images, audio, video) are stored in the table as absolute paths and are
opened by the tasks, so a CSV, a folder of images and a folder of recordings look the same to the rest of the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError

Kind = Literal[
    "number",
    "category",
    "boolean",
    "date",
    "text",
    "image",
    "identifier",
    "constant",
    "mask",
    "boxes",
    "audio",
    "video",
    "messages",
    "list",
]
Role = Literal["feature", "target", "group", "time", "split", "ignored", "user", "item", "rating", "series"]
Severity = Literal["error", "warning", "note"]

# Bookkeeping columns of `rows`, in addition to the typed columns in `columns`:
FILE, LINE = "#file", "#line"  # index into the manifest; line (or row number) in that file
HASH = "#hash"  # digest of a row's pixels or samples; equal images have equal digests
WIDTH, HEIGHT, CHANNELS = "#width", "#height", "#channels"  # of an image after EXIF rotation; 1 = gray, 3 = color
LOW, HIGH = "#low", "#high"  # range of the values of an image with more than 8 bits; null for 8 bits
SECONDS, RATE = "#seconds", "#rate"  # of a recording or video: duration and samples (frames) per second
FRAMES = "#frames"  # number of frames of a video
MASK_WIDTH, MASK_HEIGHT = "#mask_width", "#mask_height"
BOOKKEEPING = (FILE, LINE, HASH, WIDTH, HEIGHT, CHANNELS, LOW, HIGH, SECONDS, RATE, FRAMES, MASK_WIDTH, MASK_HEIGHT)


@dataclass
class Column:
    """A column: its type (`kind`), its role, and a text (`why`) that explains how the type was chosen.

    `number_format` and `date_format` are how its text is read (`NumberFormat`, `DateFormat`), `range` its smallest and largest
    value, and `literals` the words that are values although they usually mark missing ones, such as a class `None`. They are
    None in columns of run folders that were written before these fields existed.
    """

    name: str
    kind: Kind
    role: Role = "feature"
    why: str = ""
    missing: int = 0
    distinct: int = 0
    number_format: dict[str, Any] | None = None
    date_format: dict[str, Any] | None = None
    range: tuple[float | str, float | str] | None = None
    literals: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Finding:
    """A problem found by the data checks: what it is, the first places it occurs, how often, and the remedy.

    `unusable` is the number of rows or files that cannot be used because of it. A finding with severity `error`
    stops `fit` regardless of the count.
    """

    check: str
    severity: Severity
    what: str
    places: tuple[str, ...] = ()
    count: int = 1
    remedy: str = ""
    unusable: int = 0

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.places) else ""
        where = f" ({'; '.join(self.places)}{more})" if self.places else ""
        times = f"{self.count:,} x " if self.count > 1 else ""
        return f"{times}{self.what}{where}{'. ' + self.remedy if self.remedy else ''}"


@dataclass(frozen=True)
class FileEntry:
    """A file that was read: path relative to the root, size in bytes, SHA-256, number of rows used and dropped."""

    path: str
    bytes: int
    sha256: str
    rows: int = 1
    dropped: int = 0


@dataclass
class Manifest:
    """The files the data was read from. `digest` identifies the data: equal digests mean equal data."""

    root: str
    files: list[FileEntry] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the hashes and paths of all files."""
        import hashlib

        lines = sorted(f"{f.sha256}  {f.path}" for f in self.files)
        return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()

    def summary(self) -> dict[str, Any]:
        """Return the root, the totals over all files and the digest as a JSON-compatible dictionary."""
        return {
            "root": self.root,
            "files": len(self.files),
            "bytes": sum(f.bytes for f in self.files),
            "rows": sum(f.rows for f in self.files),
            "dropped": sum(f.dropped for f in self.files),
            "digest": self.digest,
        }


@dataclass(frozen=True)
class SkippedInput:
    """An input that cannot be used: number of usable rows before it, its location and the reason."""

    before: int
    place: str
    why: str


@dataclass(frozen=True)
class CellProblems:
    """Cells of a column that do not fit the schema of a trained model.

    `what` is "malformed", "unseen" (a category that training did not have) or "out-of-range" (far outside the training range).
    `rows` are the rows of the data that was read; malformed cells of unusable rows are only counted. `examples` are the first
    places and values.
    """

    column: str
    what: Literal["malformed", "unseen", "out-of-range"]
    detail: str
    count: int
    rows: tuple[int, ...]
    examples: tuple[tuple[str, str], ...]


@dataclass
class Data:
    """Examples as a table (`rows`) with their schema (`columns`), manifest and findings.

    `splits` holds "train", "val" or "test" for each row if the source defines splits (folders train/ val/ test/, or a
    split column); otherwise it is None and `fieldguide.data.splits` creates them. `context` holds what the rows of a
    task's examples refer to, such as the full series that windows are cut from. `split_description` describes how `splits` were
    made if they do not come from the source. `skipped` lists the inputs that a lenient reader could not use. `problems` lists
    the cells that do not fit the schema of a trained model. `inputs` is the table to predict as it was read, with all rows and columns.
    """

    source: str
    rows: pl.DataFrame
    columns: dict[str, Column]
    manifest: Manifest
    findings: list[Finding] = field(default_factory=list)
    splits: np.ndarray | None = None
    context: Any = None
    split_description: str = ""
    skipped: list[SkippedInput] = field(default_factory=list)
    problems: list[CellProblems] = field(default_factory=list)
    inputs: pl.DataFrame | None = None

    def __len__(self) -> int:
        return self.rows.height

    def columns_with_role(self, role: Role) -> list[Column]:
        """Return the columns with a role."""
        return [c for c in self.columns.values() if c.role == role]

    def features(self, *kinds: Kind) -> list[Column]:
        """Return the feature columns, restricted to the given types if any are passed."""
        return [c for c in self.columns_with_role("feature") if not kinds or c.kind in kinds]

    @property
    def target(self) -> Column | None:
        """The first target column, or None."""
        return next(iter(self.columns_with_role("target")), None)

    @property
    def required_target(self) -> Column:
        """The first target column. Raises `DataError` if the data has none."""
        if self.target is None:
            raise DataError(f"{self.source} has no target column. Name it with --target.")
        return self.target

    def locate_row(self, row: int) -> str:
        """Return `path:line` of a row, for messages."""
        entry = self.manifest.files[self.rows[FILE][row]] if FILE in self.rows.columns else None
        line = self.rows[LINE][row] if LINE in self.rows.columns else None
        return f"{entry.path if entry else self.source}{f':{line}' if line else ''}"

    def take(self, index: Sequence[int] | np.ndarray) -> Data:
        """Return the data restricted to these rows, in this order."""
        index = np.asarray(index)
        return Data(
            self.source,
            self.rows[index],
            self.columns,
            self.manifest,
            self.findings,
            None if self.splits is None else self.splits[index],
            self.context,
            self.split_description,
            self.skipped,
            self.problems,
        )

    def drop_rows(self, bad: np.ndarray) -> Data:
        """Return the data without the rows marked in `bad` (boolean, N); the manifest counts them as dropped per file."""
        if not bad.any():
            return self
        lost = np.bincount(self.rows[FILE].to_numpy()[bad], minlength=len(self.manifest.files))
        files = [
            replace(f, rows=f.rows - int(n), dropped=f.dropped + int(n)) if n else f for f, n in zip(self.manifest.files, lost)
        ]
        kept = self.take(np.flatnonzero(~bad))
        kept.manifest = Manifest(self.manifest.root, files)
        return kept

    def require_role(self, role: Role) -> Column:
        """Return the first column with a role. Raises `LookupError` if there is none."""
        for column in self.columns_with_role(role):
            return column
        raise LookupError(f"{self.source} has no column with the role {role!r}")

    def schema(self) -> list[dict[str, Any]]:
        """Return the columns as dictionaries, as they are written to run folders."""
        return [asdict(c) for c in self.columns.values()]

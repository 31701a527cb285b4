"""Data: what every reader yields. One table with a row an example, typed columns, a manifest of its files.

Media (pictures, sound) stand in the table as absolute paths; tasks open them. So a CSV, a folder of photos
and a folder of recordings look alike to all that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import polars as pl

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

# Bookkeeping columns of `rows`, beside the typed ones of `columns`:
FILE, LINE = "#file", "#line"  # index into the manifest, line (or row number) there
HASH = "#hash"  # digest of a row's pixels or samples: equal pictures, equal digest
WIDTH, HEIGHT, CHANNELS = "#width", "#height", "#channels"  # of a picture as shown; 1 grey, 3 colour
SECONDS, RATE = "#seconds", "#rate"  # of a recording or a film: its length, its samples (frames) a second
FRAMES = "#frames"  # of a film
MASK_WIDTH, MASK_HEIGHT = "#mask_width", "#mask_height"
BOOKKEEPING = (FILE, LINE, HASH, WIDTH, HEIGHT, CHANNELS, SECONDS, RATE, FRAMES, MASK_WIDTH, MASK_HEIGHT)


@dataclass
class Column:
    """A column, what it holds and what it is for. `why` says in words how that was decided."""

    name: str
    kind: Kind
    role: Role = "feature"
    why: str = ""
    missing: int = 0
    distinct: int = 0


@dataclass(frozen=True)
class Finding:
    """One thing the doctor saw: what, where (first few places), how often, and what to do about it.

    `unusable` is how many rows or files it makes unusable; an `error` stops `fit` whatever the count.
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
    """A file that was read: path from the root, bytes, SHA-256 of its content, rows taken and dropped."""

    path: str
    bytes: int
    sha256: str
    rows: int = 1
    dropped: int = 0


@dataclass
class Manifest:
    """Which files made the data. `digest` names the whole: same digest, same data."""

    root: str
    files: list[FileEntry] = field(default_factory=list)

    @property
    def digest(self) -> str:
        import hashlib

        lines = sorted(f"{f.sha256}  {f.path}" for f in self.files)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
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
    """An input that cannot be used: how many usable rows stand before it, where it is, and why."""

    before: int
    place: str
    why: str


@dataclass
class Data:
    """Examples as a table (`rows`), their schema (`columns`), where they are from, what is wrong with them.

    `splits`, where the source names them (folders train/ val/ test/, or a split column), holds "train", "val"
    or "test" for each row; else it is None and `fieldguide.data.splits` makes them. `context` is what the rows of a
    task's examples refer to beside themselves, such as the whole series of which they are windows. `how` says in words how
    `splits` came about, where not the source gave them. `unread` names what a lenient reading could not use.
    """

    source: str
    rows: pl.DataFrame
    columns: dict[str, Column]
    manifest: Manifest
    findings: list[Finding] = field(default_factory=list)
    splits: np.ndarray | None = None
    context: Any = None
    how: str = ""
    skipped: list[SkippedInput] = field(default_factory=list)

    def __len__(self) -> int:
        return self.rows.height

    def role(self, role: Role) -> list[Column]:
        return [c for c in self.columns.values() if c.role == role]

    def features(self, *kinds: Kind) -> list[Column]:
        """Feature columns, of these kinds only where kinds are given."""
        return [c for c in self.role("feature") if not kinds or c.kind in kinds]

    @property
    def target(self) -> Column | None:
        return next(iter(self.role("target")), None)

    def place(self, row: int) -> str:
        """`path:line` of a row, for messages."""
        entry = self.manifest.files[self.rows[FILE][row]] if FILE in self.rows.columns else None
        line = self.rows[LINE][row] if LINE in self.rows.columns else None
        return f"{entry.path if entry else self.source}{f':{line}' if line else ''}"

    def take(self, index: Sequence[int] | np.ndarray) -> Data:
        """The same data with these rows only, in this order."""
        index = np.asarray(index)
        return Data(
            self.source,
            self.rows[index],
            self.columns,
            self.manifest,
            self.findings,
            None if self.splits is None else self.splits[index],
            self.context,
            self.how,
            self.skipped,
        )

    def without(self, bad: np.ndarray) -> Data:
        """The same data without these rows (a mask), which the manifest counts, file by file."""
        if not bad.any():
            return self
        lost = np.bincount(self.rows[FILE].to_numpy()[bad], minlength=len(self.manifest.files))
        files = [
            replace(f, rows=f.rows - int(n), dropped=f.dropped + int(n)) if n else f for f, n in zip(self.manifest.files, lost)
        ]
        kept = self.take(np.flatnonzero(~bad))
        kept.manifest = Manifest(self.manifest.root, files)
        return kept

    def only(self, role: Role) -> Column:
        """The one column of a role. Raises `LookupError` where there is none."""
        for column in self.role(role):
            return column
        raise LookupError(f"{self.source} has no column of the role {role!r}")

    def schema(self) -> list[dict[str, Any]]:
        return [asdict(c) for c in self.columns.values()]

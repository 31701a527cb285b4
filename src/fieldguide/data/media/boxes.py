"""Boxes around the objects of pictures: what the readers of COCO, YOLO and VOC share. One row a picture.

Column `image` holds the path, `objects` a list of structs: `label`; `left`, `top`, `right`, `bottom` in pixels of the
picture as it is shown, right and bottom outside the object; `outline`, null or a list of closed polygons (parts of the one
object), each x1 y1 x2 y2 ...; `runs`, null or the lengths of runs of pixels outside and inside by turns, column by column;
`crowd`, true where the box is around many or is not to be judged. No objects: background.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FileEntry, Finding, Severity
from fieldguide.data.media import images
from fieldguide.data.source import Raw, relative, sha256

SIDES = ("left", "top", "right", "bottom")
OBJECT = pl.Struct(
    {
        "label": pl.String,
        **dict.fromkeys(SIDES, pl.Float64),
        "outline": pl.List(pl.List(pl.Float64)),
        "runs": pl.List(pl.Int32),
        "crowd": pl.Boolean,
    }
)
SLACK = 1.0  # pixels that a box may reach over the edge without a word: rounding
SHOWN = 5
CHECKS: dict[str, tuple[Severity, str, str]] = {  # slug: severity, what, remedy
    "degenerate-box": (
        "warning",
        "boxes without area (no width or no height, or turned inside out); they are left out",
        "Draw them again or remove them.",
    ),
    "box-outside": (
        "warning",
        "boxes that lie wholly outside their picture; they are left out",
        "Are they in another unit, or of another picture? Correct or remove them.",
    ),
    "box-over-edge": ("warning", "boxes that reach over the edge of their picture; they are cut there", "Correct them."),
    "duplicate-box": (
        "warning",
        "boxes that are there before, of the same class in the same place; they are left out",
        "Remove them.",
    ),
    "size-differs": (
        "warning",
        "pictures of another size than their annotation says: nobody knows where the boxes belong",
        "Export pictures and annotations together.",
    ),
    "malformed-line": (
        "warning",
        "lines that are no box",
        "A line is: class, then x y width height of the box, or the points "
        "of an outline, all as parts (0 to 1) of the picture's width and height.",
    ),
    "class-beyond-names": (
        "warning",
        "boxes of a class that has no name",
        "Add the name, or correct the number (the first class is 0).",
    ),
    "unknown-category": ("warning", "boxes of a category that the file does not list", "Add it to its categories."),
    "malformed-box": ("warning", "boxes that are not numbers as they should be", "Correct or remove them."),
    "malformed-outline": (
        "warning",
        "outlines that are none: fewer than three points, no numbers, or runs of pixels that do "
        "not fill the picture; their boxes are kept",
        "Export them again: whoever learns outlines cannot use these objects.",
    ),
    "unknown-picture": (
        "warning",
        "boxes of a picture that the file does not list; they are left out",
        "Add the picture to its images, or remove them.",
    ),
    "duplicate-id": (
        "warning",
        "pictures with the number of one before; nobody knows whose boxes are whose",
        "Give each its own number.",
    ),
    "duplicate-picture": ("warning", "pictures that are listed before; they are left out", "List each once."),
    "wrong-encoding": ("warning", "annotations that are no UTF-8 text", "Save them as UTF-8."),
    "malformed-xml": ("warning", "annotations that are no well-formed XML, or lack what they need", "Export them again."),
    "xml-doctype": (
        "warning",
        "annotations with a document type; they are refused, for it can make a small file fill the memory",
        "Remove the line that begins with <!DOCTYPE.",
    ),
    "empty-annotation": ("warning", "annotations that are empty files", "Write them again or remove them."),
    "no-picture": ("warning", "annotations without a picture", "Add the picture or remove them."),
    "no-annotation": ("warning", "pictures that a list names, without an annotation", "Add it or take them off the list."),
    "not-listed": ("note", "annotated pictures that no list of ImageSets/Main names; they are left out", ""),
    "listed-twice": (
        "warning",
        "pictures that stand in two lists; they count as test before validation before training",
        "Take them off one.",
    ),
    "empty-label-file": ("note", "empty label files: their pictures count as background", ""),
    "no-label-file": (
        "note",
        "pictures without a label file: they count as background",
        "If they show objects, they were not exported.",
    ),
    "background": ("note", "pictures without any object: they count as background", ""),
}


@dataclass
class Shot:
    """A picture as a reader found it: where its annotation is, its boxes, the size that the annotation says."""

    path: Path
    place: str
    split: str | None = None
    boxes: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)  # of each box, for messages
    size: tuple[float, float] | None = None  # width, height
    relative: bool = False  # sides and outlines are parts of width and height
    bad: bool = False  # its annotation cannot be used, a finding says why


@dataclass
class Notes:
    """Findings as they are met, by check."""

    met: dict[str, list[str]] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)

    def note(self, check: str, place: str, unusable: int = 0) -> None:
        self.met.setdefault(check, []).append(place)
        self.lost[check] = self.lost.get(check, 0) + unusable

    def mark_invalid(self, check: str, place: str, shot: Shot) -> None:
        """What makes a whole picture unusable: it is counted once."""
        self.note(check, place, 0 if shot.bad else 1)
        shot.bad = True

    def findings(self) -> list[Finding]:
        return [
            Finding(
                check,
                CHECKS[check][0],
                CHECKS[check][1],
                tuple(self.met[check][:SHOWN]),
                len(self.met[check]),
                CHECKS[check][2],
                self.lost[check],
            )
            for check in CHECKS
            if check in self.met
        ]


def box(
    label: str,
    left: float,
    top: float,
    right: float,
    bottom: float,
    outline: list[list[float]] | None = None,
    crowd: bool = False,
    runs: list[int] | None = None,
) -> dict[str, Any]:
    return {
        "label": label,
        "left": left,
        "top": top,
        "right": right,
        "bottom": bottom,
        "outline": outline,
        "runs": runs,
        "crowd": crowd,
    }


def header_sizes(paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Width and height as shown, by each file's header alone; None where that cannot be read."""

    def one(path: Path) -> tuple[int, int] | None:
        try:
            with Image.open(path) as image:
                width, height = image.size
                return (height, width) if image.getexif().get(0x0112, 1) >= 5 else (width, height)
        except images.BROKEN:
            return None

    with images.quiet(), ThreadPoolExecutor(images.THREADS) as pool:
        return list(pool.map(one, paths, chunksize=64))


def entry(path: Path, content: bytes, root: Path) -> FileEntry:
    """An annotation file for the manifest: what it says is part of the data, and of its digest."""
    return FileEntry(relative(path, root), len(content), sha256(content), rows=0)


def raw(root: Path, shots: list[Shot], files: list[FileEntry], notes: Notes, classes: Sequence[str]) -> Raw:
    """Pictures with their boxes checked against the pictures' own sizes, as a raw table. Raises `DataError` if none is left."""
    seen: dict[Path, Shot] = {}
    for shot in shots:
        if shot.path in seen:
            notes.mark_invalid("duplicate-picture", shot.place, shot)
        seen.setdefault(shot.path, shot)
    usable = [s for s in shots if not s.bad]
    for shot, size in zip(usable, header_sizes([s.path for s in usable])):
        checked(shot, size, notes)
    kept = [s for s in usable if not s.bad]
    if not kept:
        raise DataError(f"{root}: no picture with a usable annotation." + "".join(f"\n  - {f}" for f in notes.findings()))
    for shot in kept:
        if not shot.boxes:
            notes.note("background", relative(shot.path, root))
    rows = pl.DataFrame(
        [
            pl.Series("image", [str(s.path.absolute()) for s in kept], dtype=pl.String),
            pl.Series("objects", [s.boxes for s in kept], dtype=pl.List(OBJECT)),
        ]
    )
    splits = [s.split for s in kept]
    named = np.array([s or "train" for s in splits], dtype=object) if len({s or "train" for s in splits}) > 1 else None
    return Raw(
        rows,
        files,
        root,
        notes.findings(),
        named,
        {"image": "image", "objects": "boxes"},
        "objects",
        unusable=sum(notes.lost.values()),
        context={"classes": list(classes)},
    )


def checked(shot: Shot, size: tuple[int, int] | None, notes: Notes) -> None:
    """Boxes in pixels, within the picture, each once. A picture that does not open is left to the check of pictures."""
    if size is None:
        shot.boxes = []
        return
    width, height = size
    if shot.size and all(shot.size) and tuple(round(v) for v in shot.size) != size:
        notes.mark_invalid(
            "size-differs", f"{shot.place}: {shot.size[0]:g} x {shot.size[1]:g}, the picture {width} x {height}", shot
        )
        return
    kept, taken = [], set()
    for one, place in zip(shot.boxes, shot.places):
        if shot.relative:
            one |= {s: one[s] * (width, height)[i % 2] for i, s in enumerate(SIDES)}
            one["outline"] = one["outline"] and [[v * (width, height)[i % 2] for i, v in enumerate(p)] for p in one["outline"]]
        if one["runs"] and sum(one["runs"]) != width * height:
            notes.note("malformed-outline", place)
            one["runs"] = None
        left, top, right, bottom = (one[s] for s in SIDES)
        key = (one["label"], round(left, 2), round(top, 2), round(right, 2), round(bottom, 2))
        if not (right > left and bottom > top):
            notes.note("degenerate-box", place)
        elif right <= 0 or bottom <= 0 or left >= width or top >= height:
            notes.note("box-outside", place)
        elif key in taken:
            notes.note("duplicate-box", place)
        else:
            if left < -SLACK or top < -SLACK or right > width + SLACK or bottom > height + SLACK:
                notes.note("box-over-edge", place)
            one |= {
                "left": max(left, 0.0),
                "top": max(top, 0.0),
                "right": min(right, float(width)),
                "bottom": min(bottom, float(height)),
            }
            taken.add(key)
            kept.append(one)
    shot.boxes = kept


def decoded(content: bytes, place: str, shot: Shot, notes: Notes) -> str | None:
    """Text of an annotation, or None after a finding."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        notes.mark_invalid("wrong-encoding", place, shot)
        return None


def finite(values: Any, count: int) -> list[float] | None:
    """So many finite numbers, or None."""
    try:
        numbers = [float(v) for v in values if not isinstance(v, bool)]
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(np.isfinite(numbers)) else None

"""Bounding boxes: the table that the COCO, YOLO and VOC readers produce, with one row per image.

Column `image` holds the path; `objects` a list of structs with these fields:

    label                     class name
    left, top, right, bottom  box in pixels of the upright image; right and bottom are exclusive
    outline                   null, or a list of closed polygons (parts of the object), each x1 y1 x2 y2 ...
    runs                      null, or alternating lengths of runs of pixels outside and inside, column by column
    crowd                     true if the box covers a group of objects or is excluded from evaluation
    keypoints                 null, or x, y and visibility of each keypoint: 0 not labeled, 1 labeled but hidden, 2 visible

An image without objects counts as background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.core.threads import map_threads
from fieldguide.data.dataset import FileEntry, Finding, Severity
from fieldguide.data.media import images
from fieldguide.data.source import RawTable, relative_path, sha256

SIDES = ("left", "top", "right", "bottom")
OBJECT = pl.Struct(
    {
        "label": pl.String,
        **dict.fromkeys(SIDES, pl.Float64),
        "outline": pl.List(pl.List(pl.Float64)),
        "runs": pl.List(pl.Int32),
        "crowd": pl.Boolean,
        "keypoints": pl.List(pl.Float64),
    }
)
EDGE_TOLERANCE_PIXELS = 1.0  # pixels by which a box may exceed the image without a finding (rounding)
MIN_BROKEN, MIN_WHOLE = 0.05, 0.99  # fractions of boxes outside as left, top, width, height, and inside as corners
MAX_SIZED = 2000  # images whose size is read to decide this
MAX_SHOWN_PLACES = 5
MIN_OUTLINE_OVERLAP = 0.3  # IoU of a box with the bounding box of its outline
MAX_KEYPOINT_DISTANCE = 0.5  # of a keypoint to its box, as a fraction of the longer side of the box
CHECKS: dict[str, tuple[Severity, str, str]] = {  # name: severity, description, remedy
    "degenerate-box": (
        "warning",
        "boxes without area (zero width or height, or inverted corners); they are dropped",
        "Correct or remove them.",
    ),
    "box-outside": (
        "warning",
        "boxes completely outside their image; they are dropped",
        "Check their unit and the image they belong to. Correct or remove them.",
    ),
    "box-corners": (
        "warning",
        "boxes that are read as left, top, right, bottom, because their width and height would lead out of the images",
        "Check a few of them.",
    ),
    "box-fractions": (
        "warning",
        "images whose boxes are read as fractions of width and height, because no coordinate of the data is above 1",
        "Check a few of them.",
    ),
    "box-over-edge": ("warning", "boxes that exceed the edge of their image; they are clipped", "Correct them."),
    "duplicate-box": (
        "warning",
        "duplicate boxes of the same class at the same position; they are dropped",
        "Remove them.",
    ),
    "size-differs": (
        "warning",
        "images whose size differs from the annotated one, so the boxes cannot be placed",
        "Export images and annotations together.",
    ),
    "malformed-line": (
        "warning",
        "lines that are not valid boxes",
        "A line consists of: class, then x y width height of the box, or the points "
        "of an outline, as fractions (0 to 1) of the image's width and height.",
    ),
    "class-beyond-names": (
        "warning",
        "boxes whose class number has no name",
        "Add the name, or correct the number (the first class is 0).",
    ),
    "unknown-category": ("warning", "boxes with a category that the file does not define", "Add it to its categories."),
    "malformed-box": ("warning", "boxes with invalid coordinates or without a class", "Correct or remove them."),
    "malformed-outline": (
        "warning",
        "invalid outlines: fewer than three points, non-numeric values, or runs of pixels that do "
        "not fill the image; their boxes are kept",
        "Export them again. Instance segmentation cannot use these objects.",
    ),
    "outline-outside": (
        "warning",
        "outlines without any pixel in their image; their boxes are kept",
        "Check their unit and the image they belong to. Instance segmentation cannot use these objects.",
    ),
    "outline-far": (
        "warning",
        "outlines that do not fill their box: perhaps those of another object, or in another unit",
        "Check a few of them.",
    ),
    "malformed-keypoints": (
        "warning",
        "objects whose keypoints are not x, y and visibility of each keypoint; their boxes are kept",
        "Export them again.",
    ),
    "keypoint-visibility": (
        "warning",
        "keypoints whose visibility is neither 0 (not labeled), 1 (hidden) nor 2 (visible); they count as labeled unless it is "
        "less than 1",
        "Correct them.",
    ),
    "keypoint-outside": (
        "warning",
        "labeled keypoints outside of their image; they count as not labeled",
        "Correct them, or set their visibility to 0.",
    ),
    "keypoint-far": (
        "warning",
        "objects with keypoints far from their box: perhaps those of another object, or in another unit",
        "Check a few of them.",
    ),
    "no-keypoints": ("note", "objects without any labeled keypoint: their boxes are trained on, but not scored", ""),
    "keypoint-definitions": (
        "warning",
        "classes whose keypoints differ from those of the first class that has any; their keypoints are left out",
        "Export each set of keypoints as a data set of its own.",
    ),
    "unknown-picture": (
        "warning",
        "boxes of an image that the file does not list; they are dropped",
        "Add the image to its images, or remove them.",
    ),
    "duplicate-id": (
        "warning",
        "images with a duplicate id, so their boxes cannot be assigned",
        "Give each image a unique id.",
    ),
    "duplicate-picture": ("warning", "images that are listed more than once; repetitions are dropped", "List each once."),
    "wrong-encoding": ("warning", "annotations that are not UTF-8 text", "Save them as UTF-8."),
    "no-segments": ("warning", "images without an annotation of their segments", "Add it, or remove the images."),
    "segments-file": (
        "warning",
        "images whose file of segments is missing, damaged, or of another kind",
        "Copy or export it again.",
    ),
    "segments-size": (
        "warning",
        "images whose file of segments has another size",
        "Export both together; segments must not be scaled like photographs.",
    ),
    "duplicate-segment": (
        "warning",
        "segments with an id that their image has twice; only the first counts",
        "Give each its own id.",
    ),
    "segment-unlisted": (
        "warning",
        "images whose file of segments has numbers that are not annotated; these pixels belong to no segment",
        "Annotate them. Many of them in thin lines are a sign that the file was smoothed, or compressed with loss.",
    ),
    "segment-without-pixels": (
        "warning",
        "annotated segments without any pixel in their file; they are dropped",
        "Export both together.",
    ),
    "segment-area": (
        "warning",
        "segments whose annotated area differs from their pixels: perhaps the file belongs to another image, or was scaled",
        "Export both together.",
    ),
    "stuff-parts": ("note", "segments of stuff next to another of the same class in their image; they are joined", ""),
    "malformed-json": ("warning", "annotations that are not valid JSON or lack shapes", "Export them again."),
    "malformed-xml": ("warning", "annotations that are not well-formed XML or are incomplete", "Export them again."),
    "xml-doctype": (
        "warning",
        "annotations with a document type, which is rejected because it allows entity expansion attacks",
        "Remove the line that begins with <!DOCTYPE.",
    ),
    "empty-annotation": ("warning", "annotations that are empty files", "Write them again or remove them."),
    "pose-line": (
        "warning",
        "lines that look like keypoints: class, box, then x y visibility of each point",
        "Add `kpt_shape: [POINTS, 3]` to data.yaml, so that the boxes can be read.",
    ),
    "no-picture": ("warning", "annotations without an image", "Add the image or remove them."),
    "no-annotation": ("warning", "images in a split list without an annotation", "Add it or remove them from the list."),
    "not-listed": ("note", "annotated images that no list in ImageSets/Main contains; they are dropped", ""),
    "listed-twice": (
        "warning",
        "images that are in two lists; test has priority over validation, and validation over training",
        "Remove them from one list.",
    ),
    "empty-label-file": ("note", "empty label files: their images count as background", ""),
    "no-label-file": (
        "note",
        "images without a label file: they count as background",
        "If they contain objects, export their labels.",
    ),
    "background": ("note", "images without any object: they count as background", ""),
}


@dataclass
class AnnotatedImage:
    """An image with its annotation as found by a reader, before the boxes are checked."""

    path: Path
    place: str  # location of the annotation, for messages
    split: str | None = None
    boxes: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)  # location of each box, for messages
    size: tuple[float, float] | None = None  # annotated width, height
    relative: bool = False  # coordinates are fractions of width and height
    bad: bool = False  # the annotation cannot be used; a finding explains why


@dataclass
class FindingCollector:
    """Collects findings, grouped by check."""

    met: dict[str, list[str]] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)

    def add(self, check: str, place: str, unusable: int = 0) -> None:
        """Record an occurrence of a check and how many images it makes unusable."""
        self.met.setdefault(check, []).append(place)
        self.lost[check] = self.lost.get(check, 0) + unusable

    def mark_invalid(self, check: str, place: str, shot: AnnotatedImage) -> None:
        """Record a problem that makes the whole image unusable; each image is counted once."""
        self.add(check, place, 0 if shot.bad else 1)
        shot.bad = True

    def findings(self) -> list[Finding]:
        """Return the findings in the order of `CHECKS`."""
        return [
            Finding(
                check,
                CHECKS[check][0],
                CHECKS[check][1],
                tuple(self.met[check][:MAX_SHOWN_PLACES]),
                len(self.met[check]),
                CHECKS[check][2],
                self.lost[check],
            )
            for check in CHECKS
            if check in self.met
        ]


def make_object(
    label: str,
    left: float,
    top: float,
    right: float,
    bottom: float,
    outline: list[list[float]] | None = None,
    crowd: bool = False,
    runs: list[int] | None = None,
    keypoints: list[float] | None = None,
) -> dict[str, Any]:
    """Return an object as a struct of type `OBJECT`."""
    return {
        "label": label,
        "left": left,
        "top": top,
        "right": right,
        "bottom": bottom,
        "outline": outline,
        "runs": runs,
        "crowd": crowd,
        "keypoints": keypoints,
    }


@dataclass(frozen=True)
class Skeleton:
    """The keypoints of a data set: their names, the pairs joined by a line, and the place of each in the mirrored order."""

    names: tuple[str, ...]
    lines: tuple[tuple[int, int], ...] = ()
    mirrored: tuple[int, ...] = ()  # empty if it is not known which are left and right


def read_sizes(paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Return (width, height) of the upright images, reading only file headers; None for unreadable files."""

    def one(path: Path) -> tuple[int, int] | None:
        try:
            with images.open_image(path) as image:
                width, height = image.size
                return (height, width) if image.getexif().get(0x0112, 1) >= 5 else (width, height)
        except images.DECODE_ERRORS:
            return None

    with images.suppress_warnings():
        return map_threads(one, paths)


def annotation_entry(path: Path, content: bytes, root: Path) -> FileEntry:
    """Return the manifest entry of an annotation file; it contributes to the digest of the data but has no rows."""
    return FileEntry(relative_path(path, root), len(content), sha256(content), rows=0)


def build_raw(
    root: Path,
    shots: list[AnnotatedImage],
    files: list[FileEntry],
    notes: FindingCollector,
    classes: Sequence[str],
    skeleton: Skeleton | None = None,
) -> RawTable:
    """Check boxes against the actual image sizes and return the raw table. Raises DataError if no image is usable."""
    seen: dict[Path, AnnotatedImage] = {}
    for shot in shots:
        if shot.path in seen:
            notes.mark_invalid("duplicate-picture", shot.place, shot)
        seen.setdefault(shot.path, shot)
    usable = [s for s in shots if not s.bad]
    if are_fractions(usable):
        for shot in usable:
            shot.relative = True
            notes.add("box-fractions", shot.place)
    for shot, size in zip(usable, read_sizes([s.path for s in usable])):
        check_boxes(shot, size, notes)
    kept = [s for s in usable if not s.bad]
    if not kept:
        raise DataError(f"{root}: no image with a usable annotation." + "".join(f"\n  - {f}" for f in notes.findings()))
    for shot in kept:
        if not shot.boxes:
            notes.add("background", relative_path(shot.path, root))
    rows = pl.DataFrame(
        [
            pl.Series("image", [str(s.path.absolute()) for s in kept], dtype=pl.String),
            pl.Series("objects", [s.boxes for s in kept], dtype=pl.List(OBJECT)),
        ]
    )
    splits = [s.split for s in kept]
    named = np.array([s or "train" for s in splits], dtype=object) if len({s or "train" for s in splits}) > 1 else None
    return RawTable(
        rows,
        files,
        root,
        notes.findings(),
        named,
        {"image": "image", "objects": "boxes"},
        "objects",
        unusable=sum(notes.lost.values()),
        context={"classes": list(classes)} | ({"skeleton": skeleton} if skeleton else {}),
    )


def are_fractions(shots: Sequence[AnnotatedImage]) -> bool:
    """Return whether all boxes and outlines, although annotated in pixels, are within the first pixel and not empty."""
    boxes = [b for s in shots for b in s.boxes]
    if not boxes or any(s.relative for s in shots) or any(b["runs"] for b in boxes):
        return False
    values = [v for b in boxes for v in (*(b[s] for s in SIDES), *(v for part in b["outline"] or () for v in part))]
    return min(values) >= 0 and max(values) <= 1 and any(b[s] % 1 for b in boxes for s in SIDES)


def are_corners(boxes: Sequence[tuple[Path, Sequence[float]]]) -> bool:
    """Return whether boxes of four numbers fit their images as left, top, right, bottom, but not as left, top, width, height."""
    paths = list(dict.fromkeys(path for path, _ in boxes))[:MAX_SIZED]
    sizes = dict(zip(paths, read_sizes(paths)))
    known = [(box, size) for path, box in boxes if (size := sizes.get(path))]
    if known and max(max(box) for box, _ in known) <= 1:
        known = [(box, (1, 1)) for box, _ in known]
    slack = [EDGE_TOLERANCE_PIXELS if size != (1, 1) else 0 for _, size in known]
    broken = sum(a + c > w + e or b + d > h + e for ((a, b, c, d), (w, h)), e in zip(known, slack))
    whole = sum(c > a and d > b and c <= w + e and d <= h + e for ((a, b, c, d), (w, h)), e in zip(known, slack))
    return bool(known) and broken >= MIN_BROKEN * len(known) and whole >= MIN_WHOLE * len(known)


def check_boxes(shot: AnnotatedImage, size: tuple[int, int] | None, notes: FindingCollector) -> None:
    """Convert the boxes to pixels, clip them to the image and drop invalid ones. Images that cannot be opened are
    left to the image check."""
    if size is None:
        shot.boxes = []
        return
    width, height = size
    if shot.size and all(shot.size) and tuple(round(v) for v in shot.size) != size:
        notes.mark_invalid(
            "size-differs", f"{shot.place}: {shot.size[0]:g} x {shot.size[1]:g}, the image {width} x {height}", shot
        )
        return
    kept, taken = [], set()
    for one, place in zip(shot.boxes, shot.places):
        if shot.relative:
            one |= {s: one[s] * (width, height)[i % 2] for i, s in enumerate(SIDES)}
            one["outline"] = one["outline"] and [[v * (width, height)[i % 2] for i, v in enumerate(p)] for p in one["outline"]]
            if one["keypoints"]:
                one["keypoints"] = [v * (width, height, 1)[i % 3] for i, v in enumerate(one["keypoints"])]
        if one["runs"] and sum(one["runs"]) != width * height:
            notes.add("malformed-outline", place)
            one["runs"] = None
        left, top, right, bottom = (one[s] for s in SIDES)
        key = (one["label"], *(round(side, 2) for side in (left, top, right, bottom)), tuple(one["runs"] or ()))
        if not (right > left and bottom > top):
            notes.add("degenerate-box", place)
        elif right <= 0 or bottom <= 0 or left >= width or top >= height:
            notes.add("box-outside", place)
        elif key in taken:
            notes.add("duplicate-box", place)
        else:
            if (
                left < -EDGE_TOLERANCE_PIXELS
                or top < -EDGE_TOLERANCE_PIXELS
                or right > width + EDGE_TOLERANCE_PIXELS
                or bottom > height + EDGE_TOLERANCE_PIXELS
            ):
                notes.add("box-over-edge", place)
            one |= {
                "left": max(left, 0.0),
                "top": max(top, 0.0),
                "right": min(right, float(width)),
                "bottom": min(bottom, float(height)),
            }
            taken.add(key)
            kept.append(one)
            check_outline(one, size, place, notes)
            if one["keypoints"] is not None:
                check_keypoints(one, size, place, notes)
    shot.boxes = kept


def check_outline(one: dict[str, Any], size: tuple[int, int], place: str, notes: FindingCollector) -> None:
    """Drop an outline outside of the image; find one whose bounding box differs from the box."""
    around = (
        bounding_box(one["outline"]) if one["outline"] else bounding_box_of_runs(one["runs"], size) if one["runs"] else None
    )
    if around is None and not one["runs"]:
        return
    left, top, wide, high = around or (0, 0, 0, 0)
    right, bottom = min(left + wide, size[0]), min(top + high, size[1])
    left, top = max(left, 0), max(top, 0)
    if right <= left or bottom <= top:
        notes.add("outline-outside", place)
        one["outline"] = one["runs"] = None
        return
    shared = max(0.0, min(right, one["right"]) - max(left, one["left"])) * max(
        0.0, min(bottom, one["bottom"]) - max(top, one["top"])
    )
    whole = (one["right"] - one["left"]) * (one["bottom"] - one["top"])
    if shared < MIN_OUTLINE_OVERLAP * (whole + (right - left) * (bottom - top) - shared):
        notes.add("outline-far", place)


def bounding_box(parts: list[list[float]]) -> list[float]:
    """Return left, top, width and height of the bounding box of all parts."""
    xs, ys = ([v for p in parts for v in p[i::2]] for i in (0, 1))
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def bounding_box_of_runs(runs: list[int], size: tuple[float, float] | None) -> list[float] | None:
    """Return left, top, width and height of the pixels inside; None if they or the size of the image are unknown."""
    if not size or size[0] < 1 or size[1] < 1 or sum(runs) != round(size[0]) * round(size[1]):
        return None
    ends, height = np.cumsum(runs), round(size[1])
    spans = [(start, end - 1) for start, end in zip(ends[::2].tolist(), ends[1::2].tolist()) if end > start]
    if not spans:
        return None
    left, right = spans[0][0] // height, spans[-1][1] // height
    whole = any(first // height != last // height for first, last in spans)  # a run that reaches into the next column
    top = 0 if whole else min(first % height for first, _ in spans)
    bottom = height - 1 if whole else max(last % height for _, last in spans)
    return [left, top, right - left + 1, bottom - top + 1]


def check_keypoints(one: dict[str, Any], size: tuple[int, int], place: str, notes: FindingCollector) -> None:
    """Set the visibility of keypoints to 0, 1 or 2, and to 0 outside of the image; find those far from the box."""
    points = np.array(one["keypoints"], dtype=np.float64).reshape(-1, 3)
    seen = points[:, 2]
    if not np.isin(seen, (0, 1, 2)).all():
        notes.add("keypoint-visibility", place)
        seen[:] = np.where(np.isin(seen, (0, 1, 2)), seen, np.where(seen >= 1, 2, 0))
    labeled = seen > 0
    out = labeled & ((points[:, :2] < -EDGE_TOLERANCE_PIXELS) | (points[:, :2] > np.add(size, EDGE_TOLERANCE_PIXELS))).any(1)
    if out.any():
        notes.add("keypoint-outside", place)
        seen[out] = 0
    labeled &= ~out
    box = np.array([one[s] for s in SIDES])
    away = np.maximum(box[:2] - points[labeled, :2], points[labeled, :2] - box[2:])
    if labeled.any() and away.max() > MAX_KEYPOINT_DISTANCE * (box[2:] - box[:2]).max():
        notes.add("keypoint-far", place)
    if not labeled.any():
        notes.add("no-keypoints", place)
    points[~labeled] = 0
    one["keypoints"] = points.ravel().tolist()


def decode_text(content: bytes, place: str, shot: AnnotatedImage, notes: FindingCollector) -> str | None:
    """Decode the text of an annotation; return None and record a finding if it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        notes.mark_invalid("wrong-encoding", place, shot)
        return None


def parse_flag(value: Any) -> bool:
    """Return a flag that may be a boolean, a number or text: "0", "false" and "" are false."""
    return value.strip().lower() not in ("", "0", "0.0", "false", "no", "none") if isinstance(value, str) else bool(value)


def parse_finite(values: Any, count: int) -> list[float] | None:
    """Return exactly `count` finite numbers, or None."""
    try:
        numbers = [float(v) for v in values if not isinstance(v, bool)]
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(np.isfinite(numbers)) else None

"""Reader for LabelMe: a .json with outlines, boxes and masks for each image, next to the images or in a folder of its own."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from fieldguide.core.errors import DataError
from fieldguide.core.validation import parse_json
from fieldguide.data.dataset import FileEntry, Finding
from fieldguide.data.media import images
from fieldguide.data.media.boxes import (
    MAX_SHOWN_PLACES,
    SIDES,
    AnnotatedImage,
    FindingCollector,
    annotation_entry,
    build_raw,
    decode_text,
    make_object,
    parse_finite,
    read_sizes,
)
from fieldguide.data.media.file_names import ImageIndex
from fieldguide.data.media.masks import decode_run_lengths, encode_run_lengths, object_mask
from fieldguide.data.source import Options, RawTable, folder_split, list_folders, relative_path

NAME = "LabelMe"
UNDERSTANDS = (
    "images with outlines, masks or boxes, LabelMe: a .json (imagePath, shapes) for each image, next to it or in another folder, "
    "optionally below train, val and test"
)
HEAD_BYTES = 4096  # bytes at both ends of a file that are searched for the format's keys
MAX_INSPECTED_FILES = 20  # files of a folder that are searched for them
KINDS = ("polygon", "rectangle", "circle", "mask", "rotation", "quadrilateral", "oriented_rectangle")
CIRCLE_CORNERS = 64  # corners of the polygon that replaces a circle


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    return 10 if isinstance(source, Path) and source.is_dir() and find_files(source) else 0


def find_files(root: Path) -> list[tuple[Path, str | None]]:
    """Return the annotations and their splits, in the folder or in the folders in it; empty if it is another format."""
    folders = list_folders(root)
    inner = [(q, folder_split(p.name)) for p in folders for q in list_folders(p)]
    found = []
    for folder, split in ((root, None), *((p, folder_split(p.name)) for p in folders), *inner):
        names = sorted(n for n in os.listdir(folder) if n.lower().endswith(".json") and not n.startswith("."))
        files = [folder / n for n in names if (folder / n).is_file()]
        if files and not any(map(has_labelme_keys, files[:MAX_INSPECTED_FILES])):
            return []
        found += [(p, split) for p in files]
    return found


def has_labelme_keys(file: Path) -> bool:
    """Return whether the start and end of a JSON file contain the keys of the format."""
    with file.open("rb") as opened:
        seen = opened.read(HEAD_BYTES)
        opened.seek(max(0, file.stat().st_size - HEAD_BYTES))
        seen += opened.read(HEAD_BYTES)
    return b'"shapes"' in seen and (b'"imagePath"' in seen or b'"imageHeight"' in seen)


def load(source: Path, options: Options) -> RawTable:
    """Read all annotations and match them to images."""
    notes, shots, files = FindingCollector(), list[AnnotatedImage](), list[FileEntry]()
    index, classes, ignored = ImageIndex(source), set[str](), Ignored()
    for path, split in find_files(source):
        content, place = path.read_bytes(), relative_path(path, source)
        files.append(annotation_entry(path, content, source))
        shot = AnnotatedImage(path.with_suffix(".jpg"), place, split)
        shots.append(shot)
        text = decode_text(content, place, shot, notes)
        if text is None:
            continue
        try:
            document = parse_json(text, place)
        except DataError:
            document = {}
        if not isinstance(document.get("shapes"), list):
            notes.mark_invalid("malformed-json", place, shot)
            continue
        named = str(document.get("imagePath") or path.stem)
        image = index.find(named, (path.parent,)) or index.find(f"{path.stem}.jpg", (path.parent,))
        if image is None:
            notes.mark_invalid("no-picture", f"{place}: {named}", shot)
            continue
        shot.path = image
        size = parse_finite((document.get("imageWidth"), document.get("imageHeight")), 2)
        shot.size = (size[0], size[1]) if size else None
        groups: dict[Any, int] = {}
        for number, shape in enumerate(document["shapes"]):
            read_shape(shape, f"{place}: shape {number}", shot, notes, groups, ignored)
        classes |= {b["label"] for b in shot.boxes}
    raw = build_raw(source, shots, files, notes, sorted(classes))
    raw.findings += ignored.findings()
    return raw


@dataclass
class Ignored:
    """Shapes that are not objects, by kind, and the number of parts that were joined to objects."""

    kinds: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)
    joined: int = 0

    def findings(self) -> list[Finding]:
        """Return one finding about ignored shapes, and a note about objects of several parts."""
        found = []
        if self.kinds:
            counts = ", ".join(f"{kind} {count:,}" for kind, count in self.kinds.most_common())
            what = f"shapes that are neither boxes, outlines nor masks are ignored ({counts})"
            remedy = "Draw them as polygons if they are objects: images without other shapes count as background."
            places = tuple(self.places[:MAX_SHOWN_PLACES])
            found.append(Finding("unsupported-shape", "warning", what, places, self.kinds.total(), remedy))
        if self.joined:
            what = "shapes of the same label and group_id as another in their image are read as parts of one object"
            found.append(Finding("object-parts", "note", what, (), self.joined))
        return found


def read_shape(
    shape: Any, place: str, shot: AnnotatedImage, notes: FindingCollector, groups: dict[Any, int], ignored: Ignored
) -> None:
    """Add a rectangle, circle, polygon or mask to the image, or to the object of the same label and group_id in `groups`."""
    if not isinstance(shape, dict):
        notes.mark_invalid("malformed-box", place, shot)
        return
    kind = str(shape.get("shape_type") or "polygon").lower()
    label = str(value).strip() if (value := shape.get("label")) is not None else ""
    runs = shape.get("mask") if isinstance(shape.get("mask"), dict) else shape.get("rle")
    if kind not in KINDS and not isinstance(runs, dict):
        ignored.kinds[kind] += 1
        ignored.places.append(f"{place} ({kind})")
        return
    points = shape.get("points")
    flat = parse_finite([v for p in points for v in p], 2 * len(points)) if is_point_list(points) else None
    if isinstance(runs, dict):
        found = read_runs(label, runs, image_size(shot))
    elif flat is None or len(flat) < (4 if kind in ("rectangle", "circle", "mask") else 6):
        found = None
    elif kind == "mask":
        found = read_mask(label, shape.get("mask"), flat, image_size(shot))
        if found is None:
            notes.add("malformed-outline", place)
            found = make_object(label, min(flat[::2]), min(flat[1::2]), max(flat[::2]) + 1, max(flat[1::2]) + 1)
    else:
        found = read_points(label, kind, flat)
    if not label or found is None:
        notes.mark_invalid("malformed-box", place, shot)
        return
    group = shape.get("group_id")
    key = None if group is None or kind == "rectangle" else (label, str(group))
    if key in groups:
        ignored.joined += 1
        join_parts(shot.boxes[groups[key]], found, image_size(shot))
        return
    if key:
        groups[key] = len(shot.boxes)
    shot.boxes.append(found)
    shot.places.append(place)


def read_points(label: str, kind: str, flat: list[float]) -> dict[str, Any]:
    """Return the object of a rectangle, circle or polygon."""
    xs, ys = flat[::2], flat[1::2]
    outline: list[list[float]] | None = [flat]
    if kind == "circle":
        radius = float(np.hypot(xs[1] - xs[0], ys[1] - ys[0]))
        turn = np.linspace(0, 2 * np.pi, CIRCLE_CORNERS, endpoint=False)
        around = np.stack([xs[0] + radius * np.cos(turn), ys[0] + radius * np.sin(turn)], 1)
        outline = [around.ravel().tolist()]
        xs, ys = [xs[0] - radius, xs[0] + radius], [ys[0] - radius, ys[0] + radius]
    elif kind == "rectangle":
        outline = None
    return make_object(label, min(xs), min(ys), max(xs), max(ys), outline)


def read_mask(label: str, mask: Any, flat: list[float], size: tuple[int, int]) -> dict[str, Any] | None:
    """Return the object of a mask: a PNG in base64 of the pixels from the first to the last of two points; None if it is invalid."""
    if not isinstance(mask, str):
        return None
    try:
        with images.suppress_warnings(), images.open_image(io.BytesIO(base64.b64decode(mask.rpartition(",")[2]))) as image:
            if image.width * image.height > images.MAX_PIXELS:
                return None
            inside = np.asarray(image.convert("L")) > 0
    except images.DECODE_ERRORS:
        return None
    left, top = int(min(flat[::2])), int(min(flat[1::2]))
    right, bottom = int(max(flat[::2])), int(max(flat[1::2]))
    height, width = inside.shape
    if abs(right - left + 1 - width) > 1 or abs(bottom - top + 1 - height) > 1:
        return None
    whole = np.zeros((size[1], size[0]), dtype=bool)
    x, y = max(left, 0), max(top, 0)
    part = inside[y - top :, x - left :][: max(0, size[1] - y), : max(0, size[0] - x)]
    whole[y : y + part.shape[0], x : x + part.shape[1]] = part
    return object_of_mask(label, whole)


def read_runs(label: str, runs: dict[str, Any], size: tuple[int, int]) -> dict[str, Any] | None:
    """Return the object of COCO run lengths for the whole image, or None if they are invalid."""
    counts, own = decode_run_lengths(runs.get("counts")), parse_finite(runs.get("size"), 2)
    if not counts or own != [size[1], size[0]] or sum(counts) != size[0] * size[1]:
        return None
    inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return object_of_mask(label, inside.reshape(size).T)


def object_of_mask(label: str, inside: np.ndarray) -> dict[str, Any] | None:
    """Return the object of a mask H W with its tight box, or None if the mask is empty."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows):
        return None
    sides = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return make_object(label, *sides, runs=encode_run_lengths(inside))


def join_parts(whole: dict[str, Any], part: dict[str, Any], size: tuple[int, int]) -> None:
    """Add a part to an object: its pixels and its box."""
    if whole["outline"] and part["outline"]:
        whole["outline"] += part["outline"]
    else:
        masks = [mask for one in (whole, part) if (mask := object_mask(one, size[1], size[0])) is not None]
        whole["outline"], whole["runs"] = None, encode_run_lengths(np.any(masks, axis=0))
    whole |= {s: min(whole[s], part[s]) for s in SIDES[:2]} | {s: max(whole[s], part[s]) for s in SIDES[2:]}


def image_size(shot: AnnotatedImage) -> tuple[int, int]:
    """Return the width and height of the image file; (1, 1) if it cannot be opened or is too large."""
    size = read_sizes([shot.path])[0]
    return size if size and size[0] * size[1] <= images.MAX_PIXELS else (1, 1)


def is_point_list(points: Any) -> TypeGuard[list[list[Any]]]:
    """Return whether the value is a list of points with two coordinates each."""
    return isinstance(points, list) and all(isinstance(p, list) and len(p) == 2 for p in points)

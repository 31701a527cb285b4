"""Reader for LabelMe: a .json with outlines and boxes for each image, next to the images or in a folder of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from fieldguide.core.errors import DataError
from fieldguide.core.validation import parse_json
from fieldguide.data.dataset import FileEntry
from fieldguide.data.media.boxes import (
    AnnotatedImage,
    FindingCollector,
    annotation_entry,
    build_raw,
    decode_text,
    make_object,
    parse_finite,
)
from fieldguide.data.media.file_names import ImageIndex
from fieldguide.data.source import Options, RawTable, folder_split, list_folders, relative_path

NAME = "LabelMe"
UNDERSTANDS = (
    "images with outlines or boxes, LabelMe: a .json (imagePath, shapes) for each image, next to it or in another folder, "
    "optionally below train, val and test"
)
HEAD_BYTES = 4096  # bytes at both ends of a file that are searched for the format's keys
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
        if files and not has_labelme_keys(files[0]):
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
    index, classes = ImageIndex(source), set[str]()
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
        for number, shape in enumerate(document["shapes"]):
            read_shape(shape, f"{place}: shape {number}", shot, notes)
        classes |= {b["label"] for b in shot.boxes}
    return build_raw(source, shots, files, notes, sorted(classes))


def read_shape(shape: Any, place: str, shot: AnnotatedImage, notes: FindingCollector) -> None:
    """Add a rectangle, circle or polygon to the image; points and lines are ignored with a note."""
    kind = shape.get("shape_type") or "polygon" if isinstance(shape, dict) else ""
    label = str(shape.get("label") or "").strip() if isinstance(shape, dict) else ""
    points = shape.get("points") if isinstance(shape, dict) else None
    flat = parse_finite([v for p in points for v in p], 2 * len(points)) if is_point_list(points) else None
    if kind in ("point", "points", "line", "linestrip"):
        notes.add("unsupported-shape", f"{place} ({kind})")
        return
    if not label or flat is None or len(flat) < (4 if kind in ("rectangle", "circle", "mask") else 6):
        notes.mark_invalid("malformed-box", place, shot)
        return
    xs, ys = flat[::2], flat[1::2]
    outline: list[list[float]] | None = [flat]
    if kind == "circle":
        radius = float(np.hypot(xs[1] - xs[0], ys[1] - ys[0]))
        turn = np.linspace(0, 2 * np.pi, CIRCLE_CORNERS, endpoint=False)
        around = np.stack([xs[0] + radius * np.cos(turn), ys[0] + radius * np.sin(turn)], 1)
        outline = [around.ravel().tolist()]
        xs, ys = [xs[0] - radius, xs[0] + radius], [ys[0] - radius, ys[0] + radius]
    elif kind in ("rectangle", "mask"):  # of a mask only its box is read
        outline = None
    shot.boxes.append(make_object(label, min(xs), min(ys), max(xs), max(ys), outline))
    shot.places.append(place)


def is_point_list(points: Any) -> TypeGuard[list[list[Any]]]:
    """Return whether the value is a list of points with two coordinates each."""
    return isinstance(points, list) and all(isinstance(p, list) and len(p) == 2 for p in points)

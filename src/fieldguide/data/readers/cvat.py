"""Reader for CVAT's "CVAT for images": one annotations.xml with outlines, boxes, ellipses and masks of all images."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element
from xml.parsers import expat

import numpy as np

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import Finding
from fieldguide.data.media.boxes import (
    MAX_SHOWN_PLACES,
    AnnotatedImage,
    FindingCollector,
    annotation_entry,
    build_raw,
    make_object,
    parse_finite,
)
from fieldguide.data.media.file_names import ImageIndex
from fieldguide.data.readers.labelme import Ignored, image_size, join_parts, object_of_mask
from fieldguide.data.readers.voc import DoctypeError, parse_xml
from fieldguide.data.source import Options, RawTable, folder_split, list_visible, relative_path

NAME = "CVAT"
UNDERSTANDS = (
    "images with outlines, masks or boxes, CVAT for images 1.1: annotations.xml next to the images or to a folder images, or that "
    "file itself"
)
HEAD_BYTES = 1 << 16  # bytes at the start of a file that are searched for the format's elements
ELLIPSE_CORNERS = 64  # corners of the polygon that replaces an ellipse
NO_OBJECTS = ("polyline", "points", "cuboid", "skeleton", "tag")  # elements that are no masks


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    return 11 if isinstance(source, Path) and find_documents(source) else 0


def find_documents(source: Path) -> list[Path]:
    """Return the XML files of this format: the source itself, or files in the folder or in the folders in it."""
    if source.is_file():
        return [source] if source.suffix.lower() == ".xml" and is_cvat(source) else []
    inner = [q for p in list_visible(source)[0] if p.is_dir() for q in list_visible(p)[0]]
    for files in (list_visible(source)[0], inner):
        found = [p for p in files if p.suffix.lower() == ".xml" and p.is_file() and is_cvat(p)]
        if found:
            return found
    return []


def is_cvat(file: Path) -> bool:
    """Return whether a file begins as this format does."""
    with file.open("rb") as opened:
        seen = opened.read(HEAD_BYTES)
    return b"<annotations" in seen and (b"<meta>" in seen or b"<image " in seen or b"<track " in seen)


def load(source: Path, options: Options) -> RawTable:
    """Read all documents. Raises DataError for XML that is not well-formed, and for annotations of videos."""
    notes, shots, files, ignored = FindingCollector(), list[AnnotatedImage](), [], Ignored()
    root = source.parent if source.is_file() else source
    index, names = ImageIndex(root), list[str]()
    for file in find_documents(source):
        content, where = file.read_bytes(), relative_path(file, root)
        files.append(annotation_entry(file, content, root))
        try:
            document, lines = parse_xml(content)
        except DoctypeError:
            raise DataError(f"{file}: has a document type, which is rejected. Remove the line with <!DOCTYPE.") from None
        except (expat.ExpatError, AssertionError) as error:
            line = getattr(error, "lineno", 1)
            raise DataError(f"{file}:{line}: not well-formed XML. If the file is truncated, export it again.") from None
        if document.find("track") is not None:
            raise DataError(f"{file}: annotations of a video (track). Export them from CVAT as `CVAT for images 1.1`.")
        names += [text for label in document.findall("meta//labels/label") if (text := (label.findtext("name") or "").strip())]
        for image in document.findall("image"):
            named, place = str(image.get("name") or ""), f"{where}:{lines[image]}"
            split = folder_split(str(image.get("subset") or "")) or folder_split(Path(named).parent.name)
            shot = AnnotatedImage(root / named, f"{place}: {named}", split)
            shots.append(shot)
            path = index.find(named, (file.parent, file.parent / "images")) if named else None
            if path is None:
                notes.mark_invalid("no-picture", shot.place, shot)
                continue
            shot.path = path
            size = parse_finite((image.get("width"), image.get("height")), 2)
            shot.size = (size[0], size[1]) if size else None
            read_shapes(image, where, lines, shot, notes, ignored)
    seen = {b["label"] for s in shots for b in s.boxes}
    classes = [n for n in dict.fromkeys(names) if n in seen] + sorted(seen - set(names))
    if strange := sorted(seen - set(names)) if names else []:
        places = [f"{label!r}" for label in strange]
        what = "labels of shapes that the file does not define in its labels; they are classes too"
        ignored_names = [
            Finding("undefined-label", "warning", what, tuple(places[:MAX_SHOWN_PLACES]), len(places), "Correct them.")
        ]
    else:
        ignored_names = []
    raw = build_raw(root, shots, files, notes, classes)
    raw.findings += [*ignored.findings(), *ignored_names]
    return raw


def read_shapes(
    image: Element,
    where: str,
    lines: dict[Element, int],
    shot: AnnotatedImage,
    notes: FindingCollector,
    ignored: Ignored,
) -> None:
    """Add the shapes of an image; those of the same label and group are parts of one object."""
    groups: dict[tuple[str, str], int] = {}
    for shape in image:
        place = f"{where}:{lines[shape]}"
        if shape.tag in NO_OBJECTS:
            ignored.kinds[shape.tag] += 1
            ignored.places.append(f"{place} ({shape.tag})")
            continue
        label = str(shape.get("label") or "").strip()
        found, valid = parse_shape(shape, label, shot)
        if found is None or not label:
            notes.mark_invalid("malformed-box", place, shot)
            continue
        if not valid:
            notes.add("malformed-outline", place)
        group = str(shape.get("group_id") or "0")
        key = (label, group)
        if group != "0" and shape.tag != "box" and key in groups:
            ignored.joined += 1
            join_parts(shot.boxes[groups[key]], found, image_size(shot))
            continue
        if group != "0" and shape.tag != "box":
            groups[key] = len(shot.boxes)
        shot.boxes.append(found)
        shot.places.append(place)


def parse_shape(shape: Element, label: str, shot: AnnotatedImage) -> tuple[dict[str, Any] | None, bool]:
    """Return the object of a polygon, box, ellipse or mask, or None; and whether its outline is valid."""
    numbers = lambda *keys: parse_finite([shape.get(key, "") for key in keys], len(keys))
    turn = parse_finite((shape.get("rotation") or 0,), 1)
    if shape.tag == "polygon":
        pairs = [pair.split(",") for pair in str(shape.get("points") or "").split(";") if pair.strip()]
        flat = parse_finite([v for pair in pairs for v in pair], 2 * len(pairs))
        if flat is None or not flat or any(len(pair) != 2 for pair in pairs):
            return None, False
        box = (min(flat[::2]), min(flat[1::2]), max(flat[::2]), max(flat[1::2]))
        return make_object(label, *box, [flat] if len(flat) >= 6 else None), len(flat) >= 6
    if shape.tag == "box":
        sides = numbers("xtl", "ytl", "xbr", "ybr")
        if sides is None or turn is None:
            return None, False
        left, top, right, bottom = sides
        if not turn[0]:
            return make_object(label, left, top, right, bottom), True
        corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
        return turned_object(label, corners, turn[0]), True
    if shape.tag == "ellipse":
        values = numbers("cx", "cy", "rx", "ry")
        if values is None or turn is None:
            return None, False
        x, y, across, down = values
        around = np.linspace(0, 2 * np.pi, ELLIPSE_CORNERS, endpoint=False)
        return turned_object(label, np.stack([x + across * np.cos(around), y + down * np.sin(around)], 1), turn[0]), True
    if shape.tag == "mask":
        return parse_mask(shape, label, shot)
    return None, False


def turned_object(label: str, points: np.ndarray, degrees: float) -> dict[str, Any]:
    """Return the object of a polygon, rotated clockwise about its center."""
    middle, angle = (points.min(0) + points.max(0)) / 2, np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    points = (points - middle) @ turn + middle
    (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
    return make_object(label, left, top, right, bottom, [points.ravel().tolist()])


def parse_mask(shape: Element, label: str, shot: AnnotatedImage) -> tuple[dict[str, Any] | None, bool]:
    """Return the object of a mask: run lengths row by row within its box, first of pixels outside.

    A mask whose runs do not fill its box is a box alone.
    """
    values = parse_finite([shape.get(key, "") for key in ("left", "top", "width", "height")], 4)
    if values is None or min(values[2:]) < 1 or any(v % 1 for v in values):
        return None, False
    left, top, width, height = (int(v) for v in values)
    runs = str(shape.get("rle") or "").split(",")
    counts = parse_finite(runs, len(runs))
    box = make_object(label, left, top, left + width, top + height)
    if counts is None or any(v < 0 or v % 1 for v in counts) or sum(counts) != width * height:
        return box, False
    wide, high = image_size(shot)
    inside = np.repeat(np.arange(len(counts)) % 2 == 1, np.array(counts, dtype=np.int64)).reshape(height, width)
    if left < 0 or top < 0 or left + width > wide or top + height > high:
        return box, False
    whole = np.zeros((high, wide), dtype=bool)
    whole[top : top + height, left : left + width] = inside
    found = object_of_mask(label, whole)
    return (found, True) if found else (box, False)

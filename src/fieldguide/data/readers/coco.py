"""Reader for COCO: a JSON of images, annotations (bbox: left, top, width, height in pixels; segmentation: outlines) and
categories, optionally one file per split."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from fieldguide.core.errors import DataError
from fieldguide.core.validation import parse_json
from fieldguide.data.media.boxes import (
    AnnotatedImage,
    FindingCollector,
    Skeleton,
    annotation_entry,
    are_corners,
    bounding_box,
    bounding_box_of_runs,
    build_raw,
    make_object,
    parse_finite,
    parse_flag,
)
from fieldguide.data.media.file_names import ImageIndex
from fieldguide.data.media.masks import decode_run_lengths
from fieldguide.data.source import Options, RawTable, folder_split, list_visible, relative_path, split_of

NAME = "COCO"
UNDERSTANDS = (
    "images with boxes or outlines, COCO: instances .json (images, annotations, categories) in a folder "
    "annotations, one for each of train, val and test or one for all, next to folders of images; or that file "
    "itself"
)
HEAD_BYTES = 1 << 16  # bytes at both ends of a file that are searched for the format's keys
KEYS = (b'"images"', b'"annotations"', b'"categories"', b'"bbox"')


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path):
        return 0
    if source.is_file():
        return 11 if source.suffix.lower() == ".json" and has_coco_keys(source) else 0
    return 11 if find_documents(source) else 0


def has_coco_keys(file: Path) -> bool:
    """Return whether the start and end of a JSON file contain at least two of the format's keys."""
    with file.open("rb") as opened:
        seen = opened.read(HEAD_BYTES)
        opened.seek(max(0, file.stat().st_size - HEAD_BYTES))
        seen += opened.read(HEAD_BYTES)
    begins = seen.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{")
    listed = any(k in seen for k in KEYS[:2])  # descriptions of features may have the other keys
    other = b'"caption"' in seen or b'"segments_info"' in seen
    return begins and listed and sum(k in seen for k in KEYS) >= 2 and not other


def find_documents(root: Path) -> list[Path]:
    """Return the JSON files in `annotations`, in the folder itself, or in its split folders; prefer `instances*`."""
    folders = [p for p in list_visible(root)[0] if p.is_dir()]
    for places in (
        [p for p in folders if p.name.lower() == "annotations"],
        [root],
        [p for p in folders if folder_split(p.name)],
    ):
        files = [
            f for p in places for f in list_visible(p)[0] if f.suffix.lower() == ".json" and f.is_file() and has_coco_keys(f)
        ]
        if files:
            return [f for f in files if f.name.lower().startswith("instances")] or files
    return []


def load(source: Path, options: Options) -> RawTable:
    """Read a COCO folder or file. Raises DataError if the JSON is invalid or categories of several files conflict."""
    files, shots, notes = [], [], FindingCollector()
    if source.is_file():
        found = [source]
        root = source.parent.parent if source.parent.name.lower() == "annotations" else source.parent
    else:
        found, root = find_documents(source), source
    splits = [document_split(f, root) for f in found]
    categories: dict[int | str, str] = {}
    index = ImageIndex(root)
    skeleton: Skeleton | None = None
    for file, split in zip(found, splits):
        content = file.read_bytes()
        files.append(annotation_entry(file, content, root))
        document = parse_document(file, content)
        own_categories = read_categories(document, file)
        for number, name in own_categories.items():
            if categories.setdefault(number, name) != name:
                raise DataError(
                    f"{file}: category {number} is {name!r}, but {categories[number]!r} in another file. Export them together."
                )
        skeleton, posed = read_skeleton(document, file, skeleton, notes)
        points = len(skeleton.names) if skeleton else 0
        shots += read_images(
            document, file, root, split if len(found) > 1 else None, own_categories, notes, index, dict.fromkeys(posed, points)
        )
    correct_corners(shots, notes)
    ordered = sorted(categories.items(), key=lambda c: (isinstance(c[0], str), c[0]))
    return build_raw(root, shots, files, notes, list(dict.fromkeys(v for _, v in ordered)), skeleton)


def document_split(file: Path, root: Path) -> str | None:
    """Return the split in the name of a file or its folder, or None."""
    return split_of(file.stem) or folder_split(file.stem) or (folder_split(file.parent.name) if file.parent != root else None)


def parse_document(file: Path, content: bytes) -> dict[str, Any]:
    """Parse the JSON. Raises DataError if it is invalid or lacks a required list."""
    document: dict[str, Any] = parse_json(content, file, remedy="If the file is truncated, copy it again.")
    missing = [k for k in ("images", "annotations", "categories") if not isinstance(document.get(k), list)]
    if missing:
        raise DataError(f"{file}: lacks {', '.join(missing)} (each must be a list).")
    return document


def read_categories(document: dict[str, Any], file: Path) -> dict[int | str, str]:
    """Return category id -> name. Raises DataError if entries are malformed or ids are duplicated."""
    listed = [(as_id(c.get("id")), c.get("name")) if isinstance(c, dict) else (None, None) for c in document["categories"]]
    names = [(n, str(name).strip()) for n, name in listed if n is not None and name is not None]
    if len(names) < len(document["categories"]):
        raise DataError(f"{file}: each category needs an id (a number or text) and a name.")
    twice = [str(n) for n, count in Counter(n for n, _ in names).items() if count > 1]
    if twice:
        raise DataError(f"{file}: several categories have the id {', '.join(twice[:5])}. Ids must be unique.")
    return dict(names)


def read_skeleton(
    document: dict[str, Any], file: Path, first: Skeleton | None, notes: FindingCollector
) -> tuple[Skeleton | None, list[int | str | None]]:
    """Return the keypoints of the categories, and the ids of the categories that have these and no others."""
    posed = []
    for category in document["categories"]:
        names = category.get("keypoints")
        if not isinstance(names, list) or not names or not all(isinstance(n, str) and n.strip() for n in names):
            continue
        names = tuple(n.strip() for n in names)
        pairs = [parse_finite(p, 2) for p in category.get("skeleton") or () if isinstance(p, list)]
        lines = tuple((int(a) - 1, int(b) - 1) for a, b in filter(None, pairs) if min(a, b) >= 1 and max(a, b) <= len(names))
        first = first or Skeleton(names, lines, find_mirrored(names))
        if names != first.names:
            notes.add("keypoint-definitions", f"{file.name}: {category.get('name')}")
        else:
            posed.append(as_id(category.get("id")))
    return first, posed


def find_mirrored(names: tuple[str, ...]) -> tuple[int, ...]:
    """Return the place of each keypoint in the mirrored order, by `left` and `right` in the names; empty if none has them."""
    swap = {"left": "right", "right": "left"}
    other = [re.sub("left|right", lambda found: swap[found[0]], name.lower()) for name in names]
    known = {name.lower(): place for place, name in enumerate(names)}
    if all(name.lower() == new for name, new in zip(names, other)) or any(name not in known for name in other):
        return ()
    return tuple(known[name] for name in other)


def read_images(
    document: dict[str, Any],
    file: Path,
    root: Path,
    split: str | None,
    categories: dict[int | str, str],
    notes: FindingCollector,
    index: ImageIndex,
    posed: dict[int | str | None, int],
) -> list[AnnotatedImage]:
    """Return the images of a document with their boxes; `posed` has the number of keypoints of categories.

    Raises DataError if an image lacks its id or file_name.
    """
    shots, by_id = list_images(document, file, root, split, notes, index)
    where = relative_path(file, root)
    for number, annotation in enumerate(document["annotations"]):
        place = f"{where}: annotation {annotation.get('id', number) if isinstance(annotation, dict) else number}"
        shot = by_id.get(as_id(annotation.get("image_id"))) if isinstance(annotation, dict) else None
        if shot is None:
            notes.add("unknown-picture", place)
            continue
        parts, runs, whole = parse_outline(annotation.get("segmentation"), shot.size)
        values = parse_box(annotation.get("bbox"))
        if annotation.get("bbox") in (None, [], [0, 0, 0, 0]):  # some tools export only outlines
            values = bounding_box(parts) if parts else bounding_box_of_runs(runs, shot.size) if runs else values
        category = as_id(annotation.get("category_id"))
        if category not in categories:
            notes.mark_invalid("unknown-category", f"{place} ({annotation.get('category_id')})", shot)
        elif values is None:
            notes.mark_invalid("malformed-box", place, shot)
        else:
            left, top, width, height = values
            keypoints = None
            if points := posed.get(category):
                keypoints = parse_finite(annotation.get("keypoints", [0] * 3 * points), 3 * points)
                if keypoints is None:
                    notes.add("malformed-keypoints", place)
            shot.boxes.append(
                make_object(
                    categories[category],
                    left,
                    top,
                    left + width,
                    top + height,
                    parts,
                    parse_flag(annotation.get("iscrowd")),
                    runs,
                    keypoints,
                )
            )
            shot.places.append(place)
            if not whole:
                notes.add("malformed-outline", place)
    return shots


def list_images(
    document: dict[str, Any], file: Path, root: Path, split: str | None, notes: FindingCollector, index: ImageIndex
) -> tuple[list[AnnotatedImage], dict[Any, AnnotatedImage]]:
    """Return the images of a document, and those by id. Raises DataError if an image lacks its id or file_name."""
    where, shots = relative_path(file, root), []
    by_id: dict[Any, AnnotatedImage] = {}
    places = find_image_folders(document["images"], file, root)
    for number, image in enumerate(document["images"]):
        if not isinstance(image, dict) or as_id(image.get("id")) is None or not isinstance(image.get("file_name"), str):
            raise DataError(f"{file}: image {number} lacks id or file_name.")
        name = image["file_name"]
        short = name.replace("\\", "/").rpartition("/")[2]
        path = next((p / n for p in places for n in (name, short) if (p / n).is_file()), None)
        path = path or index.find(name, places) or places[0] / name
        key = as_id(image["id"])
        size = parse_finite((image.get("width"), image.get("height")), 2)
        added = AnnotatedImage(path, f"{where}: {name}", split, size=(size[0], size[1]) if size else None)
        shots.append(added)
        if key in by_id:
            for one in (by_id[key], added):
                notes.mark_invalid("duplicate-id", f"{one.place} (id {image['id']})", one)
        by_id.setdefault(key, added)
    return shots, by_id


def as_id(value: Any) -> int | str | None:
    """Return an id as an integer if it is a whole number in any notation (12, 12.0, "12", "000012"), else as text.

    Returns None for a value that cannot be an id.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str):
        text = value.strip()
        if not re.fullmatch(r"[+-]?\d{1,18}(\.0*)?", text):
            return text or None
        return int(text.partition(".")[0])
    if isinstance(value, float):
        return int(value) if value.is_integer() else str(value)
    return value


def parse_box(box: Any) -> list[float] | None:
    """Return left, top, width and height from a list, its JSON text, or an object with these keys; None if invalid."""
    if isinstance(box, str):
        try:
            box = parse_json(box, "bbox", expect=object)
        except DataError:
            return None
    if isinstance(box, dict):
        box = [box.get(a, box.get(b)) for a, b in (("x", "left"), ("y", "top"), ("width", "w"), ("height", "h"))]
    return parse_finite(box, 4) if isinstance(box, list) else None


def parse_outline(
    segmentation: Any, size: tuple[float, float] | None
) -> tuple[list[list[float]] | None, list[int] | None, bool]:
    """Return the polygons of an object, its run lengths for an image of (width, height), and whether the input is valid.

    None or an empty list is an object without an outline.
    """
    if isinstance(segmentation, dict):
        runs = decode_run_lengths(segmentation.get("counts"))
        own_categories: Any = segmentation.get("size")
        fits = (
            isinstance(own_categories, list)
            and parse_finite(own_categories, 2)
            and runs
            and sum(runs) == own_categories[0] * own_categories[1]
        )
        if fits and size and all(size):
            fits = (own_categories[1], own_categories[0]) == tuple(round(v) for v in size)
        return (None, runs, True) if fits else (None, None, False)
    if not isinstance(segmentation, list):
        return None, None, segmentation is None
    if segmentation and not any(isinstance(p, list) for p in segmentation):
        segmentation = [segmentation]  # one polygon without the list of parts
    parts = [parse_finite(p, len(p)) if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 else None for p in segmentation]
    return [p for p in parts if p] or None, None, all(parts)


def correct_corners(shots: list[AnnotatedImage], notes: FindingCollector) -> None:
    """Read boxes as left, top, right, bottom if only this fits the images."""
    listed = [
        (s, place, b) for s in shots if not s.bad for place, b in zip(s.places, s.boxes) if not (b["outline"] or b["runs"])
    ]
    written = [(s.path, (b["left"], b["top"], b["right"] - b["left"], b["bottom"] - b["top"])) for s, _, b in listed]
    if not are_corners(written):
        return
    for (_, place, box), (_, (_, _, right, bottom)) in zip(listed, written):
        box |= {"right": right, "bottom": bottom}
        notes.add("box-corners", place)


def find_image_folders(listed: list[Any], file: Path, root: Path) -> list[Path]:
    """Return the folders that may contain the images, ordered by how many of the first 50 images they contain."""
    ending = file.stem.rpartition("_")[2]  # instances_train2017 -> train2017
    names = [d for d in (ending, file.stem, document_split(file, root) or "") if d]
    tries = [
        file.parent,
        root,
        *(root / "images" / n for n in names),
        *(root / n for n in names),
        root / "images",
        root / "JPEGImages",
        *(root / n / "images" for n in names),
        *(root / n / "data" for n in names),
        root / "data",
    ]
    some = [
        Path(i["file_name"].replace("\\", "/"))
        for i in listed[:50]
        if isinstance(i, dict) and isinstance(i.get("file_name"), str)
    ]
    hits = {p: sum((p / n).is_file() or (p / n.name).is_file() for n in some) for p in dict.fromkeys(tries)}
    return sorted(hits, key=lambda p: -hits[p])

"""Reader for COCO's panoptic format: a JSON of images, annotations with segments_info, and categories; and a PNG for each image, whose
pixels hold the ids of segments as R + 256 G + 65536 B. Id 0 and ids that are not annotated belong to no segment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fieldguide.core.errors import DataError
from fieldguide.data.media.boxes import AnnotatedImage, FindingCollector, annotation_entry, parse_flag
from fieldguide.data.media.file_names import ImageIndex
from fieldguide.data.media.segments import (
    SegmentClass,
    add_segments,
    build_segments,
    count_pixels,
    parse_codes,
    read_maps,
    wants_segments,
)
from fieldguide.data.readers import coco
from fieldguide.data.source import Options, RawTable, folder_split, list_visible, relative_path

NAME = "COCO panoptic"
UNDERSTANDS = (
    "images with panoptic segments, COCO: panoptic .json (images, annotations with segments_info, categories with isthing) in a folder "
    "annotations, one for each of train, val and test or one for all, next to a folder of PNGs with the same name; or that file itself"
)
MAX_AREA_DIFFERENCE = 0.05  # of the annotated and the actual area of a segment, as a fraction of the larger one
SOME = 50  # annotations that show which folder holds the files of segments


@dataclass(frozen=True)
class Annotated:
    """An image, the file of its segments, and their classes and annotated areas by id."""

    shot: AnnotatedImage
    path: Path | None
    name: str
    classes: Mapping[int, SegmentClass]
    areas: Mapping[int, float]


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported.

    A folder that also has boxes is read as such, unless segments are requested.
    """
    if not isinstance(source, Path):
        return 0
    if source.is_file():
        return 12 if source.suffix.lower() == ".json" and has_panoptic_keys(source) else 0
    if not find_documents(source):
        return 0
    return 14 if wants_segments(options) else 10 if coco.find_documents(source) else 12


def has_panoptic_keys(file: Path) -> bool:
    """Return whether the start and end of a JSON file contain the keys of the format."""
    with file.open("rb") as opened:
        seen = opened.read(coco.HEAD_BYTES)
        opened.seek(max(0, file.stat().st_size - coco.HEAD_BYTES))
        seen += opened.read(coco.HEAD_BYTES)
    return b'"segments_info"' in seen and any(key in seen for key in coco.KEYS[:3])


def find_documents(root: Path) -> list[Path]:
    """Return the JSON files in `annotations`, in the folder itself, or in its split folders."""
    folders = [p for p in list_visible(root)[0] if p.is_dir()]
    for places in (
        [p for p in folders if p.name.lower() in ("annotations", "panoptic_annotations")],
        [root],
        [p for p in folders if folder_split(p.name)],
    ):
        every = (f for p in places for f in list_visible(p)[0] if f.suffix.lower() == ".json" and f.is_file())
        if files := [f for f in every if has_panoptic_keys(f)]:
            return files
    return []


def load(source: Path, options: Options) -> RawTable:
    """Read a folder or file. Raises DataError if the JSON is invalid or categories of several files conflict."""
    files, shots, notes = [], list[AnnotatedImage](), FindingCollector()
    found = [source] if source.is_file() else find_documents(source)
    root = source if source.is_dir() else source.parent.parent if "annotations" in source.parent.name.lower() else source.parent
    categories: dict[int | str, tuple[str, bool]] = {}
    every: list[Annotated] = []
    index = ImageIndex(root)
    for file in found:
        content = file.read_bytes()
        files.append(annotation_entry(file, content, root))
        document = coco.parse_document(file, content)
        own = read_categories(document, file)
        for number, kind in own.items():
            if categories.setdefault(number, kind) != kind:
                raise DataError(
                    f"{file}: category {number} is {describe(kind)}, but {describe(categories[number])} in another file. Export them "
                    "together."
                )
        split = coco.document_split(file, root) if len(found) > 1 else None
        listed, by_id = coco.list_images(document, file, root, split, notes, index)
        shots += listed
        every += read_annotations(document, file, root, own, by_id, notes)
    annotated = {id(one.shot) for one in every}
    for shot in shots:
        if not shot.bad and id(shot) not in annotated:
            notes.mark_invalid("no-segments", shot.place, shot)
    void, total = add_maps(every, frozenset(name for name, thing in categories.values() if thing), notes)
    ordered = [kind for _, kind in sorted(categories.items(), key=lambda c: (isinstance(c[0], str), c[0]))]
    names = list(dict.fromkeys(name for name, _ in ordered))
    things = list(dict.fromkeys(name for name, thing in ordered if thing))
    return build_segments(root, shots, files, notes, names, things, void / max(total, 1))


def describe(kind: tuple[str, bool]) -> str:
    """Return a class in words: 'sky' (stuff)."""
    return f"{kind[0]!r} ({'thing' if kind[1] else 'stuff'})"


def read_categories(document: dict[str, Any], file: Path) -> dict[int | str, tuple[str, bool]]:
    """Return category id -> name and whether it is a thing.

    Raises DataError for a malformed category, or one without `isthing`.
    """
    names = coco.read_categories(document, file)
    lacking = [c.get("name") for c in document["categories"] if c.get("isthing") is None]
    if lacking:
        raise DataError(
            f"{file}: category {lacking[0]!r} lacks isthing: 1 for countable objects, 0 for stuff such as sky. Add it to each category."
        )
    return {n: (names[n], parse_flag(c["isthing"])) for c in document["categories"] if (n := coco.as_id(c["id"])) is not None}


def read_annotations(
    document: dict[str, Any],
    file: Path,
    root: Path,
    categories: Mapping[int | str, tuple[str, bool]],
    by_id: Mapping[Any, AnnotatedImage],
    notes: FindingCollector,
) -> list[Annotated]:
    """Return the annotated images of a document."""
    where, listed, found = relative_path(file, root), document["annotations"], []
    folders = find_segment_folders([a.get("file_name") for a in listed[:SOME] if isinstance(a, dict)], file, root)
    seen: set[int] = set()
    for number, annotation in enumerate(listed):
        known = isinstance(annotation, dict)
        shot = by_id.get(coco.as_id(annotation.get("image_id"))) if known else None
        place = f"{where}: annotation {number}" if shot is None else shot.place
        if shot is None:
            notes.add("unknown-picture", place)
            continue
        if id(shot) in seen:
            notes.mark_invalid("duplicate-id", f"{place} (two annotations)", shot)
            continue
        seen.add(id(shot))
        segments, name = annotation.get("segments_info"), annotation.get("file_name")
        if not isinstance(segments, list) or not isinstance(name, str):
            notes.mark_invalid("no-segments", place, shot)
            continue
        path = next((p / name for p in folders if (p / name).is_file()), None)
        found.append(Annotated(shot, path, name, *read_segments(segments, place, categories, shot, notes)))
    return found


def read_segments(
    segments: list[Any],
    place: str,
    categories: Mapping[int | str, tuple[str, bool]],
    shot: AnnotatedImage,
    notes: FindingCollector,
) -> tuple[dict[int, SegmentClass], dict[int, float]]:
    """Return the classes and the annotated areas of the segments of an image by id."""
    classes: dict[int, SegmentClass] = {}
    areas: dict[int, float] = {}
    for one in segments:
        key = coco.as_id(one.get("id")) if isinstance(one, dict) else None
        category = coco.as_id(one.get("category_id")) if isinstance(one, dict) else None
        spot = f"{place}: segment {key}"
        if not isinstance(key, int) or key < 1:
            notes.mark_invalid("malformed-box", spot, shot)
        elif category is None or category not in categories:
            notes.mark_invalid("unknown-category", f"{spot} ({one.get('category_id')})", shot)
        elif key in classes:
            notes.add("duplicate-segment", spot)
        else:
            classes[key] = SegmentClass(categories[category][0], parse_flag(one.get("iscrowd")), spot)
            if isinstance(area := one.get("area"), int | float) and not isinstance(area, bool):
                areas[key] = float(area)
    return classes, areas


def find_segment_folders(names: list[Any], file: Path, root: Path) -> list[Path]:
    """Return the folders that may hold the files of segments, ordered by how many of some names they contain.

    A folder named like the document comes first, then those whose name tells; images may have the same names.
    """
    tries = [file.with_suffix("")]
    for folder in (file.parent, root):
        inner = [p for p in list_visible(folder)[0] if p.is_dir()]
        tries += [p for p in inner if re.search("panoptic|segment|mask|instance", p.name, re.IGNORECASE)]
    tries.append(file.parent)
    every = [p for p in dict.fromkeys(tries) if p.is_dir()]
    hits = {p: sum(isinstance(n, str) and (p / n).is_file() for n in names) for p in every}
    return sorted(every, key=lambda p: -hits[p])


def list_numbers(numbers: list[int]) -> str:
    """Return the first of several numbers as text."""
    return ", ".join(map(str, numbers[:3])) + (f" and {len(numbers) - 3:,} more" if len(numbers) > 3 else "")


def add_maps(every: list[Annotated], things: frozenset[str], notes: FindingCollector) -> tuple[int, int]:
    """Add the segments in the files to their images. Return how many pixels belong to none, and the number of all pixels."""
    usable = [one for one in every if not one.shot.bad]
    void = total = 0
    for one, found in zip(usable, read_maps([one.path for one in usable], parse_codes)):
        shot = one.shot
        if found is None:
            zipped = "" if one.path else f" (not found: {one.name}; if it is in an archive, unpack it)"
            notes.mark_invalid("segments-file", f"{shot.place}{zipped}", shot)
            continue
        size, runs = found
        if shot.size and all(shot.size) and size != tuple(round(v) for v in shot.size):
            wanted = " x ".join(f"{v:g}" for v in shot.size)
            notes.mark_invalid("segments-size", f"{shot.place}: {size[0]} x {size[1]}, the image {wanted}", shot)
            continue
        if unlisted := sorted(runs.keys() - one.classes.keys() - {0}):
            notes.add("segment-unlisted", f"{shot.place}: {list_numbers(unlisted)}")
        for number, area in one.areas.items():
            real = count_pixels(runs.get(number, []))
            if real and abs(real - area) > MAX_AREA_DIFFERENCE * max(real, area):
                notes.add("segment-area", f"{one.classes[number].place}: {area:g} annotated, {real:,} in the file")
        void += add_segments(shot, size, runs, one.classes, things, notes)
        total += size[0] * size[1]
    return void, total

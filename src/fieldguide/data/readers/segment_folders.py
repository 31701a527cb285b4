"""Reader for images with a 16-bit PNG of segments each: class x 1000 + number of the object, or the class alone for stuff and groups.

Layouts: folders images and segments (or instance_ids, panoptic) with files of the same names, optionally below train, val and test or
with these folders in both; and Cityscapes: leftImg8bit and gtFine with *_gtFine_instanceIds.png. Names of the classes are in
classes.txt, one per line from class 0, or in _classes.csv; those of Cityscapes are known.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FileEntry, Finding
from fieldguide.data.media.boxes import AnnotatedImage, FindingCollector, annotation_entry
from fieldguide.data.media.file_names import find_child, find_file, map_stems, normalize
from fieldguide.data.media.images import READABLE_SUFFIXES
from fieldguide.data.media.segments import SegmentClass, add_segments, build_segments, count_pixels, read_maps, wants_segments
from fieldguide.data.readers import masks
from fieldguide.data.source import Options, RawTable, folder_split, list_visible, relative_path

NAME = "segments"
UNDERSTANDS = (
    "images with panoptic segments: a folder images and a folder segments (or instance_ids, panoptic) with 16-bit PNGs of the same "
    "names, whose values are class x 1000 + number of the object, or the class alone for stuff; classes.txt names the classes; or "
    "leftImg8bit and gtFine of Cityscapes"
)
IMAGES = (*masks.IMAGES, "leftimg8bit")
FOLDERS = ("segments", "instance_ids", "instanceids", "panoptic", "panoptic_masks", "panoptic_labels", "gtfine", "gtcoarse")
ENDINGS = ("_gtfine_instanceids", "_gtcoarse_instanceids", "_instanceids", "_instance_ids", "_panoptic", "_segments")
SUFFIXES = (".png", ".tif", ".tiff")
FACTOR = 1000  # of the class in the number of an object
VOID_NUMBERS = {0, 255, 65535}  # of no class, unless they have a name
VOID_NAMES = ("void", "unlabeled", "unlabelled", "ignore", "ignored", "unknown", "none")
# Classes of Cityscapes that are evaluated (github.com/mcordts/cityscapesScripts, helpers/labels.py).
CITYSCAPES = {
    **dict(enumerate(("road", "sidewalk"), 7)),
    **dict(enumerate(("building", "wall", "fence"), 11)),
    17: "pole",
    **dict(
        enumerate(
            ("traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus"), 19
        )
    ),
    **dict(enumerate(("train", "motorcycle", "bicycle"), 31)),
}
Pair = tuple[Path, Path | None, str | None]  # file of segments, image, split


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path) or not source.is_dir() or not find_roots(source):
        return 0
    return 13 if wants_segments(options) else 12


def find_roots(source: Path) -> list[tuple[Path, Path, str | None]]:
    """Return the folder of images and that of segments in each part, and the split of the part."""
    inner = [(p, folder_split(p.name)) for p in list_visible(source)[0] if p.is_dir()]
    for places in ([(source, None)], [(p, split) for p, split in inner if split]):
        found = [(find_child(p, IMAGES), find_child(p, FOLDERS), split) for p, split in places]
        if usable := [(a, b, split) for a, b, split in found if a and b and list_files(b)]:
            return usable
    return []


def list_files(folder: Path) -> list[Path]:
    """Return the files of segments in a folder and below; of Cityscapes, only those of instance ids."""
    every = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    ended = [p for p in every if normalize(p.stem).endswith(ENDINGS)]
    return ended or ([] if normalize(folder.name).startswith("gt") else every)


def find_pairs(images: Path, segments: Path, split: str | None) -> list[Pair]:
    """Return the files of segments with their images, in the same folders below `images`."""
    found: list[Pair] = []
    stems: dict[Path, dict[str, Path]] = {}
    for file in list_files(segments):
        place = file.parent.relative_to(segments)
        if place not in stems:
            stems[place] = map_stems(images / place, READABLE_SUFFIXES) or map_stems(images, READABLE_SUFFIXES)
        stem = normalize(file.stem)
        stem = next((stem.removesuffix(e) for e in ENDINGS if stem.endswith(e)), stem)
        image = next((stems[place][n] for n in (stem, *(stem + e for e in masks.IMAGE_ENDINGS)) if n in stems[place]), None)
        own = split or (folder_split(place.parts[0]) if place.parts else None)
        found.append((file, image, own))
    return found


def parse_numbers(image: Any) -> np.ndarray | None:  # -> H W int32
    """Return the values of a gray image; None for another kind of image."""
    if image.mode not in ("I", "I;16", "I;16B", "I;16L", "I;16N", "L"):
        return None
    return np.asarray(image).astype(np.int32)


def find_class(number: int) -> int:
    """Return the class of a value."""
    return number // FACTOR if number >= FACTOR and number not in VOID_NUMBERS else number


def load(source: Path, options: Options) -> RawTable:
    """Read all parts. Raises DataError if the names of the classes are missing or given as colors."""
    roots = find_roots(source)
    pairs = [pair for root in roots for pair in find_pairs(*root)]
    files, shots, notes = list[FileEntry](), list[AnnotatedImage](), FindingCollector()
    names = read_names(source, roots, files)
    every = list[tuple[Path, AnnotatedImage]]()
    for file, image, split in pairs:
        shot = AnnotatedImage(image or file, relative_path(file, source), split)
        shots.append(shot)
        if image is None:
            notes.mark_invalid("no-picture", shot.place, shot)
        else:
            every.append((file, shot))
    maps = read_maps([file for file, _ in every], parse_numbers)
    seen = {number for found in maps if found for number in found[1]}
    counted = {find_class(number) for number in seen if number >= FACTOR}
    if names is None:
        names = {number: str(number) for number in sorted({find_class(n) for n in seen} - VOID_NUMBERS)}
    known = {number: name for number, name in names.items() if normalize(name) not in VOID_NAMES}
    things = frozenset(known[number] for number in counted if number in known)
    void, total, unnamed = 0, 0, Counter[int]()
    for (_, shot), found in zip(every, maps):
        if found is None:
            notes.mark_invalid("segments-file", shot.place, shot)
            continue
        size, runs = found
        classes = {}
        for number, own in runs.items():
            kind = find_class(number)
            if kind in known:
                crowd = number < FACTOR and known[kind] in things
                classes[number] = SegmentClass(known[kind], crowd, f"{shot.place}: {number}")
            elif kind not in names and kind not in VOID_NUMBERS:
                unnamed[kind] += count_pixels(own)
        shot.size = (float(size[0]), float(size[1]))
        void += add_segments(shot, size, runs, classes, things, notes)
        total += size[0] * size[1]
    listed = list(dict.fromkeys(known.values()))
    raw = build_segments(source, shots, files, notes, listed, [n for n in listed if n in things], void / max(total, 1))
    if unnamed:
        share = ", ".join(f"{number} ({100 * count / total:.1f} %)" for number, count in unnamed.most_common(5))
        what = f"{len(unnamed):,} classes have no name, so their pixels belong to no segment: {share}"
        raw.findings.append(Finding("unnamed-class", "note", what, (), len(unnamed)))
    return raw


def read_names(source: Path, roots: list[tuple[Path, Path, str | None]], files: list[FileEntry]) -> dict[int, str] | None:
    """Return class number -> name; None if there are none. Raises DataError for classes that are given as colors."""
    found = masks.read_class_names(source, roots)
    for name in (*masks.CLASS_LISTS, "_classes.csv"):
        if path := find_file(source, (name,)):
            files.append(annotation_entry(path, path.read_bytes(), source))
    if "colours" in found:
        raise DataError(
            f"{source}: the classes are given as colors, but values of segments are numbers. Name them in classes.txt."
        )
    if found:
        return dict(enumerate(found["classes"])) if "classes" in found else dict(found["values"])
    return dict(CITYSCAPES) if any(normalize(segments.name).startswith("gt") for _, segments, _ in roots) else None

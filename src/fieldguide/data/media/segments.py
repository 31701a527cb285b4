"""Panoptic segments: from a map with a number for each pixel to objects of the table of `fieldguide.data.media.boxes`.

The segments of an image do not overlap, and have the pixels that their numbers have in the map. Pixels of other numbers belong to no
segment. The table's column is `segments`, and its context has `things`: the classes of countable objects. The others are stuff, such as
sky, of which an image has at most one segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fieldguide.core.threads import map_threads
from fieldguide.data.dataset import FileEntry, Finding
from fieldguide.data.media import images
from fieldguide.data.media.boxes import AnnotatedImage, FindingCollector, build_raw, make_object
from fieldguide.data.source import Options, RawTable

SEGMENTS = "segments"  # name of the column


@dataclass(frozen=True)
class SegmentClass:
    """The class of a segment, whether it is a crowd: a group of things, and where it is annotated, for messages."""

    label: str
    crowd: bool
    place: str


def wants_segments(options: Options) -> bool:
    """Return whether the column of segments is requested, by the user, a task or a trained model."""
    return SEGMENTS in (options.target, *options.target_names, *options.names)


def find_runs(numbers: np.ndarray) -> dict[int, list[int]]:  # H W
    """Return, for each number in a map, alternating lengths of runs of other pixels and of its pixels, column by column."""
    flat = np.ascontiguousarray(numbers.T).ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.concatenate([starts[1:], [flat.size]])
    values = flat[starts]
    order = np.argsort(values, kind="stable")
    found = {}
    for part in np.split(order, np.flatnonzero(np.diff(values[order])) + 1):
        edges = np.stack([starts[part], ends[part]], 1).ravel()
        lengths = np.diff(edges, prepend=0).tolist()
        rest = flat.size - int(edges[-1])
        found[int(values[part[0]])] = [*lengths, rest] if rest else lengths
    return found


def read_numbers(path: Path, parse: Callable[[Any], np.ndarray | None]) -> np.ndarray | None:
    """Return the map of a file, by what `parse` returns for the opened image; None if it cannot be decoded."""
    try:
        with images.suppress_warnings(), images.open_image(path) as image:
            return parse(image) if image.width * image.height <= images.MAX_PIXELS else None
    except images.DECODE_ERRORS:
        return None


def read_maps(
    paths: Sequence[Path | None], parse: Callable[[Any], np.ndarray | None]
) -> list[tuple[tuple[int, int], dict[int, list[int]]] | None]:
    """Return the size (width, height) and the runs of the numbers of each map; None for a map that cannot be read."""

    def one(path: Path | None) -> tuple[tuple[int, int], dict[int, list[int]]] | None:
        numbers = read_numbers(path, parse) if path is not None else None
        return None if numbers is None else ((numbers.shape[1], numbers.shape[0]), find_runs(numbers))

    return map_threads(one, paths)


def parse_codes(image: Any) -> np.ndarray | None:  # -> H W int32
    """Return R + 256 G + 65536 B of a color image; None for another kind of image."""
    if image.mode not in ("RGB", "RGBA"):
        return None
    pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    codes: np.ndarray = pixels[..., 0] + (pixels[..., 1] << 8) + (pixels[..., 2] << 16)
    return codes


def count_pixels(runs: Sequence[int]) -> int:
    """Return the number of pixels inside of runs."""
    return sum(runs[1::2])


def add_segments(
    shot: AnnotatedImage,
    size: tuple[int, int],
    runs: Mapping[int, list[int]],
    classes: Mapping[int, SegmentClass],
    things: frozenset[str],
    notes: FindingCollector,
) -> int:
    """Add the segments of a map to an image, and return how many of its pixels belong to none.

    Several segments of a class of stuff become one.
    """
    joined: dict[tuple[str, bool], list[int]] = {}
    for number, one in classes.items():
        if number not in runs:
            notes.add("segment-without-pixels", one.place)
            continue
        key = (one.label, one.crowd)
        if one.label not in things and key in joined:
            notes.add("stuff-parts", f"{one.place}: {one.label}")
            joined[key].append(number)
        elif one.label not in things:
            joined[key] = [number]
    parts = {numbers[0]: numbers for numbers in joined.values()}
    for number, one in classes.items():
        if number not in runs or (one.label not in things and number not in parts):
            continue
        own = merge_runs([runs[n] for n in parts.get(number, [number])], size)
        shot.boxes.append(make_object(one.label, *bound_runs(own, size[1]), runs=own, crowd=one.crowd))
        shot.places.append(one.place)
    return sum(count_pixels(own) for number, own in runs.items() if number not in classes)


def merge_runs(parts: Sequence[list[int]], size: tuple[int, int]) -> list[int]:
    """Return the runs of all pixels of several segments."""
    if len(parts) == 1:
        return parts[0]
    inside = np.zeros(size[0] * size[1], dtype=np.int32)
    for runs in parts:
        edges = np.cumsum(runs)
        np.add.at(inside, edges[:-1:2], 1)
        ends = edges[1::2]
        np.add.at(inside, ends[ends < len(inside)], -1)
    return find_runs((inside.cumsum().reshape(size).T > 0).astype(np.int32))[1]


def bound_runs(runs: Sequence[int], height: int) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the pixels inside of runs."""
    edges = np.cumsum(runs)
    first, last = edges[:-1:2], edges[1::2] - 1
    several = first // height != last // height  # runs that reach into the next column
    top, bottom = (0, height - 1) if several.any() else (int((first % height).min()), int((last % height).max()))
    return float(first[0] // height), float(top), float(last[-1] // height + 1), float(bottom + 1)


def build_segments(
    root: Path,
    shots: list[AnnotatedImage],
    files: list[FileEntry],
    notes: FindingCollector,
    classes: Sequence[str],
    things: Sequence[str],
    void: float,
) -> RawTable:
    """Return the table of images with segments; `void` is the fraction of pixels that belong to none."""
    raw = build_raw(root, shots, files, notes, classes)
    raw.rows = raw.rows.rename({raw.target or "": SEGMENTS})
    raw.kinds, raw.target = {"image": "image", SEGMENTS: "boxes"}, SEGMENTS
    raw.context = {**raw.context, "things": list(things)}
    if void > 0:
        what = f"{100 * void:.1f} % of the pixels belong to no segment; they are neither trained on nor scored"
        raw.findings.append(Finding("void-pixels", "note", what))
    return raw

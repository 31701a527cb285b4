"""Reader for images in two domains: pairs of an input and a target, or two domains without pairs.

Layouts: two folders with files of the same names, such as A and B or input and target, each optionally below or above train, val
and test; trainA, trainB, testA, testB as of CycleGAN. If no names match, the images are rows of two domains.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import Finding
from fieldguide.data.media.file_names import map_stems, normalize
from fieldguide.data.media.images import READABLE_SUFFIXES
from fieldguide.data.source import Options, RawTable, folder_split, list_visible, relative_path

NAME = "image-pairs"
UNDERSTANDS = (
    "images in two domains: folders A and B, or input and target, with files of the same names, optionally with train, val and "
    "test above or below them; or trainA, trainB, testA, testB, with or without pairs"
)
DOMAINS = (  # of folder names: the inputs and the targets
    ("a", "b"),
    ("input", "target"),
    ("input", "output"),
    ("inputs", "outputs"),
    ("source", "target"),
    ("before", "after"),
    ("lr", "hr"),
    ("low", "high"),
    ("noisy", "clean"),
    ("blur", "sharp"),
)
TARGET, DOMAIN = "target_image", "domain"  # columns of pairs and of unpaired images
MIN_PAIRED_FRACTION = 0.5  # of the images of the smaller folder that have a partner: fewer are not meant as pairs


@dataclass(frozen=True)
class Part:
    """Two folders, one of each domain, and their split."""

    first: Path
    second: Path
    split: str | None
    names: tuple[str, str]


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path) or not source.is_dir() or options.target_kind == "mask":
        return 0
    is_known = not options.names or bool({TARGET, DOMAIN} & set(options.names))  # by a trained model
    return 9 if is_known and find_parts(source) else 0


def list_folders(folder: Path) -> dict[str, Path]:
    """Return the folders in a folder by their normalized names."""
    return {normalize(p.name): p for p in list_visible(folder)[0] if p.is_dir()}


def has_images(folder: Path) -> bool:
    """Return whether a folder itself holds images."""
    return any(p.suffix.lower() in READABLE_SUFFIXES for p in folder.iterdir())


def find_parts(source: Path) -> list[Part]:
    """Return the two folders of every split, or an empty list if the layout does not match."""
    folders = list_folders(source)
    for names in DOMAINS:
        first, second = (folders.get(name) for name in names)
        is_short = len(names[0]) == 1  # lower-case letters are more often classes than domains
        if first and second and len(folders) == 2 and (first.name.isupper() or not is_short):
            if has_images(first) and has_images(second):
                return [Part(first, second, None, (first.name, second.name))]
            inner = list_folders(second)
            pairs = [(p, inner.get(normalize(p.name))) for p in list_folders(first).values()]
            return [
                Part(p, q, folder_split(p.name), (first.name, second.name))
                for p, q in pairs
                if q and folder_split(p.name) and has_images(p) and has_images(q)
            ]
        joined = [  # trainA and trainB
            Part(folders[name], folders[name[: -len(names[0])] + names[1]], split, names)
            for name in folders
            if name.endswith(names[0])
            and (split := folder_split(name[: -len(names[0])].rstrip("_-")))
            and name[: -len(names[0])] + names[1] in folders
        ]
        if joined and all(has_images(p.first) and has_images(p.second) for p in joined):
            upper = names if len(names[0]) > 1 else (names[0].upper(), names[1].upper())
            return [Part(p.first, p.second, p.split, upper) for p in joined]
    below = [(p, split) for name, p in folders.items() if (split := folder_split(name))]
    found = [(part, split) for p, split in below for part in find_parts(p) if part.split is None]
    return [Part(part.first, part.second, split, part.names) for part, split in found]


def load(source: Path, options: Options) -> RawTable:
    """Pair images by name; if few names match, return the images of both domains as rows."""
    parts = find_parts(source)
    stems = [(map_stems(part.first, READABLE_SUFFIXES), map_stems(part.second, READABLE_SUFFIXES)) for part in parts]
    shared = sum(len(first.keys() & second.keys()) for first, second in stems)
    smaller = sum(min(len(first), len(second)) for first, second in stems)
    if not smaller:
        raise DataError(f"{source}: one of the two domains holds no images.")
    build = build_pairs if shared >= MIN_PAIRED_FRACTION * smaller else build_domains
    return build(source, parts, stems)


def build_pairs(source: Path, parts: list[Part], stems: list[tuple[dict[str, Path], dict[str, Path]]]) -> RawTable:
    """Return one row per pair. Images without a partner are reported."""
    rows: list[tuple[str, str]] = []
    splits: list[str | None] = []
    lone: list[Path] = []
    for part, (first, second) in zip(parts, stems):
        for stem in sorted(first.keys() | second.keys()):
            if stem in first and stem in second:
                rows.append((str(first[stem].absolute()), str(second[stem].absolute())))
                splits.append(part.split)
            else:
                lone.append(first[stem] if stem in first else second[stem])
    findings = []
    if lone:
        places = tuple(relative_path(p, source) for p in lone[:5])
        remedy = "Add the other image under the same name, or remove them."
        findings.append(
            Finding("no-partner", "warning", "images without a partner of the same name", places, len(lone), remedy, len(lone))
        )
    table = pl.DataFrame(rows, schema={"image": pl.String, TARGET: pl.String}, orient="row")
    kinds: dict[str, Any] = {"image": "image", TARGET: "image"}
    return RawTable(table, [], source, findings, to_splits(splits), kinds, TARGET, unusable=len(lone))


def build_domains(source: Path, parts: list[Part], stems: list[tuple[dict[str, Path], dict[str, Path]]]) -> RawTable:
    """Return one row per image, with its domain."""
    rows: list[tuple[str, str]] = []
    splits: list[str | None] = []
    for part, both in zip(parts, stems):
        for name, images in zip(part.names, both):
            rows += [(str(images[stem].absolute()), name) for stem in sorted(images)]
            splits += [part.split] * len(images)
    table = pl.DataFrame(rows, schema={"image": pl.String, DOMAIN: pl.String}, orient="row")
    return RawTable(table, [], source, [], to_splits(splits), {"image": "image", DOMAIN: "category"}, DOMAIN)


def to_splits(splits: list[str | None]) -> np.ndarray | None:
    """Return the splits as an array; None if there is only one."""
    return np.array(splits, dtype=object) if all(splits) and len(set(splits)) > 1 else None

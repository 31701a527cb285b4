"""Reader for images with segmentation masks: folders `images` and `masks` with matching file names."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import Finding
from fieldguide.data.media.images import SUPPORTED_SUFFIXES
from fieldguide.data.source import SPLIT_NAMES, Options, RawTable, list_visible, relative_path

NAME = "masks"
UNDERSTANDS = (
    "images with masks: a folder images and a folder masks (or labels, annotations) with files of the same names, "
    "optionally below train, val and test; classes.txt or class_dict.csv may name the classes"
)
IMAGES = ("images", "imgs", "image", "img", "jpegimages", "inputs", "photos")
MASKS = ("masks", "mask", "labels", "annotations", "segmentationclass", "gt", "groundtruth", "targets", "labelimages")
ENDINGS = ("", "_mask", "-mask", "_l", "_label", "_labels", "_gt", "_seg", "_labelids", "_gtfine_labelids")


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    return 9 if isinstance(source, Path) and source.is_dir() and find_layout(source) else 0


def find_layout(source: Path) -> list[tuple[Path, Path, str | None]]:
    """Return (images, masks, split) of every part, or an empty list if the layout does not match."""
    if own := find_folders(source):
        return [(*own, None)]
    parts = [(p, SPLIT_NAMES[p.name.lower()]) for p in list_visible(source)[0] if p.is_dir() and p.name.lower() in SPLIT_NAMES]
    return [(*found, split) for p, split in parts if (found := find_folders(p))]


def find_folders(folder: Path) -> tuple[Path, Path] | None:
    """Return the folders of images and masks, or None."""
    named = {p.name.lower(): p for p in list_visible(folder)[0] if p.is_dir()}
    first, second = (next((named[n] for n in names if n in named), None) for names in (IMAGES, MASKS))
    if first is None or second is None or not any(p.suffix.lower() in SUPPORTED_SUFFIXES for p in second.iterdir()):
        return None
    return first, second


def load(source: Path, options: Options) -> RawTable:
    """Pair images with masks by name. Raises DataError if there are no pairs."""
    rows, splits, findings = [], [], []
    lone_images: list[Path] = []
    lone_masks: list[Path] = []
    for image_folder, masks, split in find_layout(source):
        files = [p for p in list_visible(image_folder)[0] if p.is_file() and p.suffix.lower() in SUPPORTED_SUFFIXES]
        partners = {p.stem.lower(): p for p in list_visible(masks)[0] if p.is_file() and p.suffix.lower() in SUPPORTED_SUFFIXES}
        used = set()
        for path in files:
            stem = next((path.stem.lower() + e for e in ENDINGS if path.stem.lower() + e in partners), None)
            if stem is None:
                lone_images.append(path)
                continue
            used.add(stem)
            rows.append((str(path.absolute()), str(partners[stem].absolute())))
            splits.append(split)
        lone_masks += [p for s, p in partners.items() if s not in used]
    for lone, check, what, remedy in (
        (lone_images, "no-mask", "images without a mask", "Add the mask or remove the image."),
        (lone_masks, "no-picture", "masks without an image", "Add the image or remove the mask."),
    ):
        if lone:
            findings.append(
                Finding(check, "warning", what, tuple(relative_path(p, source) for p in lone[:5]), len(lone), remedy, len(lone))
            )
    if not rows:
        raise DataError(f"{source}: no image has a mask with its name." + "".join(f"\n  - {f}" for f in findings))
    table = pl.DataFrame(rows, schema={"image": pl.String, "mask": pl.String}, orient="row")
    named = np.array(splits, dtype=object) if all(splits) and len(set(splits)) > 1 else None
    return RawTable(
        table,
        [],
        source,
        findings,
        named,
        {"image": "image", "mask": "mask"},
        "mask",
        unusable=len(lone_images) + len(lone_masks),
        context=read_class_names(source),
    )


def read_class_names(source: Path) -> dict[str, Any]:
    """Return {"classes": names} from classes.txt, {"colours": {(r, g, b): name}} from class_dict.csv, or {}."""
    for name in ("classes.txt", "labels.txt", "codes.txt"):
        if (file := source / name).is_file():
            return {"classes": [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]}
    if (file := source / "class_dict.csv").is_file():
        with file.open(newline="", encoding="utf-8") as opened:
            rows = list(csv.DictReader(opened))
        try:
            return {"colours": {tuple(int(row[c]) for c in "rgb"): row["name"] for row in rows}}
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{file}: requires the columns name, r, g, b with integers from 0 to 255.") from None
    return {}

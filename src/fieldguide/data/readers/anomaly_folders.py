"""Reader for images of one product in the layout of MVTec AD: train/good, test/good, test/<defect>, ground_truth/<defect>.

Masks have the name of their image, with or without the ending _mask. Sets without masks have no folder ground_truth and are read as
images in folders of classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import Finding
from fieldguide.data.media.file_names import find_child, map_stems
from fieldguide.data.media.images import READABLE_SUFFIXES
from fieldguide.data.source import Options, RawTable, list_folders, relative_path

NAME = "anomaly folders"
UNDERSTANDS = (
    "images of a product with masks of its defects, as MVTec AD: train/good, test/good, test/<defect> and ground_truth/<defect>"
)
MASKS = ("ground_truth", "ground-truth", "groundtruth", "masks")
ENDINGS = ("_mask", "")
SPLITS = {"train": "train", "validation": "val", "test": "test"}  # name of a folder -> split


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path) or not source.is_dir():
        return 0
    folders = {p.name.lower() for p in source.iterdir() if p.is_dir()}
    return 11 if {"train", "test"} <= folders and find_child(source, MASKS) else 0


def load(source: Path, options: Options) -> RawTable:
    """Read all images with the folder they are in as label. Raises `DataError` if there are none."""
    truth = find_child(source, MASKS)
    rows: list[tuple[str, str, str | None]] = []
    splits: list[str] = []
    used: set[Path] = set()
    lacking: list[Path] = []
    masks = {p.name: map_stems(p, READABLE_SUFFIXES) for p in list_folders(truth)} if truth else {}
    for name, split in SPLITS.items():
        part = find_child(source, (name,))
        for folder in list_folders(part) if part else ():
            partners = masks.get(folder.name, {})
            for stem, path in sorted(map_stems(folder, READABLE_SUFFIXES).items()):
                mask = next((partners[stem + end] for end in ENDINGS if stem + end in partners), None)
                if mask is not None:
                    used.add(mask)
                elif partners:
                    lacking.append(path)
                rows.append((str(path.absolute()), folder.name, str(mask.absolute()) if mask else None))
                splits.append(split)
    if not rows:
        raise DataError(f"{source}: no images found in folders below train and test.")
    lone = [path for partners in masks.values() for path in partners.values() if path not in used]
    findings = []
    for check, what, files in (
        ("no-mask", "images of a defect without a mask; their pixels are not scored", lacking),
        ("no-picture", "masks without an image; they are ignored", lone),
    ):
        if files:
            places = tuple(relative_path(p, source) for p in files[:5])
            remedy = "A mask has the name of its image, with or without the ending _mask."
            findings.append(Finding(check, "warning", what, places, len(files), remedy))
    table = pl.DataFrame(rows, schema={"image": pl.String, "label": pl.String, "mask": pl.String}, orient="row")
    raw = RawTable(table, [], source, findings, np.array(splits, dtype=object), {"image": "image"}, "label")
    raw.roles["mask"] = "ignored"
    raw.kinds["mask"] = "text"
    return raw

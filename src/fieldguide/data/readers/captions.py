"""Reader for images with captions: each image has a .txt file of the same name, optionally below train, val and test."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FileEntry, Finding
from fieldguide.data.media.images import SUPPORTED_SUFFIXES
from fieldguide.data.readers import delimited
from fieldguide.data.readers.image_folder import relative_paths
from fieldguide.data.source import SPLIT_NAMES, Options, RawTable, list_visible, relative_path, sha256

NAME = "captions"
UNDERSTANDS = "images with captions: a folder with a .txt of the same name for each image, optionally below train, val and test"
MIN_CAPTION_FRACTION = 0.5  # minimum fraction of images with a text; some texts may be missing
MAX_INSPECTED_TEXTS = 20  # texts that are inspected to decide whether a folder holds captions
NUMBERS = re.compile(r"[\d\s.,eE+-]*")


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    return 7 if isinstance(source, Path) and source.is_dir() and find_layout(source) else 0


def find_layout(source: Path) -> list[tuple[list[Path], dict[str, Path], str | None]]:
    """Return (images, texts by stem, split) of every part, or an empty list if the layout does not match."""
    if own := find_part(source):
        return [(*own, None)]
    return [
        (*found, SPLIT_NAMES[p.name.lower()])
        for p in list_visible(source)[0]
        if p.is_dir() and p.name.lower() in SPLIT_NAMES and (found := find_part(p))
    ]


def find_part(folder: Path) -> tuple[list[Path], dict[str, Path]] | None:
    """Return the images and the texts by stem of one folder, or None if it does not hold captions."""
    files = [p for p in list_visible(folder)[0] if p.is_file()]
    pictures = [p for p in files if p.suffix.lower() in SUPPORTED_SUFFIXES]
    stems = {p.stem for p in pictures}
    texts = {p.stem: p for p in files if p.suffix.lower() == ".txt"}
    both = [path for stem, path in texts.items() if stem in stems]
    if not pictures or len(both) < MIN_CAPTION_FRACTION * len(pictures):
        return None
    # Files with only numbers are bounding boxes written by annotation tools.
    if all(NUMBERS.fullmatch(path.read_text(encoding="utf-8", errors="replace")) for path in both[:MAX_INSPECTED_TEXTS]):
        return None
    return pictures, texts


def load(source: Path, options: Options) -> RawTable:
    """Pair images with captions by file name."""
    rows: list[tuple[str, str | None]] = []
    splits: list[str | None] = []
    files: list[FileEntry] = []
    findings: list[Finding] = []
    bare: list[Path] = []
    lone: list[Path] = []
    unreadable: list[str] = []
    odd: list[str] = []
    for pictures, texts, split in find_layout(source):
        used = set()
        for path in pictures:
            text = None
            if path.stem in texts:
                used.add(path.stem)
                file = texts[path.stem]
                name, content = relative_path(file, source), file.read_bytes()
                files.append(FileEntry(name, len(content), sha256(content), rows=0))
                try:
                    decoded, more = delimited.decode(content, name) if content else (b"", [])
                    text = " ".join(decoded.decode().split()) or None
                    odd += [place for one in more for place in one.places]
                except DataError as error:
                    unreadable.append(str(error))
            elif not options.labels_optional:
                bare.append(path)
                continue
            rows.append((str(path.absolute()), text))
            splits.append(split)
        lone += [p for stem, p in texts.items() if stem not in used]
    if bare:
        findings.append(
            Finding(
                "no-caption",
                "warning",
                "images without a caption file",
                relative_paths(bare, source),
                len(bare),
                "Add the caption or remove the image.",
                len(bare),
            )
        )
    if lone:
        findings.append(
            Finding(
                "no-picture",
                "warning",
                "caption files without an image",
                relative_paths(lone, source),
                len(lone),
                "Add the image or remove the caption.",
                len(lone),
            )
        )
    if unreadable:  # not counted as unusable here: their rows are dropped later for the missing caption
        findings.append(
            Finding(
                "unreadable-file",
                "warning",
                "captions that cannot be read",
                tuple(unreadable[:5]),
                len(unreadable),
                "Save them as UTF-8.",
            )
        )
    if odd:
        findings.append(
            Finding(
                "encoding",
                "warning",
                "captions that are not UTF-8: read as Windows-1252 or Latin-1",
                tuple(odd[:5]),
                len(odd),
                "Check the accented letters, or save the files as UTF-8.",
            )
        )
    table = pl.DataFrame(rows, schema={"image": pl.String, "caption": pl.String}, orient="row")
    named = np.array(splits, dtype=object) if all(splits) and len(set(splits)) > 1 else None
    return RawTable(
        table, files, source, findings, named, {"image": "image", "caption": "text"}, "caption", unusable=len(bare) + len(lone)
    )

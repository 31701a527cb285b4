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
from fieldguide.data.source import Options, RawTable, folder_split, list_visible, relative_path, sha256

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
        (*found, folder_split(p.name))
        for p in list_visible(source)[0]
        if p.is_dir() and folder_split(p.name) and (found := find_part(p))
    ]


def find_part(folder: Path) -> tuple[list[Path], dict[str, Path]] | None:
    """Return the images and the texts by stem of one folder, or None if it does not hold captions."""
    files = [p for p in list_visible(folder)[0] if p.is_file()]
    images = [p for p in files if p.suffix.lower() in SUPPORTED_SUFFIXES]
    stems = {p.stem for p in images}
    texts = {p.stem: p for p in files if p.suffix.lower() == ".txt"}
    both = [path for stem, path in texts.items() if stem in stems]
    if not images or len(both) < MIN_CAPTION_FRACTION * len(images):
        return None
    # Files with only numbers are bounding boxes written by annotation tools.
    if all(NUMBERS.fullmatch(path.read_text(encoding="utf-8", errors="replace")) for path in both[:MAX_INSPECTED_TEXTS]):
        return None
    return images, texts


def load(source: Path, options: Options) -> RawTable:
    """Pair images with captions by file name."""
    rows: list[tuple[str, str | None]] = []
    splits: list[str | None] = []
    files: list[FileEntry] = []
    findings: list[Finding] = []
    without_text: list[Path] = []
    without_image: list[Path] = []
    unreadable: list[str] = []
    recoded: list[str] = []
    for images, texts, split in find_layout(source):
        used = set()
        for path in images:
            text = None
            if path.stem in texts:
                used.add(path.stem)
                file = texts[path.stem]
                name, content = relative_path(file, source), file.read_bytes()
                files.append(FileEntry(name, len(content), sha256(content), rows=0))
                try:
                    decoded, more = delimited.decode(content, name) if content else (b"", [])
                    text = " ".join(decoded.decode().split()) or None
                    recoded += [place for one in more for place in one.places]
                except DataError as error:
                    unreadable.append(str(error))
            elif not options.labels_optional:
                without_text.append(path)
                continue
            rows.append((str(path.absolute()), text))
            splits.append(split)
        without_image += [p for stem, p in texts.items() if stem not in used]
    if without_text:
        findings.append(
            Finding(
                "no-caption",
                "warning",
                "images without a caption file",
                relative_paths(without_text, source),
                len(without_text),
                "Add the caption or remove the image.",
                len(without_text),
            )
        )
    if without_image:
        findings.append(
            Finding(
                "no-picture",
                "warning",
                "caption files without an image",
                relative_paths(without_image, source),
                len(without_image),
                "Add the image or remove the caption.",
                len(without_image),
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
    if recoded:
        findings.append(
            Finding(
                "encoding",
                "warning",
                "captions that are not UTF-8: read as Windows-1252 or Latin-1",
                tuple(recoded[:5]),
                len(recoded),
                "Check the accented letters, or save the files as UTF-8.",
            )
        )
    table = pl.DataFrame(rows, schema={"image": pl.String, "caption": pl.String}, orient="row")
    named = np.array(splits, dtype=object) if all(splits) and len(set(splits)) > 1 else None
    return RawTable(
        table,
        files,
        source,
        findings,
        named,
        {"image": "image", "caption": "text"},
        "caption",
        unusable=len(without_text) + len(without_image),
    )

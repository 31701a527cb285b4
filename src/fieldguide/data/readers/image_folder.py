"""Reader for images: a folder per class, optionally below train, val and test; or no classes; or a single image."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import Finding, Kind
from fieldguide.data.media.images import SUPPORTED_SUFFIXES
from fieldguide.data.source import IGNORED_NAMES, SPLIT_NAMES, Options, RawTable, list_visible, relative_path

NAME = "images"
UNDERSTANDS = (
    "images: a folder with a folder of images for each class, optionally below train, val and "
    "test; for prediction, also a folder of images or one image"
)

MEDIA_NOUNS = {"image": "images", "text": "texts", "video": "videos"}


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path):
        return 0
    if source.is_file():
        return 10 if source.suffix.lower() in SUPPORTED_SUFFIXES else 0
    return 6 if has_images(source) else 0


def has_images(folder: Path) -> bool:
    """Return whether there is an image anywhere below a folder."""
    for _, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not is_hidden(f)]
        if any(os.path.splitext(f)[1].lower() in SUPPORTED_SUFFIXES and not is_hidden(f) for f in files):
            return True
    return False


def is_hidden(name: str) -> bool:
    """Return whether a file or folder name is hidden or created by an operating system."""
    return name.startswith(".") or name.lower() in IGNORED_NAMES


def load(source: Path, options: Options) -> RawTable:
    """Read one image or a folder of them."""
    if source.is_file():
        return build_table([(source, None, None)], source.parent, [], options)
    return load_classes(source, options, SUPPORTED_SUFFIXES)


def load_classes(source: Path, options: Options, suffixes: frozenset[str], media: Kind = "image") -> RawTable:
    """Read files below class folders as rows of (file, label). Shared by the readers of images, videos and texts."""
    walk = FolderWalk(source)
    tops, _ = list_visible(source)
    folders = [p for p in tops if p.is_dir() and not p.is_symlink()]
    splits = {p: SPLIT_NAMES[p.name.lower()] for p in folders if p.name.lower() in SPLIT_NAMES}
    if folders and len(splits) == len(folders):
        if len(set(splits.values())) < len(splits):
            raise DataError(f"{source}: several folders for one split: {', '.join(p.name for p in splits)}.")
        layout: list[tuple[Path, str | None]] = list(splits.items())
    else:
        layout = [(source, None)]
    found: list[tuple[Path, str | None, str | None]] = []
    stray: list[Path] = []
    empty: dict[str, list[str]] = {}
    for base, split in layout:
        for entry in walk.entries(base):
            if entry.is_dir():
                files = walk.files(entry)
                found += [(f, entry.name, split) for f in files]
                if not any(f.suffix.lower() in suffixes for f in files):
                    empty.setdefault(entry.name, []).append(relative_path(entry, source))
            elif entry.suffix.lower() in suffixes:
                found.append((entry, None, split))
            else:
                stray.append(entry)
    if layout[0][0] != source:
        stray += [p for p in walk.entries(source) if p.is_file()]
    return build_table(found, source, folder_findings(walk, source, found, stray, empty, media), options, media)


class FolderWalk:
    """Walks a folder without following links out of it, and counts skipped entries."""

    def __init__(self, root: Path) -> None:
        self.root, self.hidden, self.links = root.resolve(), 0, list[Path]()
        self.seen: set[Path] = set()

    def entries(self, folder: Path) -> list[Path]:
        """Return the entries of a folder, without hidden ones and links out of the root."""
        kept, left = list_visible(folder)
        if folder not in self.seen:
            self.hidden += left
        inside = []
        for p in kept:
            if p.is_symlink() and not (p.exists() and p.resolve().is_relative_to(self.root)):
                if folder not in self.seen:
                    self.links.append(p)
            else:
                inside.append(p)
        self.seen.add(folder)
        return inside

    def files(self, folder: Path) -> list[Path]:
        """Return all files below a folder."""
        out = []
        for p in self.entries(folder):
            out += self.files(p) if p.is_dir() and not p.is_symlink() else [p] if p.is_file() else []
        return out


def folder_findings(
    walk: FolderWalk,
    root: Path,
    found: list[tuple[Path, str | None, str | None]],
    stray: list[Path],
    empty: dict[str, list[str]],
    media: Kind,
) -> list[Finding]:
    """Return the findings about empty class folders, links, and ignored files."""
    findings = []
    thing = MEDIA_NOUNS[media]
    filled = Counter(label for _, label, _ in found)
    for name, places in empty.items():
        elsewhere = filled[name] > 0
        findings.append(
            Finding(
                "empty-class",
                "warning" if elsewhere else "error",
                f"class folder {name!r} contains no {thing}",
                tuple(places),
                1,
                "Add files (an interrupted copy?) or remove the folder.",
            )
        )
    if walk.links:
        findings.append(
            Finding(
                "link-outside",
                "warning",
                "links that are broken or lead out of the folder; they are not followed",
                relative_paths(walk.links, root),
                len(walk.links),
                "Copy the files into the folder.",
                len(walk.links),
            )
        )
    if stray:
        findings.append(
            Finding(
                "other-files",
                "note",
                f"files ignored: not {thing} and not in a class folder",
                relative_paths(stray, root),
                len(stray),
            )
        )
    if walk.hidden:
        findings.append(
            Finding("hidden-files", "note", "hidden files and folders ignored (.*, __MACOSX, Thumbs.db)", (), walk.hidden)
        )
    return findings


def relative_paths(paths: list[Path], root: Path) -> tuple[str, ...]:
    """Return the first five paths relative to the root, for messages."""
    return tuple(relative_path(p, root) for p in paths[:5])


def build_table(
    found: list[tuple[Path, str | None, str | None]],
    root: Path,
    findings: list[Finding],
    options: Options,
    media: Kind = "image",
) -> RawTable:
    """Build the raw table of files with their labels and splits. Raises DataError if there are no files."""
    labels = [label for _, label, _ in found]
    thing = MEDIA_NOUNS[media]
    if not found:
        raise DataError(f"{root}: no {thing} found." + "".join(f"\n  - {f}" for f in findings))
    orphans = [p for p, label, _ in found if label is None]
    if any(labels) and orphans and not options.labels_optional:
        findings = [
            *findings,
            Finding(
                "no-class",
                "warning",
                f"{thing} outside of class folders",
                relative_paths(orphans, root),
                len(orphans),
                "Move them into a class folder.",
                len(orphans),
            ),
        ]
        found = [f for f in found if f[1] is not None]
    rows = pl.DataFrame(
        {media: [str(p.absolute()) for p, _, _ in found], "label": [c for _, c, _ in found]},
        schema={media: pl.String, "label": pl.String},
    )
    if not any(labels) and not options.labels_optional and not options.names:
        rows = rows.drop("label")
    splits = np.array([s for _, _, s in found], dtype=object) if any(s for _, _, s in found) else None
    return RawTable(rows, [], root, findings, splits, {media: media}, "label", unusable=sum(f.unusable for f in findings))

"""Reader for images: a folder per class, optionally below train, val and test; or no classes; or a single image.

Folders whose names contain a split word (`training_set`, `seg_test`, `01_train`) are splits, never classes. Wrapping folders
(`data/train/...`, `seg_train/seg_train/...`) are skipped, and `cats/train`, `cats/test` are splits of the class `cats`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import Finding, Kind
from fieldguide.data.media.images import IMAGE_LIKE_SUFFIXES, find_suffix
from fieldguide.data.source import IGNORED_NAMES, Options, RawTable, folder_split, list_visible, relative_path

NAME = "images"
UNDERSTANDS = (
    "images: a folder with a folder of images for each class, optionally below train, val and "
    "test; for prediction, also a folder of images or one image"
)

MEDIA_NOUNS = {"image": "images", "text": "texts", "video": "videos", "audio": "recordings"}
CONTAINER_NAMES = {
    *("images", "image", "imgs", "img", "jpegimages", "pictures", "photos", "data", "videos", "texts"),
    *("audio", "recordings", "sounds", "wav", "wavs", "clips"),
}
OTHER_SUFFIXES = frozenset(  # of lists, descriptions, licenses and programs that lie among images, recordings and videos
    ".txt .md .rst .csv .tsv .json .jsonl .xml .yaml .yml .toml .ini .cfg .log .html .htm .pdf .doc .docx .py .ipynb .sh .db".split()
)
PREDICT_WORDS = re.compile(r"(?i)(^|[^a-z])(pred|predict|predictions?|unlabell?ed|submission)([^a-z]|$)")
MAX_LISTED_FOLDERS = 5  # folders named in a message


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path):
        return 0
    if source.is_file():
        return 10 if find_suffix(source) in IMAGE_LIKE_SUFFIXES else 0
    return 6 if has_images(source) else 0


def has_images(folder: Path) -> bool:
    """Return whether there is an image, or a file of an image format that is not read, anywhere below a folder."""
    for _, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not is_hidden(f)]
        if any(find_suffix(f) in IMAGE_LIKE_SUFFIXES and not is_hidden(f) for f in files):
            return True
    return False


def is_hidden(name: str) -> bool:
    """Return whether a file or folder name is hidden or created by an operating system."""
    return name.startswith(".") or name.lower() in IGNORED_NAMES


def load(source: Path, options: Options) -> RawTable:
    """Read one image or a folder of them."""
    if source.is_file():
        return build_table([(source, None, None)], source.parent, [], options)
    return load_classes(source, options, IMAGE_LIKE_SUFFIXES)


@dataclass
class Layout:
    """The splits and classes in a folder tree: folders whose sub-folders are classes, or one class folder each."""

    parts: list[tuple[Path, str | None, str | None]]  # folder; split; class of all its files, None if sub-folders are classes
    skipped: list[Path] = field(default_factory=list)  # folders and files that are no examples
    findings: list[Finding] = field(default_factory=list)


def load_classes(source: Path, options: Options, suffixes: Collection[str], media: Kind = "image") -> RawTable:
    """Read files below class folders as rows of (file, label). Shared by the readers of images, videos and texts."""
    walk = FolderWalk(source, suffixes, () if media == "text" else OTHER_SUFFIXES)
    layout = find_layout(source, walk, options, media)
    found: list[tuple[Path, str | None, str | None]] = []
    stray: list[Path] = list(layout.skipped)
    empty: dict[str, list[str]] = {}
    for base, split, label in layout.parts:
        if label is not None:
            files = walk.files(base)
            found += [(f, label, split) for f in files if not walk.is_other(f)]
            stray += filter(walk.is_other, files)
            continue
        for entry in walk.entries(base):
            if entry.is_dir():
                files = walk.files(entry)
                found += [(f, entry.name, split) for f in files if not walk.is_other(f)]
                stray += filter(walk.is_other, files)
                if not any(walk.is_media(f) for f in files):
                    empty.setdefault(entry.name, []).append(relative_path(entry, source))
            elif walk.is_media(entry):
                found.append((entry, None, split))
            else:
                stray.append(entry)
    if layout.parts[0][0] != source:
        stray += [p for p in walk.entries(source) if p.is_file()]
    if not options.labels_optional:
        check_nested_splits(source, walk, layout)
    findings = layout.findings + folder_findings(walk, source, found, stray, empty, media)
    return build_table(found, source, findings, options, media)


def find_layout(source: Path, walk: FolderWalk, options: Options, media: Kind) -> Layout:
    """Find splits and classes in a folder tree. Raises DataError if a name could be a split or a class."""
    base = source
    while (inner := walk.wrapped(base)) and not folder_split(inner.name):
        base = inner
    whole = Layout([(base, None, None)])
    folders = [p for p in walk.folders(base) if walk.has_media(p)]
    splits = {p: split for p in folders if (split := folder_split(p.name))}
    plain = [p for p in folders if p not in splits]
    if not splits:
        return (None if options.labels_optional else find_layout_of_classes(source, base, plain, walk, media)) or whole
    predicted = [p for p in plain if PREDICT_WORDS.search(p.name) and not walk.class_folders(p)]
    plain = [p for p in plain if p not in predicted]
    repeated = len(set(splits.values())) < len(splits)
    direct = [p for p in walk.entries(base) if p.is_file() and walk.is_media(p)]
    if options.labels_optional and (plain or direct or repeated):
        return whole
    if plain:
        raise DataError(describe_mixture(source, list(splits), plain, media))
    if repeated:
        several = Counter(splits.values()).most_common(1)[0][0]
        names = ", ".join(p.name for p in splits if splits[p] == several)
        raise DataError(
            f"{source}: several folders for one split: {names} (all {several}). Move their class folders into one folder named "
            f"{several}. If the rest of their names are classes, make them folders: {several}/CLASS/..."
        )
    parts = {walk.innermost(p): split for p, split in splits.items()}
    labelled = [p for p in parts if walk.class_folders(p)]
    for part, split in list(parts.items()):
        if labelled and part not in labelled and split != "train":
            predicted.append(part)
            del parts[part]
    findings = []
    if predicted:
        findings.append(
            Finding(
                "no-labels",
                "note",
                f"folders of {MEDIA_NOUNS[media]} without class folders are ignored: they can be given to `fieldguide predict`",
                relative_paths(predicted, source),
                len(predicted),
            )
        )
    skipped = [p for p in walk.folders(base) if not walk.has_media(p)] + direct
    return Layout([(p, split, None) for p, split in parts.items()], skipped, findings)


def find_layout_of_classes(source: Path, base: Path, folders: list[Path], walk: FolderWalk, media: Kind) -> Layout | None:
    """Find splits below classes, or classes below several folders; None if the folders are the classes."""
    below = {p: {s.name.casefold() for s in walk.folders(p) if walk.has_media(s)} for p in folders}
    bare = [p for p in folders if not walk.has_direct_media(p)]
    if len(bare) == len(folders) and all(below.values()):
        named = [(s, folder_split(s.name), p.name) for p in folders for s in walk.folders(p) if walk.has_media(s)]
        if named and all(split for _, split, _ in named):  # cats/train, cats/test
            inner = [{c.name.casefold() for c in walk.class_folders(s)} for s, _, _ in named]
            if len(folders) > 1 and inner[0] and all(names == inner[0] for names in inner):
                listed = ", ".join(p.name for p in folders[:MAX_LISTED_FOLDERS])
                raise DataError(
                    f"{source}: {listed} each contain splits with the same folders ({', '.join(sorted(inner[0])[:MAX_LISTED_FOLDERS])}), "
                    f"as folds of a cross-validation do. Give one of them, such as {relative_path(folders[0], source)}."
                )
            return Layout([(s, split, label) for s, split, label in named])
        sets = list(below.values())
        if len(folders) > 1 and all(s == sets[0] for s in sets) and len(sets[0]) > 1 and not any(s for _, s, _ in named):
            classes = ", ".join(sorted({s.name for s, _, _ in named})[:MAX_LISTED_FOLDERS])
            finding = Finding(
                "common-subfolders",
                "warning",
                f"the folders {', '.join(p.name for p in folders[:MAX_LISTED_FOLDERS])} contain the same folders, which are "
                f"read as the classes: {classes}",
                relative_paths(folders, source),
                1,
                "If the outer folders are the classes, move the files up into them.",
            )
            return Layout([(p, None, None) for p in folders], findings=[finding])
        shared = sorted(name for name in set().union(*sets) if sum(name in s for s in sets) > 1)
        if shared and not any(s for _, s, _ in named) and all(s & set(shared) for s in sets):
            finding = Finding(
                "partly-common-subfolders",
                "warning",
                f"the folders {', '.join(p.name for p in folders[:MAX_LISTED_FOLDERS])} are read as the classes, but contain partly "
                f"the same folders: {', '.join(shared[:MAX_LISTED_FOLDERS])}",
                relative_paths(folders, source),
                1,
                "If the inner folders are the classes, move all files into one folder for each of them.",
            )
            return Layout([(base, None, None)], findings=[finding])
    mixed = [s for p in folders for s in walk.folders(p) if folder_split(s.name) and walk.has_media(s)]
    classes_below = {p: [s for s in walk.folders(p) if walk.has_media(s) and not folder_split(s.name)] for p in folders}
    if mixed and not any(classes_below[s.parent] for s in mixed) and media == "image":
        raise DataError(
            f"{source}: some class folders contain split folders ({', '.join(relative_paths(mixed, source))}), others do not. "
            "Divide all classes into train and test, or none."
        )
    return None


def check_nested_splits(source: Path, walk: FolderWalk, layout: Layout) -> None:
    """Raise DataError for a split that is next to the classes which it contains, such as train/val/cats next to train/cats."""
    for base, _, label in layout.parts:
        classes = [p for p in walk.folders(base) if walk.has_media(p)] if label is None else []
        names = {p.name.casefold() for p in classes}
        for inner in classes:
            below = [p.name for p in walk.class_folders(inner) if p.name.casefold() in names]
            if folder_split(inner.name) and below:
                raise DataError(
                    f"{source}: {relative_path(inner, source)} contains the same folders as the one it is in "
                    f"({', '.join(below[:MAX_LISTED_FOLDERS])}). If it is a split, move it next to the other splits."
                )


def describe_mixture(source: Path, splits: list[Path], plain: list[Path], media: Kind) -> str:
    """Return the question that a mixture of split names and other folders raises, with the remedy."""
    listed = lambda folders: (
        ", ".join(repr(p.name) for p in folders[:MAX_LISTED_FOLDERS]) + (", ..." if len(folders) > MAX_LISTED_FOLDERS else "")
    )
    return (
        f"{source}: is {listed(splits)} a split or a class? It is next to {listed(plain)}. If all of them are classes, move "
        f"them into a folder named train. If {listed(splits)} holds a split, move {listed(plain)} into a class folder layout "
        f"such as train/CLASS/..., or out of this folder."
    )


class FolderWalk:
    """Walks a folder without following links out of it, and counts skipped entries."""

    def __init__(self, root: Path, suffixes: Collection[str] = (), others: Collection[str] = ()) -> None:
        self.root, self.hidden, self.links = root.resolve(), 0, list[Path]()
        self.suffixes, self.others = suffixes, others
        self.seen: dict[Path, list[Path]] = {}
        self.below: dict[Path, list[Path]] = {}  # folders in each folder
        self.filled: dict[Path, bool] = {}

    def entries(self, folder: Path) -> list[Path]:
        """Return the entries of a folder, without hidden ones and links out of the root."""
        if folder in self.seen:
            return self.seen[folder]
        kept, left = list_visible(folder)
        self.hidden += left
        inside = []
        for p in kept:
            if p.is_symlink() and not (p.exists() and p.resolve().is_relative_to(self.root)):
                self.links.append(p)
            else:
                inside.append(p)
        self.seen[folder] = inside
        return inside

    def folders(self, folder: Path) -> list[Path]:
        """Return the folders in a folder."""
        if folder not in self.below:
            self.below[folder] = [p for p in self.entries(folder) if p.is_dir() and not p.is_symlink()]
        return self.below[folder]

    def is_media(self, path: Path) -> bool:
        """Return whether a file name has one of the suffixes that the reader looks for."""
        return find_suffix(path) in self.suffixes

    def is_other(self, path: Path) -> bool:
        """Return whether a file name says that it is something else, such as a list or a license among images."""
        return not self.is_media(path) and find_suffix(path) in self.others

    def has_direct_media(self, folder: Path) -> bool:
        """Return whether a folder itself contains a file that the reader looks for."""
        return any(self.is_media(p) and p.is_file() for p in self.entries(folder))

    def has_media(self, folder: Path) -> bool:
        """Return whether there is a file that the reader looks for anywhere below a folder."""
        if folder not in self.filled:
            self.filled[folder] = self.has_direct_media(folder) or any(map(self.has_media, self.folders(folder)))
        return self.filled[folder]

    def class_folders(self, folder: Path) -> list[Path]:
        """Return the folders in a folder, or in the folder that it wraps, that contain files."""
        return [p for p in self.folders(self.innermost(folder)) if self.has_media(p)]

    def wrapped(self, folder: Path, by_name: bool = False) -> Path | None:
        """Return the only folder in a folder if it is no class: it holds only folders, or its name says that it holds all
        files (such as `images`, or the name of its parent). With `by_name`, only the name counts.
        """
        filled = [p for p in self.folders(folder) if self.has_media(p)]
        if len(filled) != 1 or self.has_direct_media(folder):
            return None
        inner = filled[0]
        is_container = inner.name.lower() in CONTAINER_NAMES or inner.name == folder.name or bool(folder_split(inner.name))
        return inner if is_container or not (by_name or self.has_direct_media(inner)) else None

    def innermost(self, folder: Path) -> Path:
        """Return the folder itself, or the innermost folder that it wraps."""
        while inner := self.wrapped(folder, by_name=True):
            folder = inner
        return folder

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
                f"files ignored: not {thing}",
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

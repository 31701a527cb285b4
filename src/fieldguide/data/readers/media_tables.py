"""Reader for images, videos or recordings with a table of their labels or captions.

Layouts: train/ and test/, each with media and a table (metadata.csv, .jsonl or .parquet, or the only one there), as the
ImageFolder and AudioFolder of Hugging Face; a table next to folders of images; and files of captions (`caption_files`). Names of
images are found below the folder, with or without suffix.
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FILE, LINE, Finding
from fieldguide.data.media.file_names import ImageIndex, normalize
from fieldguide.data.media.images import READABLE_SUFFIXES
from fieldguide.data.media.video import VIDEO_SUFFIXES
from fieldguide.data.readers import recordings, table
from fieldguide.data.readers.caption_files import (
    find_caption_file,
    find_coco_captions,
    find_karpathy,
    load_captions,
    load_coco_captions,
    load_karpathy,
)
from fieldguide.data.readers.image_folder import FolderWalk
from fieldguide.data.readers.json_tables import read_json_list
from fieldguide.data.source import Options, RawTable, folder_split, list_folders, relative_path

NAME = "media with tables"
UNDERSTANDS = (
    "images, videos or recordings with a table: train/ and test/ with files and metadata.csv, .jsonl or .parquet each; a table next to "
    "folders of images or videos; captions.txt with Images/ (Flickr8k), annotations/captions_*.json (COCO), or dataset_*.json (Karpathy)"
)
VISUAL_SUFFIXES = READABLE_SUFFIXES | VIDEO_SUFFIXES
SAMPLED_LINES = 200  # lines of a table that are searched for names of images
MIN_MATCHED_FRACTION = 0.5  # minimum fraction of values that are names of images
MIN_STEM = 4  # minimum characters of a name without suffix; shorter ones may be labels or numbers
MAX_SHOWN = 5


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path):
        return 0
    if find_karpathy(source):
        return 13
    if not source.is_dir():
        return 0
    if find_coco_captions(source):
        return 13 if options.target_kind == "text" else 10
    if find_split_tables(source):
        return 10
    if find_caption_file(source):
        return 9
    return 9 if names_images(table.find_table_folder(source)) else 0


def load(source: Path, options: Options) -> RawTable:
    """Read the table or tables and find the files that they name."""
    if path := find_karpathy(source):
        return load_karpathy(source if source.is_dir() else source.parent, path)
    if files := find_coco_captions(source):
        return load_coco_captions(source, files)
    if parts := find_split_tables(source):
        return load_split_tables(source, parts, options)
    if path := find_caption_file(source):
        return load_captions(source, path)
    source = table.find_table_folder(source)
    raw = table.load(source, options)
    return resolve_images(raw, source, ImageIndex(source, VISUAL_SUFFIXES), options)


# A table in each split


def find_split_tables(source: Path) -> list[tuple[Path, Path, str]]:
    """Return (table, folder, split) of the folders of splits with media and one table each, or an empty list."""
    base, folders = source, list_folders(source)
    if len(folders) != 1 and not any(folder_split(p.name) for p in folders):
        return []
    walk = FolderWalk(source, VISUAL_SUFFIXES | recordings.SOUND_SUFFIXES)
    while (inner := walk.wrapped(base)) and not folder_split(inner.name) and not table.list_tables(base):
        base = inner
    if table.list_tables(base):
        return []
    parts = []
    for folder in walk.folders(base):
        split = folder_split(folder.name)
        if not split or not walk.has_media(folder):
            continue
        tables = table.list_tables(folder)
        named = [p for p in tables if p.stem.lower() == "metadata"] or tables
        named = [p for p in named if p.name.lower() not in ("_classes.csv", "class_dict.csv")]
        if len(named) != 1:
            return []
        parts.append((named[0], folder, split))
    several = [split for _, _, split in parts]
    return parts if len(set(several)) == len(several) else []


def load_split_tables(source: Path, parts: list[tuple[Path, Path, str]], options: Options) -> RawTable:
    """Read the table of each split. Raises DataError if it does not name the files in its folder."""
    loaded = []
    for path, folder, split in parts:
        raw = table.load_file(path, source, options)
        sounds = list(recordings.find_recordings(folder))
        if sounds:
            raw = recordings.resolve_file_names(raw, sounds, folder, options)
            name = next(c for c, kind in raw.kinds.items() if kind == "audio")
            full = [v and str(folder / v) for v in raw.rows[name].to_list()]
            raw.rows = raw.rows.with_columns(pl.Series(name, full, dtype=pl.String))
        else:
            raw = resolve_images(raw, folder, ImageIndex(folder, VISUAL_SUFFIXES), options)
        loaded.append((raw, split))
    if len(loaded) == 1:
        return loaded[0][0]
    joined = table.join_splits(loaded, source, options.target)
    joined.kinds = {name: kind for raw, _ in reversed(loaded) for name, kind in raw.kinds.items()} | joined.kinds
    joined.target = joined.target or loaded[0][0].target
    return joined


# A table next to folders of images


def names_images(source: Path) -> bool:
    """Return whether the tables in a folder name images in folders below it, which need not be paths."""
    tables = [p for p in table.list_tables(source) if p.suffix.lower() not in table.PARQUET]
    index = ImageIndex(source, VISUAL_SUFFIXES)
    if not tables or not index.scan() or len(tables) > 3:
        return False
    for path in tables:
        if path.suffix.lower() == ".json":
            found = read_json_list(path.read_bytes(), path.name).head(SAMPLED_LINES)
            cells = [[v for v in row if isinstance(v, str)] for row in found.iter_rows()]
        else:
            with path.open(encoding="utf-8", errors="replace") as file:
                lines = list(islice(file, 1, SAMPLED_LINES))
            cells = [re.split(r"[,;\t|{}:]", line) for line in lines if line.strip()]
        named = sum(any(looks_named(c.strip(" \"'\r\n"), index) for c in row) for row in cells)
        if not cells or named < MIN_MATCHED_FRACTION * len(cells):
            return False
    return True


def looks_named(value: str, index: ImageIndex) -> bool:
    """Return whether a value is the name or path of an image, or its name without suffix if that is long enough."""
    if not value:
        return False
    short = normalize(value).rpartition("/")[2]
    return short in index.scan() or (short in index.stems and len(short) >= MIN_STEM)


def resolve_images(raw: RawTable, folder: Path, index: ImageIndex, options: Options) -> RawTable:
    """Replace the names of images or videos in a table by their paths. Raises DataError if no column names files of the folder."""
    columns = [c for c in raw.rows.columns if c not in (FILE, LINE, options.target) and raw.rows[c].dtype == pl.String]
    matched = {}
    for name in columns:
        values = raw.rows[name].drop_nulls()
        some = values.gather_every(max(1, values.len() // 200)).to_list()
        matched[name] = sum(looks_named(v, index) for v in some) / max(1, len(some))
    chosen = [c for c, share in matched.items() if share >= MIN_MATCHED_FRACTION]
    if not chosen and any(kind.is_nested() for kind in raw.rows.schema.values()):
        return raw  # the images are named inside of lists, such as messages
    if not chosen:
        example = next(iter(next(iter(index.scan().values()), [])), folder)
        raise DataError(
            f"{folder}: no column of {raw.files[0].path} ({', '.join(columns)}) contains the names of the images in the folder, "
            f"such as {relative_path(example, folder)}. One column must contain their file names."
        )
    used = set()
    for name in chosen:
        paths: list[str | None] = []
        for value in raw.rows[name].to_list():
            path = index.find(value, (folder,)) if value else None
            used.add(path)
            paths.append(str(path.absolute()) if path else value and str((folder / value).absolute()))
        raw.rows = raw.rows.with_columns(pl.Series(name, paths, dtype=pl.String))
        videos = [Path(path).suffix.lower() in VIDEO_SUFFIXES for path in paths if path]
        raw.kinds[name] = "video" if videos and all(videos) else "image"
    lone = [p for paths in index.scan().values() for p in paths if p not in used]
    if lone:
        raw.findings.append(
            Finding(
                "file-without-row",
                "note",
                "images that are in no row of the table; they are ignored",
                tuple(relative_path(p, raw.root) for p in lone[:MAX_SHOWN]),
                len(lone),
            )
        )
    return raw

"""Reader for images or recordings with a table of their labels or captions.

Layouts: train/ and test/, each with media and a table (metadata.csv, .jsonl or .parquet, or the only one there), as the
ImageFolder and AudioFolder of Hugging Face; a table next to folders of images; Flickr8k and Flickr30k (captions.txt and
Images/); and COCO captions (annotations/captions_*.json). Names of images are found below the folder, with or without suffix.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.core.validation import parse_json
from fieldguide.data.dataset import FILE, LINE, FileEntry, Finding
from fieldguide.data.media.file_names import ImageIndex, find_child, normalize
from fieldguide.data.media.images import READABLE_SUFFIXES
from fieldguide.data.readers import delimited, recordings, table
from fieldguide.data.readers.coco import as_id, find_image_folders
from fieldguide.data.readers.image_folder import FolderWalk
from fieldguide.data.source import Options, RawTable, folder_split, list_folders, list_visible, relative_path, sha256, split_of

NAME = "media with tables"
UNDERSTANDS = (
    "images or recordings with a table: train/ and test/ with files and metadata.csv, .jsonl or .parquet each; a table next to "
    "folders of images; captions.txt with Images/ (Flickr8k), or annotations/captions_*.json (COCO)"
)
CAPTION_FILES = ("captions.txt", "captions.csv", "captions.tsv", "results.csv", "results.txt")
TOKEN_LINE = re.compile(r"([^\t]+?)#\d+\t(.+)")  # name.jpg#0<tab>caption
SAMPLED_LINES = 200  # lines of a table that are searched for names of images
MIN_MATCHED_FRACTION = 0.5  # minimum fraction of values that are names of images
MIN_STEM = 4  # minimum characters of a name without suffix; shorter ones may be labels or numbers
MAX_SHOWN = 5
HEAD_BYTES = 1 << 16


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path) or not source.is_dir():
        return 0
    if find_coco_captions(source):
        return 13 if options.target_kind == "text" else 10
    if find_split_tables(source):
        return 10
    if find_caption_file(source):
        return 9
    return 9 if names_images(source) else 0


def load(source: Path, options: Options) -> RawTable:
    """Read the table or tables and find the files that they name."""
    if files := find_coco_captions(source):
        return load_coco_captions(source, files)
    if parts := find_split_tables(source):
        return load_split_tables(source, parts, options)
    if path := find_caption_file(source):
        return load_captions(source, path)
    raw = table.load(source, options)
    return resolve_images(raw, source, ImageIndex(source, READABLE_SUFFIXES), options)


# A table in each split


def find_split_tables(source: Path) -> list[tuple[Path, Path, str]]:
    """Return (table, folder, split) of the folders of splits with media and one table each, or an empty list."""
    base, folders = source, list_folders(source)
    if len(folders) != 1 and not any(folder_split(p.name) for p in folders):
        return []
    walk = FolderWalk(source, READABLE_SUFFIXES | recordings.SOUND_SUFFIXES)
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
            raw = resolve_images(raw, folder, ImageIndex(folder, READABLE_SUFFIXES), options)
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
    index = ImageIndex(source, READABLE_SUFFIXES)
    if not tables or not index.scan() or len(tables) > 3:
        return False
    for path in tables:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = list(islice(file, 1, SAMPLED_LINES))
        cells = [re.split(r"[,;\t|{}:]", line) for line in lines if line.strip()]
        found = sum(any(looks_named(c.strip(" \"'\r\n"), index) for c in row) for row in cells)
        if not cells or found < MIN_MATCHED_FRACTION * len(cells):
            return False
    return True


def looks_named(value: str, index: ImageIndex) -> bool:
    """Return whether a value is the name or path of an image, or its name without suffix if that is long enough."""
    if not value:
        return False
    short = normalize(value).rpartition("/")[2]
    return short in index.scan() or (short in index.stems and len(short) >= MIN_STEM)


def resolve_images(raw: RawTable, folder: Path, index: ImageIndex, options: Options) -> RawTable:
    """Replace the names of images in a table by their paths. Raises DataError if no column names images of the folder."""
    columns = [c for c in raw.rows.columns if c not in (FILE, LINE, options.target) and raw.rows[c].dtype == pl.String]
    matched = {}
    for name in columns:
        values = raw.rows[name].drop_nulls()
        some = values.gather_every(max(1, values.len() // 200)).to_list()
        matched[name] = sum(looks_named(v, index) for v in some) / max(1, len(some))
    chosen = [c for c, share in matched.items() if share >= MIN_MATCHED_FRACTION]
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
        raw.kinds[name] = "image"
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


# Files of captions


def find_caption_file(source: Path) -> Path | None:
    """Return the captions of Flickr8k or Flickr30k in a folder, or in a folder in it; None without images."""
    places = [source, *(p for p in list_visible(source)[0] if p.is_dir() and "text" in p.name.lower())]
    for place in places:
        for path in list_visible(place)[0]:
            name = path.name.lower()
            if path.is_file() and (name in CAPTION_FILES or name.endswith((".token.txt", ".token"))):
                if has_numbered_captions(path):
                    continue
                rows = parse_captions(path.read_bytes()[:HEAD_BYTES], path.name)
                index = ImageIndex(source, READABLE_SUFFIXES)
                some = [image for _, image, _ in rows[:20]]
                if some and sum(index.find(i) is not None for i in some) >= MIN_MATCHED_FRACTION * len(some):
                    return path
    return None


def has_numbered_captions(path: Path) -> bool:
    """Return whether the first line names columns such as caption_0 and caption_1, so that the file is an ordinary table."""
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline(HEAD_BYTES)
    return len(re.findall(r"(?i)(?:^|[,;\t|])\s*\"?captions?[_ .-]?\d+", first)) > 1


def parse_captions(content: bytes, name: str) -> list[tuple[int, str, str]]:
    """Return (line, image, caption) of every line: name#0<tab>caption, or name,caption with a comma, | or tab."""
    text, _ = delimited.decode(content, name)
    lines = text.decode("utf-8", "replace").splitlines()
    rows: list[tuple[int, str, str]] = []
    first = lines[0] if lines else ""
    mark = next((m for m in ("\t", "|", ",") if m in first), ",")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if token := TOKEN_LINE.fullmatch(line):
            rows.append((number, token[1].strip(), token[2].strip()))
            continue
        image, _, caption = line.partition(mark)
        if mark == "|" and re.match(r"\s*\d+\s*\|", caption):  # image_name| comment_number| comment
            caption = caption.partition(mark)[2]
        caption = caption.strip()
        if len(caption) > 1 and caption[0] == caption[-1] == '"':
            caption = next(csv.reader([caption]))[0]
        is_head = number == 1 and "." not in image
        if not is_head:
            rows.append((number, image.strip().strip('"'), caption.strip()))
    return rows


def load_captions(source: Path, path: Path) -> RawTable:
    """Read captions and find their images; lists such as Flickr_8k.trainImages.txt define the splits."""
    content = path.read_bytes()
    rows, index = parse_captions(content, relative_path(path, source)), ImageIndex(source, READABLE_SUFFIXES)
    entry = FileEntry(relative_path(path, source), len(content), sha256(content), rows=len(rows))
    split: dict[str, str] = {}
    for listed in list_visible(path.parent)[0]:
        part = split_of(listed.stem) or folder_split(listed.stem)
        if part and listed.suffix.lower() == ".txt" and "image" in listed.name.lower():
            names = listed.read_text(encoding="utf-8", errors="replace").splitlines()
            split |= {normalize(n): part for n in names if n.strip()}
    if split:
        rows = [row for row in rows if normalize(row[1]) in split]
    return build_captions(
        source,
        [(index.find(image) or source / image, caption or None, 0, line) for line, image, caption in rows],
        [FileEntry(entry.path, entry.bytes, entry.sha256, rows=len(rows))],
        [split.get(normalize(image)) for _, image, _ in rows],
    )


def find_coco_captions(source: Path) -> list[Path]:
    """Return COCO's files of captions in annotations/ or in the folder itself, unless there are instances as well."""
    for place in (find_child(source, ("annotations",)), source):
        files = [p for p in list_visible(place)[0] if p.suffix.lower() == ".json" and p.is_file()] if place else []
        captions = [p for p in files if has_captions(p)]
        if captions:
            return captions
    return []


def has_captions(file: Path) -> bool:
    """Return whether the start and end of a JSON file contain the keys of COCO captions."""
    with file.open("rb") as opened:
        seen = opened.read(HEAD_BYTES)
        opened.seek(max(0, file.stat().st_size - HEAD_BYTES))
        seen += opened.read(HEAD_BYTES)
    return b'"caption"' in seen and (b'"image_id"' in seen or b'"images"' in seen) and b'"bbox"' not in seen


def load_coco_captions(source: Path, files: Sequence[Path]) -> RawTable:
    """Read COCO captions: one row per caption. Raises DataError if a file is malformed."""
    index, rows, splits, entries = ImageIndex(source), list[tuple[Path, str | None, int, int | None]](), [], []
    for number, file in enumerate(files):
        content = file.read_bytes()
        document = parse_json(content, file, expect=object)
        try:
            names = {as_id(image["id"]): str(image["file_name"]) for image in document["images"]}
            captions = [(as_id(a["image_id"]), " ".join(str(a["caption"]).split())) for a in document["annotations"]]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{file}: not a file of COCO captions ({error!r}). It needs images with id and file_name, and annotations with "
                "image_id and caption."
            ) from None
        places = find_image_folders(document["images"], file, source)[:3]
        found = {key: index.find(name, places) or places[0] / name for key, name in names.items()}
        known = [(key, text) for key, text in captions if key in found]
        rows += [(found[key], text or None, number, None) for key, text in known]
        split = split_of(file.stem) or folder_split(file.stem)
        splits += [split if len(files) > 1 else None] * len(known)
        entries.append(FileEntry(relative_path(file, source), len(content), sha256(content), rows=len(known)))
    return build_captions(source, rows, entries, splits)


def build_captions(
    source: Path, rows: Sequence[tuple[Path, str | None, int, int | None]], files: list[FileEntry], splits: list[str | None]
) -> RawTable:
    """Return the table of images and captions. Raises DataError without rows."""
    if not rows:
        raise DataError(f"{source}: {files[0].path} contains no captions of the images in the folder.")
    frame = pl.DataFrame(
        [(str(path.absolute()), caption, file, line) for path, caption, file, line in rows],
        schema={"image": pl.String, "caption": pl.String, FILE: pl.Int32, LINE: pl.Int64},
        orient="row",
    )
    named = np.array(splits, dtype=object) if all(splits) and len(set(splits)) > 1 else None
    return RawTable(frame, files, source, [], named, {"image": "image", "caption": "text"}, "caption")

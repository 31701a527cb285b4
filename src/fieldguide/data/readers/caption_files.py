"""Files of captions next to images: Flickr8k and Flickr30k (captions.txt, *.token.txt), COCO (annotations/captions_*.json), and the
splits of Karpathy (dataset_flickr8k.json: `images`, each with `filename`, `sentences` and `split`)."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.core.validation import parse_json
from fieldguide.data.column_spec import CAPTION_NAMES, normalize_name
from fieldguide.data.dataset import FILE, LINE, FileEntry
from fieldguide.data.media.file_names import ImageIndex, find_child, normalize
from fieldguide.data.media.images import READABLE_SUFFIXES
from fieldguide.data.readers import delimited
from fieldguide.data.readers.coco import as_id, find_image_folders
from fieldguide.data.source import RawTable, folder_split, list_visible, relative_path, sha256, split_of

CAPTION_FILES = ("captions.txt", "captions.csv", "captions.tsv", "results.csv", "results.txt")
TOKEN_LINE = re.compile(r"([^\t]+?)#\d+\t(.+)")  # name.jpg#0<tab>caption
MIN_MATCHED_FRACTION = 0.5  # minimum fraction of captions whose image exists
HEAD_BYTES = 1 << 16
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}  # restval: the rest of COCO's val


def find_caption_file(source: Path) -> Path | None:
    """Return the captions of Flickr8k or Flickr30k in a folder, or in a folder in it; None without images."""
    places = [source, *(p for p in list_visible(source)[0] if p.is_dir() and "text" in p.name.lower())]
    for place in places:
        for path in list_visible(place)[0]:
            name = path.name.lower()
            if path.is_file() and (name in CAPTION_FILES or name.endswith((".token.txt", ".token"))):
                if is_ordinary_table(path):
                    continue
                rows = parse_captions(path.read_bytes()[:HEAD_BYTES], path.name)
                index = ImageIndex(source, READABLE_SUFFIXES)
                some = [image for _, image, _ in rows[:20]]
                if some and sum(index.find(i) is not None for i in some) >= MIN_MATCHED_FRACTION * len(some):
                    return path
    return None


def is_ordinary_table(path: Path) -> bool:
    """Return whether the first line names columns such as caption_0 and caption_1, or further columns next to the caption."""
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline(HEAD_BYTES)
    if len(re.findall(r"(?i)(?:^|[,;\t|])\s*\"?captions?[_ .-]?\d+", first)) > 1:
        return True
    names = [normalize_name(cell.strip(' "\ufeff\r\n')) for cell in re.split(r"[,;\t]", first)]
    return len(names) > 2 and any(name in CAPTION_NAMES for name in names)


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
    is_list = seen.lstrip()[:1] == b"["  # a table
    return not is_list and b'"caption"' in seen and (b'"image_id"' in seen or b'"images"' in seen) and b'"bbox"' not in seen


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


def is_karpathy(file: Path) -> bool:
    """Return whether the start of a JSON file contains the keys of Karpathy's splits."""
    if file.suffix.lower() != ".json" or not file.is_file():
        return False
    with file.open("rb") as opened:
        seen = opened.read(HEAD_BYTES)
    return all(key in seen for key in (b'"images"', b'"sentences"', b'"raw"', b'"filename"'))


def find_karpathy(source: Path) -> Path | None:
    """Return the file of Karpathy's splits: the source itself or the only one in a folder."""
    if source.is_file():
        return source if is_karpathy(source) else None
    found = [p for p in list_visible(source)[0] if is_karpathy(p)]
    return found[0] if len(found) == 1 else None


def load_karpathy(root: Path, file: Path) -> RawTable:
    """Read Karpathy's splits of Flickr8k, Flickr30k or COCO: one row per sentence."""
    content, index = file.read_bytes(), ImageIndex(root, READABLE_SUFFIXES)
    document = parse_json(content, file)
    rows: list[tuple[Path, str | None, int, int | None]] = []
    splits: list[str | None] = []
    try:
        for image in document["images"]:
            name = "/".join(filter(None, [image.get("filepath"), str(image["filename"])]))
            path = index.find(name) or root / name
            for sentence in image["sentences"]:
                rows.append((path, " ".join(str(sentence["raw"]).split()) or None, 0, None))
                splits.append(KARPATHY_SPLITS.get(str(image.get("split"))))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: not a file of Karpathy's splits ({error!r}). It needs images with filename, split, and sentences with raw."
        ) from None
    return build_captions(
        root, rows, [FileEntry(relative_path(file, root), len(content), sha256(content), rows=len(rows))], splits
    )


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

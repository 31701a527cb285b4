"""Reader for images with segmentation masks: matching file names in two folders, or in one with an ending such as _mask.

Layouts: folders images and masks; train and train_masks; masks next to the images (Roboflow, with _classes.csv); Pascal VOC's
and CVAT's JPEGImages and SegmentationClass with ImageSets/Segmentation; each optionally below train, val and test.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FileEntry, Finding
from fieldguide.data.media.boxes import annotation_entry
from fieldguide.data.media.file_names import find_child, find_file, map_stems, normalize
from fieldguide.data.media.images import READABLE_SUFFIXES
from fieldguide.data.source import Options, RawTable, folder_split, list_visible, relative_path

NAME = "masks"
UNDERSTANDS = (
    "images with masks: a folder images and a folder masks (or labels, annotations, SegmentationClass) with files of the same "
    "names, or masks x_mask.png next to the images, optionally below train, val and test; classes.txt, class_dict.csv, "
    "labelmap.txt or _classes.csv may name the classes"
)
IMAGES = ("images", "imgs", "image", "img", "jpegimages", "inputs", "photos")
MASKS = (
    "masks",
    "mask",
    "segmentationclass",
    "segmentationclasspng",
    "labels",
    "annotations",
    "gt",
    "groundtruth",
    "targets",
    "labelimages",
)
ENDINGS = ("", "_mask", "-mask", "_l", "_label", "_labels", "_gt", "_seg", "_labelids", "_gtfine_labelids", "_segmentation")
IMAGE_ENDINGS = ("_leftimg8bit", "_sat", "_image", "_img")  # of images, replaced by the ending of the mask
FOLDER_ENDINGS = ("_masks", "_mask", "masks", "-masks", "_labels", "labels", "annot", "_annot", "_annotations", "_seg", "_gt")
CLASS_LISTS = ("classes.txt", "labels.txt", "codes.txt", "class_names.txt")  # one name per line, from value 0
LISTS = {"test": "test", "val": "val", "train": "train", "trainval": "train"}  # earlier lists have priority
MIN_PAIRED_FRACTION = 0.5  # minimum fraction of images next to which there is a mask

Part = tuple[Path, Path, str | None]


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path) or not source.is_dir() or not (layout := find_layout(source)):
        return 0
    if options.target_kind == "mask":
        return 12  # a folder may hold boxes too
    # Pascal VOC's folders hold boxes for all images, and masks for some.
    boxes = any((xml := find_child(images.parent, ("annotations",))) and has_suffix(xml, {".xml"}) for images, _, _ in layout)
    return 8 if boxes else 9


def has_suffix(folder: Path, suffixes: set[str] | frozenset[str]) -> bool:
    """Return whether a folder contains a file with one of the suffixes."""
    return any(p.suffix.lower() in suffixes for p in folder.iterdir())


def find_layout(source: Path) -> list[Part]:
    """Return (images, masks, split) of every part, or an empty list if the layout does not match."""
    if own := find_parts(source, None):
        return own
    folders = [p for p in list_visible(source)[0] if p.is_dir()]
    parts = [part for p in folders if folder_split(p.name) for part in find_parts(p, folder_split(p.name))]
    if not parts and len(folders) == 1:  # VOCdevkit/VOC2012
        return find_layout(folders[0])
    return parts


def find_parts(folder: Path, split: str | None) -> list[Part]:
    """Return the parts in a folder: images and masks in two folders, in folders of their splits, or together."""
    folders = {normalize(p.name): p for p in list_visible(folder)[0] if p.is_dir()}
    first = next((folders[n] for n in IMAGES if n in folders), None)
    for second in (folders[n] for n in MASKS if n in folders):
        if first is None:
            break
        if has_suffix(second, READABLE_SUFFIXES):
            return [(first, second, split)]
        inner = [(p, find_child(second, (normalize(p.name),))) for p in list_visible(first)[0] if p.is_dir()]
        pairs = [(p, q, folder_split(p.name)) for p, q in inner if q and has_suffix(q, READABLE_SUFFIXES)]
        if pairs and all(s for _, _, s in pairs):
            return pairs
    beside: list[Part] = [
        (p, folders[name + ending], folder_split(p.name) or split)
        for name, p in folders.items()
        for ending in FOLDER_ENDINGS
        if name + ending in folders
        and has_suffix(folders[name + ending], READABLE_SUFFIXES)
        and has_suffix(p, READABLE_SUFFIXES)
    ]
    if beside:
        return beside
    stems = map_stems(folder, READABLE_SUFFIXES)
    masks = {s for s in stems if any(s.endswith(e) for e in ENDINGS[1:])}
    paired = [s for s in stems if s not in masks and find_partner(s, stems, ENDINGS[1:])]
    if paired and len(paired) >= MIN_PAIRED_FRACTION * (len(stems) - len(masks)):
        return [(folder, folder, split)]
    return []


def find_partner(stem: str, partners: dict[str, Path], endings: tuple[str, ...]) -> str | None:
    """Return the normalized name of the mask of an image, or None."""
    bases = [stem, *(stem.removesuffix(e) for e in IMAGE_ENDINGS if stem.endswith(e))]
    return next((base + e for base in bases for e in endings if base + e in partners and base + e != stem), None) or (
        stem if "" in endings and stem in partners else None
    )


def load(source: Path, options: Options) -> RawTable:
    """Pair images with masks by name. Raises DataError if there are no pairs."""
    rows: list[tuple[str, str]] = []
    splits: list[str | None] = []
    findings: list[Finding] = []
    files: list[FileEntry] = []
    lone_images: list[Path] = []
    lone_masks: list[Path] = []
    unlisted: list[Path] = []
    layout = find_layout(source)
    for image_folder, masks, split in layout:
        together = image_folder == masks
        every = map_stems(image_folder, READABLE_SUFFIXES)
        partners = map_stems(masks, READABLE_SUFFIXES)
        endings = ENDINGS[1:] if together else ENDINGS
        if together:
            partners = {s: p for s, p in partners.items() if any(s.endswith(e) for e in endings)}
            every = {s: p for s, p in every.items() if s not in partners}
        listed = read_lists(image_folder.parent, source, files) if split is None else {}
        used = set()
        for stem, path in every.items():
            partner = find_partner(stem, partners, endings)
            if partner is None:
                # With Pascal VOC, only some of the images have masks.
                (lone_images if not masks.name.lower().startswith("segmentationclass") else unlisted).append(path)
                continue
            used.add(partner)
            if listed and stem not in listed:
                unlisted.append(path)
                continue
            rows.append((str(path.absolute()), str(partners[partner].absolute())))
            splits.append(listed.get(stem) or split)
        lone_masks += [p for s, p in partners.items() if s not in used]
    for lone, check, what, remedy in (
        (lone_images, "no-mask", "images without a mask", "Add the mask or remove the image."),
        (lone_masks, "no-picture", "masks without an image", "Add the image or remove the mask."),
    ):
        if lone:
            findings.append(
                Finding(check, "warning", what, tuple(relative_path(p, source) for p in lone[:5]), len(lone), remedy, len(lone))
            )
    if unlisted:
        findings.append(
            Finding(
                "not-listed",
                "note",
                "images that have no mask, or that no list in ImageSets/Segmentation contains; they are dropped",
                tuple(relative_path(p, source) for p in unlisted[:5]),
                len(unlisted),
            )
        )
    if not rows:
        raise DataError(f"{source}: no image has a mask with its name." + "".join(f"\n  - {f}" for f in findings))
    table = pl.DataFrame(rows, schema={"image": pl.String, "mask": pl.String}, orient="row")
    named = np.array(splits, dtype=object) if all(splits) and len(set(splits)) > 1 else None
    return RawTable(
        table,
        files,
        source,
        findings,
        named,
        {"image": "image", "mask": "mask"},
        "mask",
        unusable=len(lone_images) + len(lone_masks),
        context=read_class_names(source, layout),
    )


def read_lists(folder: Path, source: Path, files: list[FileEntry]) -> dict[str, str]:
    """Return normalized name -> split from ImageSets/Segmentation; empty without lists for splits."""
    sets = find_child(folder, ("imagesets",))
    lists = find_child(sets, ("segmentation",)) if sets else None
    split: dict[str, str] = {}
    for name, part in LISTS.items():
        if lists and (path := find_file(lists, (f"{name}.txt",))):
            content = path.read_bytes()
            files.append(annotation_entry(path, content, source))
            for line in content.decode("utf-8-sig", "replace").splitlines():
                if line.strip():
                    split.setdefault(normalize(line.split()[0].replace("\\", "/").rpartition("/")[2]), part)
    return split


def read_class_names(source: Path, layout: list[Part]) -> dict[str, Any]:
    """Return the names of the classes from the file that holds them, or {}.

    {"classes": names} of the values 0, 1, ...; {"values": {value: name}}; or {"colours": {(r, g, b): name}}. Raises DataError
    if the file is malformed, or if several parts have different ones.
    """
    places = dict.fromkeys([source, *(p for part in layout for p in (part[0].parent, part[0], part[1].parent, part[1]))])
    found: dict[Path, dict[str, Any]] = {}
    for place in places:
        if path := find_file(place, CLASS_LISTS):
            text = path.read_text(encoding="utf-8-sig")
            found[path] = {"classes": [line.strip() for line in text.splitlines() if line.strip()]}
        elif path := find_file(place, ("class_dict.csv",)):
            found[path] = {"colours": read_class_table(path)}
        elif path := find_file(place, ("labelmap.txt",)):
            found[path] = {"colours": read_label_map(path)}
        elif path := find_file(place, ("_classes.csv",)):
            found[path] = {"values": read_pixel_values(path)}
    first = next(iter(found), None)
    other = next((path for path, names in found.items() if first is not None and names != found[first]), None)
    if other is not None:
        raise DataError(f"{other} names other classes than {first}. Use the same classes in all splits.")
    return found[first] if first is not None else {}


def read_class_table(path: Path) -> dict[tuple[int, ...], str]:
    """Read class_dict.csv with the columns name, r, g, b."""
    with path.open(newline="", encoding="utf-8-sig") as opened:
        rows = list(csv.DictReader(opened, skipinitialspace=True))
    try:
        return {tuple(int(row[c]) for c in "rgb"): row["name"] for row in rows}
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: requires the columns name, r, g, b with integers from 0 to 255.") from None


def read_label_map(path: Path) -> dict[tuple[int, ...], str]:
    """Read CVAT's labelmap.txt with lines name:r,g,b:parts:actions."""
    colours: dict[tuple[int, ...], str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        cells = line.rsplit(":", 3) if line.count(":") >= 3 else line.rsplit(":", 1)
        try:
            red, green, blue = (int(v) for v in cells[1].split(","))
        except (IndexError, ValueError):
            raise DataError(
                f"{path}:{number}: expected name:red,green,blue:parts:actions, not {line.strip()[:60]!r}."
            ) from None
        colours[red, green, blue] = cells[0].strip()
    return colours


def read_pixel_values(path: Path) -> dict[int, str]:
    """Read Roboflow's _classes.csv with the columns Pixel Value and Class."""
    with path.open(newline="", encoding="utf-8-sig") as opened:
        rows = [[cell.strip() for cell in row] for row in csv.reader(opened) if any(cell.strip() for cell in row)]
    try:
        return {int(row[0]): row[1] for row in rows[1:]}
    except (IndexError, ValueError):
        raise DataError(f"{path}: requires the columns Pixel Value and Class with integers from 0 to 255.") from None

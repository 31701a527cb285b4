"""Reader for Pascal VOC: Annotations/*.xml, JPEGImages and split lists in ImageSets/Main; or XML files next to images.

Coordinates are used as written by annotation tools: xmin is left, xmax is right. The original challenge counted pixels
from 1 with xmax inclusive, which differs by at most one pixel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FileEntry
from fieldguide.data.media.boxes import AnnotatedImage, FindingCollector, annotation_entry, build_raw, make_object, parse_finite
from fieldguide.data.media.images import SUPPORTED_SUFFIXES
from fieldguide.data.source import SPLIT_NAMES, Options, RawTable, list_visible, relative_path

NAME = "Pascal VOC"
UNDERSTANDS = (
    "images with boxes, Pascal VOC: a folder with Annotations (an .xml per image), JPEGImages and optionally "
    "ImageSets/Main/train.txt, val.txt, test.txt; or an .xml next to each image, optionally below train, val and test"
)
IMAGES = ("jpegimages", "images", "imgs", "image")
LISTS = {"test": "test", "val": "val", "train": "train", "trainval": "train"}  # earlier lists have priority


class DoctypeError(Exception):
    """Raised for an XML document type, which could define entities."""


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    return 9 if isinstance(source, Path) and source.is_dir() and find_layout(source) else 0


def find_layout(source: Path) -> list[tuple[Path, list[Path], str | None]]:
    """Return (XML folder, image folders, split) of every part, or an empty list if the layout does not match."""
    folders = [p for p in list_visible(source)[0] if p.is_dir()]
    if own := find_part(source, folders):
        return [(*own, None)]
    found: list[tuple[Path, list[Path], str | None]] = [
        (*own, SPLIT_NAMES[p.name.lower()])
        for p in folders
        if p.name.lower() in SPLIT_NAMES and (own := find_part(p, [f for f in list_visible(p)[0] if f.is_dir()]))
    ]
    if not found and len(folders) == 1:  # VOCdevkit/VOC2012
        return find_layout(folders[0])
    return found


def find_part(folder: Path, folders: list[Path]) -> tuple[Path, list[Path]] | None:
    """Return the XML folder and the image folders, or None if there are no annotations."""
    named = {p.name.lower(): p for p in folders}
    where = named.get("annotations", folder)
    where = where / "xmls" if (where / "xmls").is_dir() else where
    if not any(p.suffix.lower() == ".xml" for p in where.iterdir()):
        return None
    places = [named[n] for n in IMAGES if n in named]
    if where == folder and not places and not any(p.suffix.lower() in SUPPORTED_SUFFIXES for p in folder.iterdir()):
        return None
    return where, [*places, where, folder]


def load(source: Path, options: Options) -> RawTable:
    """Read all annotations and match them to images."""
    notes, shots, classes = FindingCollector(), [], set()
    files: list[FileEntry] = []
    for where, places, split in find_layout(source):
        images_by_name = {
            p.name.lower(): p
            for place in reversed(places)
            for p in list_visible(place)[0]
            if p.suffix.lower() in SUPPORTED_SUFFIXES
        }
        stems = {p.stem.lower(): p for p in images_by_name.values()}
        listed = read_lists(where.parent / "ImageSets" / "Main", source, notes, files) if split is None else {}
        xmls = {p.stem: p for p in list_visible(where)[0] if p.suffix.lower() == ".xml"}
        for stem in sorted(set(listed) - set(xmls)):
            notes.add("no-annotation", f"ImageSets/Main: {stem}", 1)
        for stem, path in xmls.items():
            place = relative_path(path, source)
            if listed and stem not in listed:
                notes.add("not-listed", place)
                continue
            content = path.read_bytes()
            files.append(annotation_entry(path, content, source))
            shot = AnnotatedImage(path.with_suffix(".jpg"), place, listed.get(stem, split))
            shots.append(shot)
            named = parse_annotation(content, shot, notes)
            image = stems.get(stem.lower()) or images_by_name.get(named.lower())
            if image is None and not shot.bad:
                notes.mark_invalid("no-picture", f"{place}: {named or stem}", shot)
            shot.path = image or shot.path
            classes |= {b["label"] for b in shot.boxes}
    return build_raw(source, shots, files, notes, sorted(classes))


def read_lists(folder: Path, source: Path, notes: FindingCollector, files: list[Any]) -> dict[str, str]:
    """Return image name -> split from the list files."""
    split: dict[str, str] = {}
    for name, part in LISTS.items():
        if (path := folder / f"{name}.txt").is_file():
            content = path.read_bytes()
            files.append(annotation_entry(path, content, source))
            try:
                lines = content.decode("utf-8-sig").splitlines()
            except UnicodeDecodeError:
                raise DataError(f"{path}: not UTF-8 text. Save it as UTF-8.") from None
            for number, line in enumerate(lines, 1):
                if line.strip() and split.setdefault(line.split()[0], part) != part and name != "trainval":
                    notes.add("listed-twice", f"{relative_path(path, source)}:{number}")
    return split


def parse_annotation(content: bytes, shot: AnnotatedImage, notes: FindingCollector) -> str:
    """Parse an annotation into the image's size and boxes, and return the file name it contains."""
    if not content.strip():
        notes.mark_invalid("empty-annotation", shot.place, shot)
        return ""
    try:
        root, lines = parse_xml(content)
    except DoctypeError:
        notes.mark_invalid("xml-doctype", shot.place, shot)
        return ""
    except (expat.ExpatError, AssertionError) as error:
        wrong = "wrong-encoding" if isinstance(error, expat.ExpatError) and error.code in ENCODING_ERRORS else "malformed-xml"
        notes.mark_invalid(wrong, f"{shot.place}:{getattr(error, 'lineno', 1)}", shot)
        return ""
    text = lambda at, path: (at.findtext(path) or "").strip()
    size = parse_finite((text(root, "size/width"), text(root, "size/height")), 2)
    shot.size = (size[0], size[1]) if size else None
    for thing in root.findall("object"):
        place, label = f"{shot.place}:{lines[thing]}", text(thing, "name")
        sides = parse_finite([text(thing, f"bndbox/{n}") for n in ("xmin", "ymin", "xmax", "ymax")], 4)
        if sides is None or not label:
            notes.mark_invalid("malformed-box", place, shot)
            continue
        left, top, right, bottom = sides
        shot.boxes.append(make_object(label, left, top, right, bottom, crowd=text(thing, "difficult") == "1"))
        shot.places.append(place)
    return text(root, "filename")


ENCODING_ERRORS = (
    expat.errors.codes[expat.errors.XML_ERROR_UNKNOWN_ENCODING],
    expat.errors.codes[expat.errors.XML_ERROR_INCORRECT_ENCODING],
    expat.errors.codes[expat.errors.XML_ERROR_INVALID_TOKEN],
)


def parse_xml(content: bytes) -> tuple[Element, dict[Element, int]]:
    """Parse XML and return the tree and the line of each element. Rejects document types, so entities are never expanded."""
    builder, lines, parser = TreeBuilder(), {}, expat.ParserCreate()

    def start(tag: str, attributes: dict[str, str]) -> None:
        lines[builder.start(tag, attributes)] = parser.CurrentLineNumber

    def refuse(*_: Any) -> None:
        raise DoctypeError

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, builder.end, builder.data
    parser.StartDoctypeDeclHandler = refuse
    parser.Parse(content, True)
    return builder.close(), lines

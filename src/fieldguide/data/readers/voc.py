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
from fieldguide.data.media.boxes import (
    AnnotatedImage,
    FindingCollector,
    annotation_entry,
    build_raw,
    make_object,
    parse_finite,
    parse_flag,
)
from fieldguide.data.media.file_names import ImageIndex, find_child, find_file, map_stems, normalize
from fieldguide.data.media.images import SUPPORTED_SUFFIXES
from fieldguide.data.source import Options, RawTable, folder_split, list_visible, relative_path

NAME = "Pascal VOC"
UNDERSTANDS = (
    "images with boxes, Pascal VOC: a folder with Annotations (an .xml per image), JPEGImages and optionally "
    "ImageSets/Main/train.txt, val.txt, test.txt; or an .xml next to each image, optionally below train, val and test"
)
ANNOTATIONS = ("annotations", "annotation", "xmls", "xml", "labels")
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
        (*own, folder_split(p.name))
        for p in folders
        if folder_split(p.name) and (own := find_part(p, [f for f in list_visible(p)[0] if f.is_dir()]))
    ]
    if not found and len(folders) == 1:  # VOCdevkit/VOC2012
        return find_layout(folders[0])
    return found


def find_part(folder: Path, folders: list[Path]) -> tuple[Path, list[Path]] | None:
    """Return the XML folder and the image folders, or None if there are no annotations."""
    named = {p.name.lower(): p for p in folders}
    candidates = [named[n] for n in ANNOTATIONS if n in named]
    candidates = [inner for p in candidates if (inner := find_child(p, ("xmls",)))] + candidates + [folder]
    where = next((p for p in candidates if any(q.suffix.lower() == ".xml" for q in p.iterdir())), None)
    if where is None:
        return None
    places = [named[n] for n in IMAGES if n in named]
    places += [p for p in folders if p != where and p not in places and map_stems(p, SUPPORTED_SUFFIXES)]
    if where == folder and not places and not any(p.suffix.lower() in SUPPORTED_SUFFIXES for p in folder.iterdir()):
        return None
    return where, [*places, where, folder]


def load(source: Path, options: Options) -> RawTable:
    """Read all annotations and match them to images."""
    notes, shots, classes = FindingCollector(), [], set()
    files: list[FileEntry] = []
    index = ImageIndex(source)
    for where, places, split in find_layout(source):
        stems = {stem: p for place in reversed(places) for stem, p in map_stems(place, SUPPORTED_SUFFIXES).items()}
        by_name = {normalize(p.name): p for p in stems.values()}
        sets = find_child(where.parent, ("imagesets",))
        listed = read_lists(find_child(sets, ("main",)) if sets else None, source, notes, files) if split is None else {}
        xmls = {p.stem: p for p in list_visible(where)[0] if p.suffix.lower() == ".xml"}
        unicode_forms = {normalize(stem): stem for stem in xmls}
        listed = {unicode_forms.get(normalize(stem), stem): part for stem, part in listed.items()}
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
            named = named.replace("\\", "/").rpartition("/")[2]
            image = stems.get(normalize(stem)) or by_name.get(normalize(named))
            image = image or (index.find(named, places) if named else None) or index.find(f"{stem}.jpg", places)
            if image is None and not shot.bad:
                notes.mark_invalid("no-picture", f"{place}: {named or stem}", shot)
            shot.path = image or shot.path
            classes |= {b["label"] for b in shot.boxes}
    return build_raw(source, shots, files, notes, sorted(classes))


def read_lists(folder: Path | None, source: Path, notes: FindingCollector, files: list[Any]) -> dict[str, str]:
    """Return image name -> split from the list files."""
    split: dict[str, str] = {}
    for name, part in LISTS.items() if folder else ():
        if folder and (path := find_file(folder, (f"{name}.txt",))):
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
        shot.boxes.append(make_object(label, left, top, right, bottom, crowd=parse_flag(text(thing, "difficult"))))
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

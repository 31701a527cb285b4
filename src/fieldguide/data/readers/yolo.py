"""Reader for YOLO: images in images/, a text file per image in labels/ with one line per box, class names in data.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FileEntry
from fieldguide.data.media.boxes import (
    AnnotatedImage,
    FindingCollector,
    annotation_entry,
    build_raw,
    decode_text,
    make_object,
    parse_finite,
)
from fieldguide.data.media.images import SUPPORTED_SUFFIXES
from fieldguide.data.source import SPLIT_NAMES, Options, RawTable, list_visible, relative_path

NAME = "YOLO"
UNDERSTANDS = (
    "images with boxes or outlines, YOLO: data.yaml with the class names, and folders images and labels, with "
    "train, val and test below or above; in labels a .txt per image with lines: class x y width height, or "
    "class and the points of an outline"
)
MAX_COORDINATE = 2.0  # maximum relative coordinate; larger values are in pixels


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path):
        return 0
    if source.is_file():
        return 9 if source.suffix.lower() in (".yaml", ".yml") else 0
    if find_description(source):
        return 9
    return 9 if any(has_labels(folder) for folder, _ in guess_folders(source)) else 0


def find_description(folder: Path) -> Path | None:
    """Return the YAML file of a folder that defines class names, or None."""
    files = [p for p in list_visible(folder)[0] if p.suffix.lower() in (".yaml", ".yml") and p.is_file()]
    files.sort(key=lambda p: (p.stem.lower() not in ("data", "dataset"), p.name))
    return next(
        (p for p in files if b"names" in p.read_bytes() and (p.stem.lower() in ("data", "dataset") or guess_folders(folder))),
        None,
    )


def guess_folders(root: Path) -> list[tuple[Path, str | None]]:
    """Return the image folders and their splits, found by the usual names."""
    parts = [p for p in list_visible(root)[0] if p.is_dir() and p.name.lower() in SPLIT_NAMES and (p / "images").is_dir()]
    if parts:
        return [(p / "images", SPLIT_NAMES[p.name.lower()]) for p in parts]
    images = root / "images"
    if not images.is_dir():
        return []
    below = [p for p in list_visible(images)[0] if p.is_dir() and folder_split(p.name)]
    return [(p, folder_split(p.name)) for p in below] or [(images, None)]


def folder_split(name: str) -> str | None:
    """Return the split of a folder name that may end with a number, or None."""
    return SPLIT_NAMES.get(name.lower().rstrip("0123456789"))


def labels_folder(folder: Path) -> Path:
    """Return the label folder of an image folder: the last `images` in the path is replaced by `labels`."""
    parts = list(folder.parts)
    for i in reversed(range(len(parts))):
        if parts[i] == "images":
            return Path(*parts[:i], "labels", *parts[i + 1 :])
    return folder


def has_labels(folder: Path) -> bool:
    """Return whether the image folder has a folder of label files."""
    labels = labels_folder(folder)
    return labels != folder and labels.is_dir() and any(p.suffix == ".txt" for p in labels.iterdir())


def load(source: Path, options: Options) -> RawTable:
    """Read a YOLO folder or its data.yaml. Raises DataError if there are no images."""
    notes = FindingCollector()
    files: list[FileEntry] = []
    root, file = (source.parent, source) if source.is_file() else (source, find_description(source))
    config = load_description(file, files, root) if file else {}
    names, given = (
        parse_class_names(config, file) if file and config else read_class_list(root, files),
        find_split_folders(config, root, file),
    )
    shots: list[AnnotatedImage] = []
    for where, split in given or guess_folders(root):
        shots += read_images(where, split, root, names, notes, files)
    if not shots:
        raise DataError(f"{source}: no images found in the configured folders or in images/.")
    return build_raw(root, shots, files, notes, list(names.values()))


def load_description(file: Path, files: list[Any], root: Path) -> dict[str, Any]:
    """Load data.yaml and add it to the manifest. Raises DataError if it is invalid or has no names."""
    content = file.read_bytes()
    files.append(annotation_entry(file, content, root))
    try:
        config = yaml.safe_load(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{file}: not UTF-8 text. Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise DataError(
            f"{file}{line}: invalid YAML ({getattr(error, 'problem', None) or error}). Correct that line."
        ) from None
    if not isinstance(config, dict) or "names" not in config:
        raise DataError(f"{file}: lacks the key `names`, the list of classes.")
    return config


def parse_class_names(config: dict[str, Any], file: Path) -> dict[int, str]:
    """Return class number -> name. Raises DataError if the names are invalid or duplicated."""
    names = config["names"]
    try:
        named = {int(k): str(v) for k, v in (names.items() if isinstance(names, dict) else enumerate(names))}
    except (TypeError, ValueError):
        raise DataError(f"{file}: `names` must be a list of classes, or a mapping from number to name.") from None
    count = config.get("nc")
    if isinstance(count, int) and count != len(named):
        raise DataError(f"{file}: nc is {count} but names lists {len(named)} classes. Correct one of them.")
    twice = sorted({n for n in named.values() if list(named.values()).count(n) > 1})
    if twice:
        raise DataError(f"{file}: several classes have the name {', '.join(map(repr, twice[:5]))}. Names must be unique.")
    return dict(sorted(named.items()))


def read_class_list(root: Path, files: list[Any]) -> dict[int, str]:
    """Return class number -> name from classes.txt. Raises DataError if it does not exist."""
    for path in (root / "classes.txt", root / "labels" / "classes.txt"):
        if path.is_file():
            content = path.read_bytes()
            files.append(annotation_entry(path, content, root))
            names = [line.strip() for line in content.decode("utf-8-sig", "replace").splitlines() if line.strip()]
            return dict(enumerate(names))
    raise DataError(
        f"{root}: the classes have no names. Add data.yaml with `names: [first, second, ...]`, or classes.txt with "
        "one name per line."
    )


def find_split_folders(config: dict[str, Any], root: Path, file: Path | None) -> list[tuple[Path, str | None]]:
    """Return the folders or image lists of each split as configured in data.yaml."""
    found: list[tuple[Path, str | None]] = []
    bases = [root / str(config["path"]), root] if config.get("path") else [root]
    for key in ("train", "val", "valid", "test"):
        value = config.get(key)
        for name in value if isinstance(value, list) else [value]:
            if not name:
                continue
            # Exported files often contain ../train/images instead of train/images.
            tries = [base / n for n in (str(name), str(name).removeprefix("../").removeprefix("./")) for base in bases]
            where = next((p for p in tries if p.exists()), None)
            if where is None:
                raise DataError(
                    f"{file}: {key} refers to {name!r}, which does not exist (expected at {tries[0]}). Correct or remove it."
                )
            where = where / "images" if (where / "images").is_dir() else where
            found.append((where, SPLIT_NAMES[key]))
    return found


def read_images(
    where: Path, split: str | None, root: Path, names: dict[int, str], notes: FindingCollector, files: list[Any]
) -> list[AnnotatedImage]:
    """Read the images of a folder or list with their labels."""
    if where.is_file():  # a list of images
        content = where.read_bytes()
        files.append(annotation_entry(where, content, root))
        lines = [line.strip() for line in content.decode("utf-8-sig", "replace").splitlines() if line.strip()]
        paths = [next((base / x for base in (where.parent, root) if (base / x).exists()), where.parent / x) for x in lines]
    else:
        paths = sorted(p for p in where.rglob("*") if p.suffix.lower() in SUPPORTED_SUFFIXES and not p.name.startswith("."))
    shots, used = [], set()
    for path in paths:
        file = labels_folder(path.parent) / f"{path.stem}.txt"
        used.add(file)
        shot = AnnotatedImage(path, relative_path(file, root), split, relative=True)
        shots.append(shot)
        if not file.is_file():
            notes.add("no-label-file", relative_path(path, root))
            continue
        content = file.read_bytes()
        files.append(annotation_entry(file, content, root))
        text = decode_text(content, shot.place, shot, notes)
        if text is not None and not text.strip():
            notes.add("empty-label-file", shot.place)
        for number, line in enumerate((text or "").splitlines(), 1):
            if line.strip():
                parse_line(line, f"{shot.place}:{number}", shot, names, notes)
    labels = labels_folder(where)
    if where.is_dir() and labels != where and labels.is_dir():
        for lone in sorted(set(labels.rglob("*.txt")) - used):
            if lone.name != "classes.txt":
                notes.add("no-picture", relative_path(lone, root), 1)
    return shots


def parse_line(line: str, place: str, shot: AnnotatedImage, names: dict[int, str], notes: FindingCollector) -> None:
    """Parse a line: class, then center and size of a box, or at least three points of an outline."""
    words = line.split()
    values = parse_finite(words, len(words))
    if (
        values is None
        or values[0] != int(values[0])
        or not (len(words) == 5 or (len(words) >= 7 and len(words) % 2))
        or max(map(abs, values[1:])) > MAX_COORDINATE
    ):
        notes.mark_invalid("malformed-line", f"{place}: {line.strip()[:40]!r}", shot)
        return
    if int(values[0]) not in names:
        notes.mark_invalid("class-beyond-names", f"{place}: {words[0]}", shot)
        return
    label, points = names[int(values[0])], values[1:]
    if len(points) == 4:
        x, y, width, height = points
        shot.boxes.append(make_object(label, x - width / 2, y - height / 2, x + width / 2, y + height / 2))
    else:
        xs, ys = points[::2], points[1::2]
        shot.boxes.append(make_object(label, min(xs), min(ys), max(xs), max(ys), [points]))
    shot.places.append(place)

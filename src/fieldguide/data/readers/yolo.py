"""Reader for YOLO: an image per .txt with one line per box, and the class names.

Layouts: folders images and labels with data.yaml; Darknet and CVAT's YOLO 1.1 (obj.names, obj.data, train.txt); and the
labels next to the images with classes.txt, as labelImg writes them. Class names are text: `no` and `off` are names too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from fieldguide.core.errors import DataError
from fieldguide.core.yaml_reader import parse_yaml
from fieldguide.data.dataset import FileEntry
from fieldguide.data.media.boxes import (
    AnnotatedImage,
    FindingCollector,
    Skeleton,
    annotation_entry,
    build_raw,
    decode_text,
    make_object,
    parse_finite,
)
from fieldguide.data.media.file_names import ImageIndex, find_child, find_file, map_stems, normalize, resolve_folder
from fieldguide.data.media.images import SUPPORTED_SUFFIXES
from fieldguide.data.source import SPLIT_NAMES, Options, RawTable, folder_split, list_visible, relative_path

NAME = "YOLO"
UNDERSTANDS = (
    "images with boxes or outlines, YOLO: data.yaml with the class names, and folders images and labels, with "
    "train, val and test below or above; in labels a .txt per image with lines: class x y width height, or "
    "class and the points of an outline; also obj.names and train.txt (Darknet, CVAT), or classes.txt with the labels next to "
    "the images"
)
MAX_COORDINATE = 2.0  # maximum relative coordinate; larger values are in pixels
CLASS_LISTS = ("classes.txt", "obj.names", "_darknet.labels")  # files with one class name per line
NO_LABELS = {"classes.txt", "train.txt", "val.txt", "valid.txt", "test.txt", "_darknet.labels", "notes.txt"}
MIN_POSES = 5  # lines that must look like keypoints
POSE_SLACK = 0.55  # distance of a keypoint from the center of its box, in widths and heights
MAX_INSPECTED_LABELS = 20  # label files that are inspected to recognize the format


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path):
        return 0
    if source.is_file():
        suffix = source.suffix.lower()
        return 9 if suffix in (".yaml", ".yml", ".names") or (suffix == ".data" and names_files(source)) else 0
    if find_description(source) or find_file(source, ("obj.names", "obj.data")):
        return 9
    return 9 if any(has_labels(folder, source) for folder, _ in guess_folders(source)) else 0


def names_files(path: Path) -> bool:
    """Return whether a .data file is that of Darknet, with lines such as `names = obj.names`; others are tables."""
    with path.open("rb") as file:
        return re.search(rb"(?m)^\s*(?:classes|names|train|valid)\s*=", file.read(4096)) is not None


def find_description(folder: Path) -> Path | None:
    """Return the YAML file of a folder that defines class names, or None."""
    files = [p for p in list_visible(folder)[0] if p.suffix.lower() in (".yaml", ".yml") and p.is_file()]
    files.sort(key=lambda p: (p.stem.lower() not in ("data", "dataset"), p.name))
    return next(
        (
            p
            for p in files
            if b"names" in p.read_bytes() and (p.stem.lower() in ("data", "dataset") or has_image_folders(folder))
        ),
        None,
    )


def has_image_folders(root: Path) -> bool:
    """Return whether there is a folder images, or one below a folder of a split."""
    return bool(
        find_child(root, ("images",))
        or any(p.is_dir() and folder_split(p.name) and find_child(p, ("images",)) for p in list_visible(root)[0])
    )


def guess_folders(root: Path) -> list[tuple[Path, str | None]]:
    """Return the image folders and their splits, found by the usual names, or by labels next to the images."""
    folders = [p for p in list_visible(root)[0] if p.is_dir()]
    parts = [(inner, folder_split(p.name)) for p in folders if folder_split(p.name) and (inner := find_child(p, ("images",)))]
    if parts:
        return parts
    if images := find_child(root, ("images",)):
        below = [p for p in list_visible(images)[0] if p.is_dir() and folder_split(p.name)]
        return [(p, folder_split(p.name)) for p in below] or [(images, None)]
    # Without class names, text files with numbers next to images may be anything.
    listed = bool(find_file(root, CLASS_LISTS) or find_description(root))
    if labels_next_to_images(root):
        return [(root, None)] if listed else []
    named = [p for p in folders if folder_split(p.name) and (listed or find_file(p, CLASS_LISTS)) and labels_next_to_images(p)]
    return [(p, folder_split(p.name)) for p in named]


def labels_next_to_images(folder: Path) -> bool:
    """Return whether the folder holds images with a text file of boxes each, and not captions."""
    images = map_stems(folder, SUPPORTED_SUFFIXES)
    texts = [p for stem, p in map_stems(folder, {".txt"}).items() if stem in images and p.name.lower() not in NO_LABELS]
    lines = [
        line
        for p in texts[:MAX_INSPECTED_LABELS]
        for line in p.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    return bool(lines) and all(len(words := line.split()) >= 5 and parse_finite(words, len(words)) for line in lines)


def labels_folder(folder: Path, root: Path) -> Path:
    """Return the label folder of an image folder: an `images` in the path, or above it, is replaced by `labels`.

    The last `images` whose replacement exists counts; without any, a folder labels in or next to the folder, or itself.
    """
    parts, first = list(folder.parts), len(root.parts)
    for i in reversed(range(first, len(parts))):
        if normalize(parts[i]) == "images":
            found: Path | None = find_child(Path(*parts[:i]), ("labels",))
            for part in parts[i + 1 :]:
                found = found and find_child(found, (normalize(part),))
            if found:
                return found
    return find_child(folder, ("labels",)) or folder


def has_labels(folder: Path, root: Path) -> bool:
    """Return whether the image folder has label files."""
    labels = labels_folder(folder, root)
    if labels == folder:
        return labels_next_to_images(folder)
    return any(p.suffix.lower() == ".txt" for p in labels.iterdir())


def load(source: Path, options: Options) -> RawTable:
    """Read a YOLO folder, its data.yaml or its obj.data. Raises DataError if there are no images."""
    notes = FindingCollector()
    files: list[FileEntry] = []
    root = source.parent if source.is_file() else source
    file = source if source.suffix.lower() in (".yaml", ".yml") and source.is_file() else find_description(root)
    config = load_description(file, files, root) if file else load_darknet(root, files)
    if file and config:
        names = parse_class_names(config, file)
    else:
        names = read_class_list(root, config, files)
    points, skeleton = parse_keypoints(config, file)
    shots: list[AnnotatedImage] = []
    index = ImageIndex(root)
    given = find_split_folders(config, root, file)
    for where, split in given or guess_folders(root) or guess_lists(root):
        shots += read_images(where, split, root, names, notes, files, index, points)
    if not shots:
        raise DataError(
            f"{source}: no images found in the configured folders or in images/. If only the labels were exported, export them "
            "with the images."
        )
    if not points:
        mark_poses(shots, notes)
    if skeleton and points == 2 * len(skeleton.names):  # without visibility; 0, 0 is a keypoint that is not labeled
        for one in (box for shot in shots for box in shot.boxes if box["keypoints"]):
            pairs = zip(one["keypoints"][::2], one["keypoints"][1::2])
            one["keypoints"] = [v for x, y in pairs for v in (x, y, 2.0 if x or y else 0.0)]
    return build_raw(root, shots, files, notes, list(names.values()), skeleton)


def load_darknet(root: Path, files: list[Any]) -> dict[str, Any]:
    """Return the keys of obj.data (classes, train, valid, names), or an empty dictionary without such a file."""
    path = find_file(root, ("obj.data",))
    if path is None:
        return {}
    content = path.read_bytes()
    files.append(annotation_entry(path, content, root))
    pairs = (line.split("=", 1) for line in content.decode("utf-8-sig", "replace").splitlines() if "=" in line)
    return {key.strip().lower(): value.strip() for key, value in pairs}


def guess_lists(root: Path) -> list[tuple[Path, str | None]]:
    """Return the lists train.txt, val.txt and test.txt with their splits."""
    listed = [p for p in list_visible(root)[0] if p.suffix.lower() == ".txt" and p.stem.lower() in SPLIT_NAMES]
    return [(p, SPLIT_NAMES[p.stem.lower()]) for p in listed]


def load_description(file: Path, files: list[Any], root: Path) -> dict[str, Any]:
    """Load data.yaml and add it to the manifest. Raises DataError if it is invalid or has no names."""
    content = file.read_bytes()
    files.append(annotation_entry(file, content, root))
    config = parse_yaml(content, file, as_text=True)  # `no` is a name
    if not isinstance(config, dict) or "names" not in config:
        raise DataError(f"{file}: lacks the key `names`, the list of classes.")
    return config


def parse_class_names(config: dict[str, Any], file: Path) -> dict[int, str]:
    """Return class number -> name. Raises DataError if the names are invalid or duplicated."""
    names = config["names"]
    if isinstance(names, str) and (listed := resolve_folder(names, [file.parent])) and listed.is_file():
        names = [line.strip() for line in listed.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    try:
        if (
            not names
            or isinstance(names, str)
            or any(not isinstance(v, str) for v in (names.values() if isinstance(names, dict) else names))
        ):
            raise TypeError
        named = {int(k): v.strip() for k, v in (names.items() if isinstance(names, dict) else enumerate(names))}
    except (TypeError, ValueError):
        raise DataError(f"{file}: `names` must be a list of classes, or a mapping from number to name.") from None
    count = str(config.get("nc", "")).strip()
    if count.isdigit() and int(count) != len(named):
        raise DataError(f"{file}: nc is {count} but names lists {len(named)} classes. Correct one of them.")
    twice = sorted({n for n in named.values() if list(named.values()).count(n) > 1})
    if twice:
        raise DataError(f"{file}: several classes have the name {', '.join(map(repr, twice[:5]))}. Names must be unique.")
    return dict(sorted(named.items()))


def parse_keypoints(config: dict[str, Any], file: Path | None) -> tuple[int, Skeleton | None]:
    """Return how many numbers follow the box in a line of keypoints, 0 if the data has none, and the keypoints.

    Raises `DataError` for a shape, a mirrored order or names that do not belong together.
    """
    shape = config.get("kpt_shape")
    if not shape:
        return 0, None
    try:
        points, values = (int(v) for v in (shape if isinstance(shape, list) else str(shape).strip("[]()").split(",")))
        if points < 1 or values not in (2, 3):
            raise ValueError
    except ValueError:
        raise DataError(f"{file}: `kpt_shape` must be [number of points, 2 or 3], but is {shape!r}.") from None
    order = config.get("flip_idx") or []
    try:
        mirrored = tuple(int(v) for v in order)
    except (TypeError, ValueError):
        mirrored = (-1,)
    if mirrored and sorted(mirrored) != list(range(points)):
        raise DataError(
            f"{file}: `flip_idx` must list each of the {points} keypoints once, from 0, in the mirrored order, but is {order!r}."
        )
    named = config.get("kpt_names")
    named = next(iter(named.values()), None) if isinstance(named, dict) else named
    names = tuple(str(n).strip() for n in named) if isinstance(named, list) else ()
    if named is not None and (len(names) != points or len(set(names)) != points):
        raise DataError(f"{file}: `kpt_names` must give each of the {points} keypoints a name of its own, but is {named!r}.")
    return points * values, Skeleton(names or tuple(f"point {i + 1}" for i in range(points)), (), mirrored)


def read_class_list(root: Path, config: dict[str, Any], files: list[Any]) -> dict[int, str]:
    """Return class number -> name from classes.txt or obj.names. Raises DataError if neither exists."""
    places = [root, *(p for p in list_visible(root)[0] if p.is_dir())]
    named = resolve_folder(config["names"], [root]) if config.get("names") else None
    path = named or next((found for place in places if (found := find_file(place, CLASS_LISTS))), None)
    if path is not None and path.is_file():
        content = path.read_bytes()
        files.append(annotation_entry(path, content, root))
        names = [line.strip() for line in content.decode("utf-8-sig", "replace").splitlines() if line.strip()]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise DataError(f"{path}: several classes have the name {', '.join(map(repr, twice[:5]))}. Names must be unique.")
        return dict(enumerate(names))
    raise DataError(
        f"{root}: the classes have no names. Add data.yaml with `names: [first, second, ...]`, or classes.txt with "
        "one name per line."
    )


def find_split_folders(config: dict[str, Any], root: Path, file: Path | None) -> list[tuple[Path, str | None]]:
    """Return the folders or image lists of each split as configured in data.yaml or obj.data."""
    found: list[tuple[Path, str | None]] = []
    own = str(config.get("path") or "").strip()
    bases = [base for base in (resolve_folder(own, [root, root.parent]) if own else None, root) if base is not None]
    for key in ("train", "val", "valid", "test"):
        value = config.get(key)
        for name in value if isinstance(value, list) else [value]:
            if not isinstance(name, str) or name.strip().lower() in ("", "null", "~", "none"):
                continue
            # Exported files often contain ../train/images instead of train/images, or a folder of another machine.
            where = resolve_folder(name, bases)
            if where is None:
                raise DataError(
                    f"{file or root}: {key} refers to {name!r}, which does not exist (expected at {bases[0] / name}). Correct or "
                    "remove it."
                )
            if where.is_dir():
                where = find_child(where, ("images",)) or where
            found.append((where, SPLIT_NAMES[key]))
    return found


def read_images(
    where: Path,
    split: str | None,
    root: Path,
    names: dict[int, str],
    notes: FindingCollector,
    files: list[Any],
    index: ImageIndex,
    points: int,
) -> list[AnnotatedImage]:
    """Read the images of a folder or list with their labels. `points` numbers follow each box in lines of keypoints."""
    if where.is_file():  # a list of images
        content = where.read_bytes()
        files.append(annotation_entry(where, content, root))
        lines = [line.strip() for line in content.decode("utf-8-sig", "replace").splitlines() if line.strip()]
        paths = [index.find(line, (where.parent, root)) or where.parent / line for line in lines]
    else:
        paths = sorted(p for p in where.rglob("*") if p.suffix.lower() in SUPPORTED_SUFFIXES and not p.name.startswith("."))
    shots, used = [], set()
    labels: dict[Path, tuple[Path, dict[str, Path]]] = {}  # image folder -> label folder and its files
    for path in paths:
        if path.parent not in labels:
            folder = labels_folder(path.parent, root)
            labels[path.parent] = folder, map_stems(folder, {".txt"})
        folder, texts = labels[path.parent]
        file = texts.get(normalize(path.stem), folder / f"{path.stem}.txt")
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
                parse_line(line, f"{shot.place}:{number}", shot, names, notes, points)
    every = labels_folder(where, root) if where.is_dir() else where
    if where.is_dir():
        for lone in sorted({p for p in every.rglob("*") if p.suffix.lower() == ".txt"} - used):
            if lone.name.lower() not in NO_LABELS and not lone.name.lower().startswith("readme"):
                notes.add("no-picture", relative_path(lone, root), 1)
    return shots


def parse_line(
    line: str, place: str, shot: AnnotatedImage, names: dict[int, str], notes: FindingCollector, points: int = 0
) -> None:
    """Parse a line: class, then center and size of a box, or at least three points of an outline, or a box and keypoints."""
    words = line.split()
    values = parse_finite(words, len(words))
    keypoints: list[float] | None = None
    if values is not None and points and len(words) == 5 + points:
        words, values, keypoints = words[:5], values[:5], values[5:]
    elif values is not None and not points and looks_like_pose(values):
        notes.mark_invalid("pose-line", f"{place}: {line.strip()[:40]!r}", shot)
        return
    if (
        values is None
        or values[0] != int(values[0])
        or not (len(words) == 5 or (len(words) >= 7 and len(words) % 2 and not points))
        or max(map(abs, values[1:])) > MAX_COORDINATE
    ):
        notes.mark_invalid("malformed-line", f"{place}: {line.strip()[:40]!r}", shot)
        return
    if int(values[0]) not in names:
        notes.mark_invalid("class-beyond-names", f"{place}: {words[0]}", shot)
        return
    label, numbers = names[int(values[0])], values[1:]
    if len(numbers) == 4:
        x, y, width, height = numbers
        sides = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        shot.boxes.append(make_object(label, *sides, keypoints=keypoints))
    else:
        xs, ys = numbers[::2], numbers[1::2]
        shot.boxes.append(make_object(label, min(xs), min(ys), max(xs), max(ys), [numbers]))
    shot.places.append(place)


def mark_poses(shots: list[AnnotatedImage], notes: FindingCollector) -> None:
    """Mark images whose outlines are keypoints: all lines have a box and equally many points, which lie in it."""
    lines = [(s, place, box["outline"][0]) for s in shots for place, box in zip(s.places, s.boxes) if box["outline"]]
    if len(lines) < MIN_POSES or len({len(values) for _, _, values in lines}) > 1 or len(lines[0][2]) <= 8:
        return
    if any(all(has_points_in_box(values, step) for _, _, values in lines) for step in (2, 3)):
        for shot, place, _ in lines:
            notes.mark_invalid("pose-line", place, shot)


def has_points_in_box(values: list[float], step: int) -> bool:
    """Return whether a line without its class is a box and points in it, each with `step` values; points at 0, 0 are unknown."""
    x, y, width, height = values[:4]
    rest = np.array(values[4:])
    if len(rest) % step or not len(rest):
        return False
    points = rest.reshape(-1, step)
    if step == 3 and not np.isin(points[:, 2], (0, 1, 2)).all():
        return False
    seen = points[points[:, :2].any(1), :2]
    inside = np.abs(seen - (x, y)) <= np.array((width, height)) * POSE_SLACK
    return bool(len(seen)) and bool(inside.all())


def looks_like_pose(values: list[float]) -> bool:
    """Return whether a line is a box followed by points x y visibility: visibility is 0, 1 or 2, and not always the same 0 or 1
    that the corners of an outline could have.
    """
    if len(values) < 8 or (len(values) - 5) % 3:
        return False
    seen = set(values[7::3])
    return seen <= {0.0, 1.0, 2.0} and (2.0 in seen or len(values) > 11)

"""Tables with boxes, converted to one row per image with its objects.

Read are the columns of Hugging Face data sets: `objects` as an object of lists (`bbox`, `categories`) or a list of objects, also
written as JSON in a CSV or as the columns `objects.bbox` and `objects.categories`; and tables with one row per box (`filename`,
`class`, `xmin`, `ymin`, `xmax`, `ymax`). A box is left, top, width and height, unless this leads out of the images and corners do not.
Names of numbered classes come from the features in the Parquet file, dataset_info.json, dataset_infos.json or README.md.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.core.validation import parse_json
from fieldguide.core.yaml_reader import parse_yaml
from fieldguide.data.caption_lists import find_image_column
from fieldguide.data.column_spec import normalize_name
from fieldguide.data.dataset import BOOKKEEPING, FILE, LINE, Finding
from fieldguide.data.media.boxes import (
    AnnotatedImage,
    FindingCollector,
    are_corners,
    build_raw,
    make_object,
    parse_finite,
    parse_flag,
)
from fieldguide.data.readers.coco import bounding_box, parse_box, parse_outline
from fieldguide.data.source import RawTable, list_visible

OBJECTS = "objects"  # name of the column that results
BOX_NAMES = ("bbox", "bboxes", "boxes", "box")
CLASS_NAMES = ("category", "categories", "label", "labels", "class", "classes", "name", "names", "classname", "categoryname")
CLASS_IDS = ("categoryid", "categoryids", "classid", "classids", "labelid", "labelids", "classlabel", "classlabels")
OUTLINE_NAMES = ("segmentation", "segmentations")
CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom"))
SAMPLED_ROWS = 200
README_BYTES = 1 << 18


def convert_objects(raw: RawTable, target: str | None, names: Sequence[str], target_kind: str | None) -> RawTable:
    """Return a table with boxes as one row per image, and any other table unchanged. Raises DataError if no image is usable.

    `names` are the columns of a trained model; `target_kind` is the type of the target that the task requires.
    """
    other = target not in (None, OBJECTS) or target_kind not in (None, "boxes", "mask") or "boxes" in raw.kinds.values()
    image = None if other or (names and OBJECTS not in names) else find_image_column(raw.rows, raw.kinds)
    if image is None:
        return raw
    found = find_objects(raw.rows) or find_rows_of_boxes(raw.rows)
    if found is None:
        if "image" in names and "image" not in raw.rows.columns:  # images to predict
            raw.rows = raw.rows.rename({image: "image"})
            raw.kinds = {**raw.kinds, "image": "image"}
        return raw
    notes, shots = FindingCollector(), dict[Path, AnnotatedImage]()
    objects = found[1]
    classes = read_class_names(raw, found[0])
    paths = [resolve(raw, v) for v in raw.rows[image].to_list()]
    boxes = [(p, *parse_object_box(one)) for p, listed in zip(paths, objects) if p for one in listed or ()]
    corners = are_corners([(path, box) for path, box, certain in boxes if box and not certain])
    for i, (path, listed) in enumerate(zip(paths, objects)):
        place = locate(raw, i)
        split = None if raw.splits is None else str(raw.splits[i])
        shot = AnnotatedImage(path or raw.root / place, place, split)
        if path is None:
            notes.mark_invalid("no-picture", place, shot)
        shot = shots.setdefault(shot.path, shot)
        if listed is None:
            notes.mark_invalid("malformed-box", place, shot)
        for number, one in enumerate(listed or ()):
            add_object(one, f"{place}: object {number}", shot, notes, classes, corners)
    labels = sorted({b["label"] for s in shots.values() for b in s.boxes}, key=lambda v: (len(v) if v.isdigit() else 0, v))
    known = list(dict.fromkeys(classes.values()))
    files = [replace(f, rows=0) for f in raw.files]
    built = build_raw(raw.root, list(shots.values()), files, notes, [*known, *(v for v in labels if v not in known)])
    if classes == {} and labels and all(v.isdigit() for v in labels):
        what = f"the classes of {found[0]!r} are numbers without names"
        remedy = "Add their names to dataset_info.json, or write them in the column."
        built.findings.append(Finding("class-numbers", "note", what, (f"column {found[0]!r}",), 1, remedy))
    built.findings[:0] = raw.findings
    built.unusable += raw.unusable
    built.boundary = raw.boundary
    return built


def check_embedded(rows: pl.DataFrame) -> None:
    """Raise DataError for a column that holds the content of images or recordings, as in data sets of Hugging Face."""
    for name, kind in rows.schema.items():
        inner = {f.name: f.dtype for f in kind.fields} if isinstance(kind, pl.Struct) else {}
        if inner.get("bytes") == pl.Binary or (kind == pl.Binary and normalize_name(name) in ("image", "img", "audio", "mask")):
            raise DataError(
                f"column {name!r} holds the content of files, which is not read from tables. Save each as a file, and name them in "
                "a column file_name."
            )


def find_objects(rows: pl.DataFrame) -> tuple[str, list[list[dict[str, Any]] | None]] | None:
    """Return the name of the columns with objects, and the objects of each row (None if malformed); None without such columns."""
    for name, kind in rows.schema.items():
        if name in BOOKKEEPING:
            continue
        values = rows[name]
        if kind == pl.String:
            some = values.drop_nulls().head(SAMPLED_ROWS).to_list()
            if not some or not all(v.lstrip().startswith(("[", "{")) for v in some) or not any("box" in v for v in some):
                continue
            parsed = [parse_text(v) if v else [] for v in values.to_list()]
        elif isinstance(kind, pl.Struct) or (isinstance(kind, pl.List) and isinstance(kind.inner, pl.Struct)):
            parsed = values.to_list()
        else:
            continue
        listed = [split_objects(v) for v in parsed]
        if any(one is not None and any(find_key(o, BOX_NAMES) for o in one) for one in listed):
            return name, listed
    return find_columns(rows)


def find_columns(rows: pl.DataFrame) -> tuple[str, list[list[dict[str, Any]] | None]] | None:
    """Return objects in columns such as `objects.bbox` and `objects.categories`, or `bboxes` and `labels`."""
    for name, kind in rows.schema.items():
        prefix, _, last = name.rpartition(".")
        if normalize_name(last) not in BOX_NAMES or not isinstance(kind, pl.List | pl.Array) or not kind.inner.is_nested():
            continue
        same = [c for c in rows.columns if c.rpartition(".")[0] == prefix and c not in BOOKKEEPING]
        lists = {c.rpartition(".")[2]: rows[c].to_list() for c in same if isinstance(rows.schema[c], pl.List | pl.Array)}
        if not find_key(lists, CLASS_NAMES + CLASS_IDS):
            continue
        parts = [{key: values[i] for key, values in lists.items()} for i in range(rows.height)]
        return prefix or name, [split_objects(p) for p in parts]
    return None


def find_rows_of_boxes(rows: pl.DataFrame) -> tuple[str, list[list[dict[str, Any]] | None]] | None:
    """Return the objects of a table with one box per row: four columns of corners and one with the class."""
    names = {normalize_name(c).replace("_", "").replace("bbox", ""): c for c in rows.columns if c not in BOOKKEEPING}
    sides = next((s for s in CORNERS if all(n in names for n in s)), None)
    label = next((names[n] for n in CLASS_NAMES + CLASS_IDS if n in names), None)
    if sides is None or label is None:
        return None
    out: list[list[dict[str, Any]] | None] = []
    for row in rows.select(label, *(names[s] for s in sides)).rows():
        empty = all(v is None or v == "" for v in row[1:])  # an image without objects
        out.append([] if empty else [{"corners": row[1:], "category": row[0]}])
    return label, out


def parse_text(text: str) -> Any:
    """Return the value of JSON text, or None if it is invalid."""
    try:
        return parse_json(text, "objects", expect=object)
    except DataError:
        return None


def split_objects(value: Any) -> list[dict[str, Any]] | None:
    """Return the objects of a list of them, or of an object of lists; None if the lists differ in length."""
    if isinstance(value, list):
        return value if all(isinstance(v, dict) for v in value) else None
    if not isinstance(value, dict):
        return None
    lists = {key: [] if v is None else v for key, v in value.items() if isinstance(v, list) or v is None}
    box = find_key(lists, BOX_NAMES)
    if box is None:
        return None
    count = len(lists[box])
    needed = [k for k in lists if normalize(k) in CLASS_NAMES + CLASS_IDS]
    if any(len(lists[k]) != count for k in needed if lists[k] or count):
        return None
    return [{key: values[i] for key, values in lists.items() if len(values) == count} for i in range(count)]


def normalize(key: str) -> str:
    """Return a key in lower case without underscores."""
    return normalize_name(key).replace("_", "")


def find_key(one: Any, names: Sequence[str]) -> str | None:
    """Return the first key of an object with one of these names."""
    keys = {normalize(k): k for k in reversed(list(one))} if isinstance(one, Mapping) else {}
    return next((keys[n] for n in names if n in keys), None)


def parse_object_box(one: Any) -> tuple[list[float] | None, bool]:
    """Return the four numbers of a box, and whether they are corners for certain."""
    if not isinstance(one, Mapping):
        return None, False
    if "corners" in one:
        return parse_finite(one["corners"], 4), True
    box = one.get(find_key(one, BOX_NAMES) or "")
    if isinstance(box, dict):
        keys = {normalize(k): k for k in box}
        for sides in CORNERS:
            if all(s in keys for s in sides):
                return parse_finite([box[keys[s]] for s in sides], 4), True
    return parse_box(box), False


def add_object(
    one: Any, place: str, shot: AnnotatedImage, notes: FindingCollector, classes: Mapping[int, str], corners: bool
) -> None:
    """Add an object to an image."""
    values, certain = parse_object_box(one)
    texts = [k for k in one if normalize(k) in CLASS_NAMES and isinstance(one[k], str)] if isinstance(one, Mapping) else []
    key = next(iter(texts), None) or find_key(one, CLASS_NAMES + CLASS_IDS)
    category = one.get(key) if key else None
    outline, runs, valid = (
        parse_outline(one.get(find_key(one, OUTLINE_NAMES) or ""), None) if isinstance(one, Mapping) else (None,) * 3
    )
    if values is None and outline:
        values, certain = bounding_box(outline), False
    if isinstance(category, float) and category.is_integer():
        category = int(category)
    number = int(category) if isinstance(category, int) or (isinstance(category, str) and category.strip().isdigit()) else None
    label = classes.get(number, "") if number is not None and classes else str(category if category is not None else "").strip()
    if number is not None and classes and not label:
        notes.mark_invalid("class-beyond-names", f"{place}: {category}", shot)
        return
    if values is None or not label or isinstance(category, bool | list | dict):
        notes.mark_invalid("malformed-box", place, shot)
        return
    left, top, right, bottom = values
    if not (certain or corners):
        right, bottom = left + right, top + bottom
    elif corners:
        notes.add("box-corners", place)
    crowd = parse_flag(one.get("iscrowd", one.get("is_crowd")))
    shot.boxes.append(make_object(label, left, top, right, bottom, outline, crowd, runs))
    shot.places.append(place)
    if not valid:
        notes.add("malformed-outline", place)


def resolve(raw: RawTable, value: Any) -> Path | None:
    """Return the path of an image that a table names, or None."""
    return raw.root / value if isinstance(value, str) and value else None


def locate(raw: RawTable, row: int) -> str:
    """Return the file and line of a row, for messages."""
    file = raw.files[raw.rows[FILE][row]].path if FILE in raw.rows.columns else str(raw.root)
    return f"{file}:{raw.rows[LINE][row]}" if LINE in raw.rows.columns else file


# Names of classes


def read_class_names(raw: RawTable, column: str) -> dict[int, str]:
    """Return class number -> name from the features of the data set; empty without them.

    Raises DataError if the features of several files name different classes.
    """
    found: dict[int, str] = {}
    for file in raw.files:
        path = raw.root / file.path
        if path.suffix.lower() in (".parquet", ".pq"):
            described = parse_text(pl.read_parquet_metadata(io.BytesIO(path.read_bytes())).get("huggingface", ""))
            names = find_names(described, column)
            if found and names and names != found:
                raise DataError(f"{path} names other classes than the files before it. Use the same classes in all files.")
            found = found or names
    places = dict.fromkeys([raw.root, *((raw.root / file.path).parent for file in raw.files)])
    for path in (p for place in places if place.is_dir() for p in list_visible(place)[0] if not found):
        if path.name.lower() in ("dataset_info.json", "dataset_infos.json"):
            found = find_names(parse_json(path.read_bytes().decode("utf-8-sig", "replace"), path, expect=object), column)
        elif path.name.lower() == "readme.md":
            parts = path.read_bytes()[:README_BYTES].decode("utf-8-sig", "replace").split("---\n", 2)
            found = (
                find_names(parse_yaml(parts[1], path, as_text=True), column) if len(parts) == 3 and not parts[0].strip() else {}
            )
    return found


def find_names(value: Any, column: str, inside: bool = False) -> dict[int, str]:
    """Return the names of the class label of a column anywhere in the features of a data set."""
    if isinstance(value, list):
        return next((names for v in value if (names := find_names(v, column, inside))), {})
    if not isinstance(value, dict):
        return {}
    inside = inside or value.get("name") == column
    listed = value.get("names")
    if inside and isinstance(listed, list | dict) and listed:
        pairs = listed.items() if isinstance(listed, dict) else enumerate(listed)
        return {int(k): str(v) for k, v in pairs if str(k).isdigit()}
    return next((found for k, v in value.items() if (found := find_names(v, column, inside or k == column))), {})

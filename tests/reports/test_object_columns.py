"""Boxes in the columns of a table: the `objects` of Hugging Face data sets, and tables with one row per box."""

from __future__ import annotations

import io
import json

import numpy as np
import polars as pl
import pytest
from PIL import Image

import fieldguide
from fieldguide.core.errors import DataError
from fieldguide.data import read
from fieldguide.inference.run import open_run

WIDTH, HEIGHT = 40, 30
BOXES = [[[1, 2, 10, 5], [20, 10, 8.5, 16]], [[0, 0, 40, 30]], [], [[5, 5, 5, 5]]]  # left, top, width, height
LABELS = [["cat", "dog"], ["dog"], [], ["cat"]]
EXPECTED = [[("cat", 1, 2, 11, 7), ("dog", 20, 10, 28.5, 26)], [("dog", 0, 0, 40, 30)], [], [("cat", 5, 5, 10, 10)]]


def pictures(folder, count=4):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i + len(str(folder))).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"img_{i}.png")
    return folder


def boxes(data):
    found = {
        path.rsplit("/", 1)[1]: [(o["label"], *(round(o[s], 3) for s in ("left", "top", "right", "bottom"))) for o in objects]
        for path, objects in zip(data.rows["image"].to_list(), data.rows["objects"].to_list())
    }
    return [found.get(f"img_{i}.png") for i in range(4)]


def write(folder, objects, name="metadata.jsonl", key="objects"):
    """Write a table of images with their objects."""
    rows = [{"file_name": f"img_{i}.png", "width": WIDTH, key: value} for i, value in enumerate(objects)]
    if name.endswith(".parquet"):
        pl.DataFrame(rows, infer_schema_length=None, strict=False).write_parquet(folder / name)
    elif name.endswith(".csv"):
        pl.DataFrame([{**r, key: json.dumps(r[key])} for r in rows]).write_csv(folder / name)
    else:
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder


def lists(box="bbox", label="categories", labels=LABELS, given=BOXES, **more):
    return [
        {"id": list(range(len(b))), "area": [float(w * h) for _, _, w, h in b], box: b, label: c} | more
        for b, c in zip(given, labels)
    ]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.parquet", "metadata.csv"])
@pytest.mark.parametrize("place", ["", "train"])
@pytest.mark.parametrize(
    ("key", "objects"),
    [
        ("objects", lists()),
        ("annotations", lists("bboxes", "label")),
        ("objects", [[{"bbox": b, "category": c} for b, c in zip(*pair)] for pair in zip(BOXES, LABELS)]),
        (
            "objects",
            [
                [{"bbox": dict(zip(("x", "y", "width", "height"), b)), "class": c, "iscrowd": 0} for b, c in zip(*pair)]
                for pair in zip(BOXES, LABELS)
            ],
        ),
    ],
)
def test_objects_of_images(tmp_path, name, place, key, objects):
    data = read(write(pictures(tmp_path / place), objects, name, key))
    assert boxes(data) == EXPECTED and data.target.name == "objects" and data.target.kind == "boxes"


def test_objects_in_splits_and_columns_of_their_own(tmp_path):
    for split in ("train", "validation"):
        folder = pictures(tmp_path / split)
        rows = [{"file_name": f"img_{i}.png", "bboxes": b, "labels": c} for i, (b, c) in enumerate(zip(BOXES, LABELS))]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = read(tmp_path)
    assert list(data.splits) == ["train"] * 4 + ["val"] * 4
    assert boxes(data) == EXPECTED


@pytest.mark.parametrize("where", ["parquet", "dataset_info.json", "README.md", "none"])
def test_names_of_numbered_classes(tmp_path, where):
    numbers = [[["dog", "cat"].index(c) for c in row] for row in LABELS]
    folder = pictures(tmp_path)
    label = {"names": ["dog", "cat", "cow"], "_type": "ClassLabel"}
    other = {"names": ["wrong"], "_type": "ClassLabel"}
    features = {
        "scene": other,
        "objects": {"feature": {"bbox": {"_type": "Sequence"}, "categories": label}, "_type": "Sequence"},
    }
    if where == "parquet":
        rows = [{"file_name": f"img_{i}.png", "objects": o} for i, o in enumerate(lists(labels=numbers))]
        table = pl.DataFrame(rows, infer_schema_length=None, strict=False)
        table.write_parquet(folder / "data.parquet", metadata={"huggingface": json.dumps({"info": {"features": features}})})
    else:
        write(folder, lists(labels=numbers))
    if where == "dataset_info.json":
        (folder / where).write_text(json.dumps({"features": features}))
    if where == "README.md":
        (folder / where).write_text(
            "---\nlicense: mit\ndataset_info:\n  features:\n  - name: scene\n    dtype:\n      class_label:\n        names:\n"
            "          '0': wrong\n  - name: objects\n    sequence:\n    - name: categories\n      dtype:\n        class_label:\n"
            "          names:\n            '0': dog\n            '1': cat\n            '2': cow\n---\n# Data\n"
        )
    data = read(folder)
    if where == "none":
        assert data.context["classes"] == ["0", "1"] and "class-numbers" in {f.check for f in data.findings}
    else:
        assert boxes(data) == EXPECTED and data.context["classes"] == ["dog", "cat", "cow"]


def test_number_without_a_name_is_reported(tmp_path):
    write(pictures(tmp_path), lists(labels=[[0, 1], [1], [], [7]]))
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"features": {"objects": {"categories": {"names": ["cat", "dog"]}}}})
    )
    with pytest.raises(DataError, match=r"class number has no name.*metadata.jsonl:4: object 0: 7"):
        read(tmp_path)


def test_text_has_priority_over_numbers(tmp_path):
    objects = [{**o, "category_id": [1] * len(o["bbox"])} for o in lists("bbox", "category")]
    assert boxes(read(write(pictures(tmp_path), objects))) == EXPECTED


CORNERS = [[[x, y, x + w, y + h] for x, y, w, h in row] for row in BOXES]


def test_corners_are_recognized(tmp_path):
    data = read(write(pictures(tmp_path), lists(given=CORNERS)))
    assert boxes(data) == EXPECTED and "box-corners" in {f.check for f in data.findings}


def test_boxes_that_fit_both_ways_are_left_top_width_height(tmp_path):
    data = read(write(pictures(tmp_path), [{"bbox": [[1, 2, 10, 5]], "category": ["cat"]}] * 4))
    assert boxes(data)[0] == [("cat", 1, 2, 11, 7)] and "box-corners" not in {f.check for f in data.findings}


def test_fractions(tmp_path):
    parts = [[[x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT] for x, y, w, h in row] for row in BOXES]
    assert boxes(read(write(pictures(tmp_path), lists(given=parts)))) == EXPECTED


@pytest.mark.parametrize(
    "wrong",
    [
        {"bbox": [[1, 2, 3]], "categories": ["cat"]},
        {"bbox": [[1, 2, 3, 4]], "categories": []},
        {"bbox": [[1, 2, 3, 4]], "categories": ["cat", "dog"]},
        {"bbox": [[1, 2, 3, None]], "categories": ["cat"]},
        {"bbox": [[1, 2, 3, 4]], "categories": [None]},
    ],
)
def test_malformed_objects_are_named(tmp_path, wrong):
    write(pictures(tmp_path), [*lists()[:3], wrong])
    with pytest.raises(DataError, match=r"invalid coordinates or without a class \(metadata.jsonl:4"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("header", "sides"),
    [
        ("filename,width,height,class,xmin,ymin,xmax,ymax", "40,30,{c},{x},{y},{r},{b}"),  # TensorFlow
        ("image,x1,y1,x2,y2,label", "{x},{y},{r},{b},{c}"),
        ("file_name;x_min;y_min;x_max;y_max;class_name", "{x};{y};{r};{b};{c}"),
    ],
)
def test_one_row_per_box(tmp_path, header, sides):
    mark = ";" if ";" in header else ","
    lines = [
        f"img_{i}.png{mark}" + sides.format(x=x, y=y, r=x + w, b=y + h, c=c)
        for i, row in enumerate(zip(BOXES, LABELS))
        for (x, y, w, h), c in zip(*row)
    ]
    empty = "img_2.png" + mark * header.count(mark)
    (pictures(tmp_path) / "_annotations.csv").write_text("\n".join([header, *lines, empty]) + "\n")
    assert boxes(read(tmp_path)) == EXPECTED
    assert boxes(read(tmp_path / "_annotations.csv")) == EXPECTED


def test_another_target_leaves_the_table_as_it_is(tmp_path):
    rows = [{"file_name": f"img_{i}.png", "objects": o, "scene": "ab"[i % 2]} for i, o in enumerate(lists())]
    (pictures(tmp_path) / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(tmp_path, target="scene").target.name == "scene"


def test_embedded_images_are_named(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    rows = [{"image": {"bytes": file.getvalue(), "path": f"{i}.png"}, "label": i % 2} for i in range(4)]
    pl.DataFrame(rows).write_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"column 'image' holds the content of files.*file_name"):
        read(tmp_path)


def test_objects_are_trained_on_and_predicted(tmp_path):
    folder = pictures(tmp_path / "data", 12)
    objects = [{"bbox": [[i, 2, 10, 12]], "categories": ["cat"]} for i in range(12)]
    write(folder, objects)
    run = fieldguide.fit(folder, model="yolov8-test", out=tmp_path / "run", settings={"steps": 2, "precision": "float32"})
    assert run.record["task"] == "object-detection"
    loaded = open_run(tmp_path / "run")
    assert len(loaded.predict(str(folder))) == len(loaded.predict(str(folder / "metadata.jsonl"))) == 12
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f"img_{i}.png"}) for i in range(5)))
    assert len(loaded.predict(str(folder / "metadata.jsonl"))) == 5

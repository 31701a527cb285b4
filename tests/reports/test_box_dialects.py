"""Boxes in the dialects of annotation tools: ids, flags, names, paths, folders, and splits that cannot be scored."""

from __future__ import annotations

import base64
import io
import json
import unicodedata

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import fieldguide
from fieldguide.automl.build_plan import build_plan
from fieldguide.automl.callbacks import NullCallback
from fieldguide.cli.commands import app
from fieldguide.core.errors import DataError
from fieldguide.data import read
from fieldguide.data.media.masks import encode_run_lengths, object_mask
from fieldguide.inference.run import open_run
from fieldguide.tasks.vision.object_detection import ObjectDetection

WIDTH, HEIGHT = 40, 30
LINE = "{} 0.5 0.5 0.25 0.2"  # a box of 10 x 6 pixels from (15, 12)


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path


def boxes(data):
    """Return the name of each image -> its boxes (label, left, top, right, bottom)."""
    return {
        path.rsplit("/", 1)[1]: [(o["label"], *(round(o[s], 3) for s in ("left", "top", "right", "bottom"))) for o in objects]
        for path, objects in zip(data.rows["image"].to_list(), data.rows["objects"].to_list())
    }


def coco(root, ids=(1, 2), category=7, image_ids=None, names=("a.png", "b.png"), folder="images", **more):
    """Write a COCO folder with one box in each of two images."""
    for seed, name in enumerate(("a.png", "b.png")):
        picture(root / folder / name, seed)
    write(
        root / "annotations/instances.json",
        {
            "images": [{"id": i, "file_name": n, "width": WIDTH, "height": HEIGHT} for i, n in zip(ids, names)],
            "categories": [{"id": 7, "name": "cat"}, {"id": "8", "name": "dog"}],
            "annotations": [
                {"id": k, "image_id": i, "category_id": category, "bbox": [k, 2, 10, 5], **more}
                for k, i in enumerate(image_ids or ids)
            ],
        },
    )
    return root


# COCO


@pytest.mark.parametrize(
    ("ids", "image_ids", "category"),
    [
        ((1, 2), (1.0, 2.0), 7.0),
        ((1, 2), ("1", "2"), "7"),
        (("000001", "000002"), (1, 2), "7.0"),
        ((1.0, "2"), ("1.0", 2), 7),
        (("img a", "img b"), ("img a", "img b "), " 7"),
        ((900100000001, 900100000002), ("900100000001", 900100000002.0), 7),
    ],
)
def test_ids_of_mixed_types(tmp_path, ids, image_ids, category):
    data = read(coco(tmp_path, ids, category, image_ids))
    assert boxes(data) == {"a.png": [("cat", 0, 2, 10, 7)], "b.png": [("cat", 1, 2, 11, 7)]}


@pytest.mark.parametrize(
    ("value", "crowd"), [("0", False), (0.0, False), ("false", False), ("", False), (None, False), ("1", True), (True, True)]
)
def test_crowd_flags(tmp_path, value, crowd):
    data = read(coco(tmp_path, iscrowd=value))
    assert [o["crowd"] for row in data.rows["objects"].to_list() for o in row] == [crowd] * 2


@pytest.mark.parametrize(
    "box",
    [
        ["5", "2.0", "10", "5"],
        "[5, 2, 10, 5]",
        {"x": 5, "y": 2, "width": 10, "height": 5},
        {"left": "5", "top": 2, "w": 10, "h": 5},
    ],
)
def test_numbers_as_text_and_boxes_as_objects(tmp_path, box):
    assert boxes(read(coco(tmp_path, bbox=box)))["a.png"] == [("cat", 5, 2, 15, 7)]


def rewrite(root, annotations):
    path = root / "annotations/instances.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": annotations}))
    return root


def test_corners_in_coco(tmp_path):
    coco(tmp_path)
    found = [{"id": i, "image_id": 1 + i % 2, "category_id": 7, "bbox": [20 + i, 15, 38, 28]} for i in range(4)]
    data = read(rewrite(tmp_path, found))
    assert boxes(data)["a.png"] == [("cat", 20, 15, 38, 28), ("cat", 22, 15, 38, 28)]
    assert next(f.count for f in data.findings if f.check == "box-corners") == 4
    found[0]["bbox"] = [30, 20, 10, 5]  # fits only as left, top, width, height
    data = read(rewrite(tmp_path, found))
    assert boxes(data)["a.png"][0] == ("cat", 30, 20, 40, 25) and "box-over-edge" in {f.check for f in data.findings}


def test_fractions_in_coco_and_voc(tmp_path):
    """They used to be boxes within the first pixel, which scored 0."""
    coco(tmp_path / "coco")
    found = [{"id": i, "image_id": i, "category_id": 7, "bbox": [0.1 * i, 0.5, 0.25, 0.5]} for i in (1, 2)]
    data = read(rewrite(tmp_path / "coco", found))
    assert boxes(data) == {"a.png": [("cat", 4, 15, 14, 30)], "b.png": [("cat", 8, 15, 18, 30)]}
    assert "box-fractions" in {f.check for f in data.findings}
    picture(tmp_path / "voc/a.png")
    voc(tmp_path / "voc/a.xml", "a.png")
    text = (tmp_path / "voc/a.xml").read_text()
    for pixels, part in ((">5<", ">0.125<"), (">2<", ">0.1<"), (">15<", ">0.375<"), (">7<", ">0.5<")):
        text = text.replace(pixels, part)
    (tmp_path / "voc/a.xml").write_text(text)
    assert boxes(read(tmp_path / "voc")) == {"a.png": [("cat", 5, 3, 15, 15)]}


@pytest.mark.parametrize("box", [None, [], [0, 0, 0, 0], "missing"])
def test_boxes_of_run_lengths(tmp_path, box):
    coco(tmp_path)
    inside = np.zeros((HEIGHT, WIDTH), dtype=bool)
    inside[5:12, 3:12] = RING
    tall = np.zeros((HEIGHT, WIDTH), dtype=bool)
    tall[20:, 6] = tall[:4, 7] = True  # one run over two columns
    found = [
        {
            "id": i,
            "image_id": i,
            "category_id": 7,
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": encode_run_lengths(mask)},
        }
        for i, mask in ((1, inside), (2, tall))
    ]
    data = read(rewrite(tmp_path, found if box == "missing" else [{**f, "bbox": box} for f in found]))
    assert boxes(data) == {"a.png": [("cat", 3, 5, 11, 12)], "b.png": [("cat", 6, 0, 8, 30)]}


def test_outline_without_the_list_of_parts(tmp_path):
    data = read(coco(tmp_path, bbox=None, segmentation=["1", 2, 11, 2, 11, 8.0]))
    assert boxes(data)["a.png"] == [("cat", 1, 2, 11, 8)]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("images\\a.png", "images"),
        ("C:\\Users\\me\\project\\images\\a.png", "images"),
        ("/home/me/a.png", "Images"),
        ("A.PNG", "images"),
        ("a.jpg", "images"),  # converted after annotating
        ("./a.png", "deep/down/Pictures"),
    ],
)
def test_paths_of_other_machines(tmp_path, name, folder):
    data = read(coco(tmp_path, names=(name, name.replace("a.", "b.").replace("A.", "B.")), folder=folder))
    assert {n: len(b) for n, b in boxes(data).items()} == {"a.png": 1, "b.png": 1}


def test_unicode_forms_of_file_names(tmp_path):
    coco(tmp_path, names=(unicodedata.normalize("NFD", "café.png"), "b.png"))
    (tmp_path / "images/a.png").rename(tmp_path / "images" / unicodedata.normalize("NFC", "café.png"))
    assert len(boxes(read(tmp_path))[unicodedata.normalize("NFC", "café.png")]) == 1


def test_missing_image_names_the_file(tmp_path):
    with pytest.raises(DataError, match=r"images? files that do not exist.*c\.png"):
        read(coco(tmp_path, names=("a.png", "c.png")))


# YOLO


def yolo(root, yaml, lines=("0 0.5 0.5 0.25 0.2", "1 0.5 0.5 0.25 0.2"), images="images", labels="labels", suffix=".txt"):
    for seed, (name, line) in enumerate(zip("ab", lines)):
        picture(root / images / f"{name}.png", seed)
        write(root / labels / f"{name}{suffix}", line + "\n")
    if yaml is not None:
        write(root / "data.yaml", yaml)
    return root


BOX = (15, 12, 25, 18)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("[off, no]", ("off", "no")),
        ("[yes, true]", ("yes", "true")),
        ("{0: on, 1: 1.10}", ("on", "1.10")),
        ("\n  - 007\n  - 2024-01-01", ("007", "2024-01-01")),
        ("[null, ~]", ("null", "~")),
        ("[y, 1e3]", ("y", "1e3")),
    ],
)
def test_names_are_text(tmp_path, names, expected):
    assert boxes(read(yolo(tmp_path, f"nc: 2\nnames: {names}"))) == {
        "a.png": [(expected[0], *BOX)],
        "b.png": [(expected[1], *BOX)],
    }


def test_pose_lines_are_read_with_their_shape(tmp_path):
    pose = " 0.5 0.5 2 0.4 0.45 1 0 0 0 0.55 0.5 2"  # 4 points: 17 numbers, an odd count like an outline
    lines = [LINE.format(0) + pose, LINE.format(1) + pose]
    data = read(yolo(tmp_path, "names: [cat, dog]\nkpt_shape: [4, 3]", lines))
    assert boxes(data) == {"a.png": [("cat", *BOX)], "b.png": [("dog", *BOX)]}
    assert data.rows["objects"][0][0]["outline"] is None
    write(tmp_path / "data.yaml", "names: [cat, dog]")
    with pytest.raises(DataError, match=r"look like keypoints.*kpt_shape"):
        read(tmp_path)


@pytest.mark.parametrize("step", [2, 3])
def test_poses_without_their_shape_are_not_outlines(tmp_path, step):
    """Keypoints without visibility, or all visible, have the form of an outline."""
    for i in range(6):
        x, y, width, height = 0.3 + i / 20, 0.5, 0.2 + i / 50, 0.6
        points = [(x - 0.4 * width, y - 0.2), (x + 0.5 * width, y + 0.3), (0, 0), (x, y)]
        words = [0, x, y, width, height, *(v for p in points for v in (*p, *[1] * (step - 2)))]
        picture(tmp_path / f"images/{i}.png", i)
        write(tmp_path / f"labels/{i}.txt", " ".join(map(str, words)))
    yaml = write(tmp_path / "data.yaml", "names: [person]\n")
    with pytest.raises(DataError, match=r"look like keypoints.*kpt_shape"):
        read(tmp_path)
    yaml.write_text(f"names: [person]\nkpt_shape: [4, {step}]\n")
    assert boxes(read(tmp_path))["0.png"] == [("person", 8, 6, 16, 24)]


def test_outlines_with_equally_many_points_are_no_pose(tmp_path):
    for i in range(6):
        picture(tmp_path / f"images/{i}.png", i)
        write(tmp_path / f"labels/{i}.txt", f"0 0.2 0.{i + 1} 0.8 0.{i + 1} 0.9 0.5 0.8 0.9 0.2 0.9 0.1 0.8")
    write(tmp_path / "data.yaml", "names: [leaf]\n")
    assert all(len(b) == 1 for b in boxes(read(tmp_path)).values())


def test_outlines_are_no_pose(tmp_path):
    outline = "0 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9"
    data = read(yolo(tmp_path, "names: [cat, dog]", [outline, outline.replace("0 ", "1 ", 1)]))
    assert boxes(data)["a.png"] == [("cat", 4, 3, 36, 27)] and data.rows["objects"][0][0]["outline"]


@pytest.mark.parametrize(
    ("images", "labels", "suffix"),
    [
        ("Images", "Labels", ".TXT"),
        ("images/train/batch 1", "labels/train/batch 1", ".txt"),
        ("train/IMAGES", "train/LABELS", ".txt"),
        ("proj/images/set", "proj/labels/set", ".txt"),
    ],
)
def test_upper_case_and_images_anywhere_in_a_path(tmp_path, images, labels, suffix):
    root = tmp_path / "images" / "dataset"  # a folder images above the data must not matter
    yaml = f"names: [cat, dog]\ntrain: {images}\n"
    assert {n: len(b) for n, b in boxes(read(yolo(root, yaml, images=images, labels=labels, suffix=suffix))).items()} == {
        "a.png": 1,
        "b.png": 1,
    }


@pytest.mark.parametrize(
    "train", ["..\\train\\images", "C:\\data\\proj\\train\\images", "/content/proj/train/images", "../train/images"]
)
def test_folders_of_other_machines(tmp_path, train):
    yaml = f"path: /content/datasets/gone\ntrain: '{train}'\nval:\ntest: null\nnames: [cat, dog]"
    assert len(boxes(read(yolo(tmp_path, yaml, images="train/images", labels="train/labels")))["a.png"]) == 1


def test_cvat_yolo(tmp_path):
    """CVAT's YOLO 1.1: obj.names, obj.data and a list with the prefix data/."""
    yolo(tmp_path, None, images="obj_train_data", labels="obj_train_data")
    write(tmp_path / "obj.names", "no\ndog\n")
    write(tmp_path / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    write(tmp_path / "train.txt", "data/obj_train_data/a.png\ndata/obj_train_data/b.png\n")
    expected = {"a.png": [("no", *BOX)], "b.png": [("dog", *BOX)]}
    assert boxes(read(tmp_path)) == expected == boxes(read(tmp_path / "obj.data"))
    (tmp_path / "obj.data").unlink()
    assert boxes(read(tmp_path)) == expected
    for image in (tmp_path / "obj_train_data").glob("*.png"):
        image.unlink()
    with pytest.raises(DataError, match="do not exist"):
        read(tmp_path)


@pytest.mark.parametrize("split", ["", "train/"])
def test_labelimg_yolo(tmp_path, split):
    """labelImg writes the labels and classes.txt next to the images."""
    yolo(tmp_path, None, images=split or ".", labels=split or ".")
    write(tmp_path / f"{split}classes.txt", "cat\ndog\n")
    data = read(tmp_path)
    assert boxes(data) == {"a.png": [("cat", *BOX)], "b.png": [("dog", *BOX)]} and data.target.kind == "boxes"


# Pascal VOC and LabelMe


def voc(path, name, label="cat", difficult="0"):
    return write(
        path,
        f"<annotation><filename>{name}</filename><size><width>{WIDTH}</width><height>{HEIGHT}</height></size><object>"
        f"<name>{label}</name><difficult>{difficult}</difficult><bndbox><xmin>5</xmin><ymin>2</ymin><xmax>15</xmax><ymax>7</ymax>"
        "</bndbox></object></annotation>",
    )


@pytest.mark.parametrize(
    ("image", "xml", "named"),
    [
        ("a.png", "a.xml", "a.png"),
        ("A.PNG", "a.XML", "C:\\photos\\A.PNG"),
        ("pictures/a.png", "xml/a.xml", "a.png"),
        ("JPEGImages/a.png", "ANNOTATIONS/a.xml", "a.png"),
        ("train_set/a.png", "train_set/a.xml", "folder\\a.png"),
    ],
)
def test_labelimg_voc(tmp_path, image, xml, named):
    picture(tmp_path / image)
    voc(tmp_path / xml, named)
    assert next(iter(boxes(read(tmp_path)).values())) == [("cat", 5, 2, 15, 7)]


def test_labelme(tmp_path):
    shapes = [
        {"label": "cat", "points": [[15, 7], [5, 2]], "shape_type": "rectangle"},
        {"label": "dog", "points": [[20, 10], [20, 16]], "shape_type": "circle"},
        {"label": "cat", "points": [[1, 1], [9, 1], [9, 9]], "shape_type": "polygon"},
        {"label": "tip", "points": [[1, 1]], "shape_type": "point"},
    ]
    for seed, name in enumerate("ab"):
        picture(tmp_path / f"{name}.png", seed)
        write(
            tmp_path / f"{name}.json",
            {
                "version": "5.0",
                "shapes": shapes[seed:],
                "imagePath": f"..\\photos\\{name}.png",
                "imageData": None,
                "imageHeight": HEIGHT,
                "imageWidth": WIDTH,
            },
        )
    data = read(tmp_path)
    assert boxes(data)["a.png"] == [("cat", 5, 2, 15, 7), ("dog", 14, 4, 26, 16), ("cat", 1, 1, 9, 9)]
    assert len(data.rows["objects"][0][1]["outline"][0]) == 128
    assert next(f for f in data.findings if f.check == "unsupported-shape").count == 2
    (tmp_path / "json").mkdir(), (tmp_path / "images").mkdir()
    for name in "ab":
        (tmp_path / f"{name}.json").rename(tmp_path / f"json/{name}.json")
        (tmp_path / f"{name}.png").rename(tmp_path / f"images/{name}.PNG")
    assert {n: len(b) for n, b in boxes(read(tmp_path)).items()} == {"a.PNG": 3, "b.PNG": 2}


def labelme(root, shapes, name="a", **more):
    picture(root / f"{name}.png")
    document = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"{name}.png", "imageData": None}
    return write(root / f"{name}.json", document | {"imageHeight": HEIGHT, "imageWidth": WIDTH} | more)


def encode_mask(array, mode="1"):
    file = io.BytesIO()
    Image.fromarray((array * 255).astype(np.uint8)).convert(mode).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def drawn(data, row=0, instance=0):
    return object_mask(data.rows["objects"][row][instance], HEIGHT, WIDTH)


RING = np.ones((7, 9), dtype=bool)  # not symmetric, with a hole, and an empty column on the right
RING[2:4, 2:6] = RING[:, 8] = RING[0, :4] = False


@pytest.mark.parametrize(("left", "top"), [(3, 5), (0, 0), (31, 23), (36, 27), (-2, -3)])
@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_labelme_masks(tmp_path, left, top, mode):
    points = [[left, top], [left + 8, top + 6]]  # the last row and column belong to the mask
    labelme(tmp_path, [{"label": "cat", "points": points, "shape_type": "mask", "mask": encode_mask(RING, mode)}])
    expected = np.zeros((HEIGHT + 20, WIDTH + 20), dtype=bool)
    expected[top + 10 : top + 17, left + 10 : left + 19] = RING
    expected = expected[10:-10, 10:-10]
    data = read(tmp_path)
    assert np.array_equal(drawn(data), expected)
    rows, columns = np.nonzero(expected)
    assert boxes(data) == {"a.png": [("cat", columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]}


@pytest.mark.parametrize("key", ["rle", "mask"])
def test_labelme_run_lengths(tmp_path, key):
    inside = np.zeros((HEIGHT, WIDTH), dtype=bool)
    inside[5:12, 3:12] = RING
    runs = {"size": [HEIGHT, WIDTH], "counts": encode_run_lengths(inside)}
    labelme(tmp_path, [{"label": "cat", "points": [], "shape_type": "mask", key: runs}])
    data = read(tmp_path)
    assert np.array_equal(drawn(data), inside) and boxes(data) == {"a.png": [("cat", 3, 5, 11, 12)]}


def test_labelme_masks_that_do_not_fit_keep_their_box(tmp_path):
    shapes = [
        {"label": "cat", "points": [[3, 5], [20, 11]], "shape_type": "mask", "mask": encode_mask(RING)},
        {"label": "dog", "points": [[3, 5], [11, 11]], "shape_type": "mask", "mask": "bm90IGEgUE5H"},
        {"label": "cow", "points": [[3, 5], [11, 11]], "shape_type": "mask", "mask": None},
    ]
    labelme(tmp_path, shapes)
    data = read(tmp_path)
    assert boxes(data) == {"a.png": [("cat", 3, 5, 21, 12), ("dog", 3, 5, 12, 12), ("cow", 3, 5, 12, 12)]}
    assert next(f.count for f in data.findings if f.check == "malformed-outline") == 3


def test_labelme_parts_of_one_object(tmp_path):
    """An object behind a pole is drawn as two shapes with one group_id."""
    left, right = [[1, 1], [5, 1], [5, 9], [1, 9]], [[9, 1], [14, 1], [14, 9], [9, 9]]
    shapes = [
        {"label": "cat", "points": left, "group_id": 1},
        {"label": "cat", "points": right, "group_id": 1},
        {"label": "dog", "points": right, "group_id": 1},
        {"label": "cat", "points": [[20, 20], [28, 26]], "shape_type": "mask", "mask": encode_mask(RING), "group_id": 1},
        {"label": "cat", "points": left, "group_id": None},
        {"label": "cat", "points": [[2, 2], [6, 6]], "shape_type": "rectangle", "group_id": 1},
    ]
    labelme(tmp_path, shapes)
    data = read(tmp_path)
    assert boxes(data)["a.png"] == [("cat", 1, 1, 28, 27), ("dog", 9, 1, 14, 9), ("cat", 1, 1, 5, 9), ("cat", 2, 2, 6, 6)]
    assert drawn(data).sum() == 4 * 8 + 5 * 8 + RING.sum()
    assert next(f.count for f in data.findings if f.check == "object-parts") == 2


def test_labelme_kinds_of_shapes_are_read_or_counted(tmp_path):
    square = [[1, 1], [5, 1], [5, 9], [1, 9]]
    shapes = [{"label": "tip", "points": square[:1], "shape_type": "point"}] * 3
    shapes += [{"label": "edge", "points": square, "shape_type": "linestrip"}] * 2
    shapes += [{"label": "edge", "points": square[:2], "shape_type": "line"}]
    shapes += [{"label": "box", "points": square * 2, "shape_type": "cuboid"}]
    shapes += [{"label": 0, "points": square, "shape_type": "rotation"}]
    shapes += [{"label": "cat", "points": square, "shape_type": "rectangle"}]  # all four corners
    labelme(tmp_path, shapes)
    data = read(tmp_path)
    assert boxes(data) == {"a.png": [("0", 1, 1, 5, 9), ("cat", 1, 1, 5, 9)]}
    found = [f for f in data.findings if f.check == "unsupported-shape"]
    assert [f.count for f in found] == [7] and "(point 3, linestrip 2, line 1, cuboid 1)" in found[0].what


def test_labelme_next_to_another_json(tmp_path):
    labelme(tmp_path, [{"label": "cat", "points": [[1, 1], [5, 9]], "shape_type": "rectangle"}], "m")
    write(tmp_path / "classes.json", ["cat"])
    with pytest.raises(DataError, match=r"classes.json"):
        read(tmp_path)
    assert len(boxes(read(tmp_path, allow_bad=True))) == 1


# Data that cannot be scored


def detection(root, train=(1, 1, 1, 1), val=(1, 1), test=(1, 1), same=False):
    """Write train, val and test with a box in the images of 1 and none in those of 0."""
    for split, present in (("train", train), ("val", val), ("test", test)):
        for i, there in enumerate(present):
            picture(root / split / "images" / f"{split}{i}.png", len(split) * 10 + i)
            place = 0.5 if same else 0.4 + 0.02 * i
            write(root / split / "labels" / f"{split}{i}.txt", f"0 {place} 0.5 0.5 0.5\n" if there else "")
    write(root / "data.yaml", "names: [cat]")
    return root


def prepared(path):
    data = read(path)
    return build_plan(ObjectDetection.select_columns(data), model="yolov8-test", settings={"steps": 2}, callback=NullCallback())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"test": (0, 0)}, "2 test images have no box, so they cannot be scored"),
        ({"val": (0, 0)}, "2 validation images have no box"),
        ({"train": (0, 0, 0, 0)}, "4 training images have no box, so they cannot be trained on"),
        ({"train": (0,) * 4, "val": (0,), "test": (0,)}, "no image has a usable box"),
        ({"same": True}, "all 8 images have the same boxes"),
    ],
)
def test_splits_that_cannot_be_scored_are_rejected_before_training(tmp_path, parts, message):
    with pytest.raises(DataError, match=message):
        prepared(detection(tmp_path, **parts))
    result = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert isinstance(result.exception, DataError) and message in str(result.exception)


def test_crowds_alone_cannot_be_scored(tmp_path):
    coco(tmp_path, iscrowd=1)
    (tmp_path / "annotations/instances.json").rename(tmp_path / "annotations/instances_train.json")
    with pytest.raises(DataError, match="only boxes of groups"):
        ObjectDetection.check_split(
            ObjectDetection.build_examples(read(tmp_path), ObjectDetection.Options()), "test", ObjectDetection.Options()
        )


def test_what_was_trained_stays_usable_if_the_test_fails(tmp_path, monkeypatch):
    detection(tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(ObjectDetection, "intervals", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fieldguide.fit(
                tmp_path / "data",
                model="yolov8-test",
                out=tmp_path / "run",
                settings={"steps": 2, "precision": "float32", "task.side": 32},
            )
    run = open_run(tmp_path / "run")
    assert run.status == "trained" and "objects" in run.predict(str(tmp_path / "data/test/images/test0.png"))[0]
    assert fieldguide.resume(tmp_path / "run").status == "done"


def test_classes_of_boxes_are_printed_with_counts_and_similar_names(tmp_path, capsys):
    coco(tmp_path / "a")
    path = tmp_path / "a/annotations/instances.json"
    document = json.loads(path.read_text())
    document["categories"][1]["name"] = "Cat"
    document["annotations"].append({"id": 9, "image_id": 1, "category_id": 8, "bbox": [1, 1, 5, 5]})
    data = ObjectDetection.build_examples(read(tmp_path / "a"), ObjectDetection.Options()) if write(path, document) else None
    found = {f.check: f for f in data.findings}
    assert (
        found["class-counts"].what == "2 classes of boxes: cat 2, Cat 1" and "'cat', 'Cat'" in found["class-names-alike"].what
    )
    lines = []
    log = type("Log", (NullCallback,), {"log": lambda self, text: lines.append(text)})()
    fieldguide_data = read(detection(tmp_path / "b"))
    build_plan(ObjectDetection.select_columns(fieldguide_data), model="yolov8-test", settings={"steps": 2}, callback=log)
    assert "note: 1 classes of boxes: cat 8" in lines

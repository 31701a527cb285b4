"""Outlines: polygons and run lengths against slow references and pycocotools, and segmentation trained on them."""

from __future__ import annotations

import io
import json

import numpy as np
import polars as pl
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from damage import finding
from fieldguide.automl.fit import fit
from fieldguide.automl.request import read_for
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.data import read
from fieldguide.data.media.boxes import OBJECT, make_object
from fieldguide.data.media.masks import LazyMask, decode_run_lengths, fill_polygon, object_mask
from fieldguide.data.validation.checks import BadData
from fieldguide.tasks.vision.image_segmentation import ImageSegmentation


def blob(rng, corners, width, height):
    """Return a star-shaped polygon with arbitrary corners, some of which may be outside."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    far = rng.uniform(3, 18, corners)
    middle = rng.uniform([0, 0], [width, height])
    return (middle + far[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)).ravel().tolist()


def inside(polygon, x, y):
    """Test a point by the even-odd rule with a ray to the left."""
    points, odd = list(zip(polygon[::2], polygon[1::2])), False
    for (x1, y1), (x2, y2) in zip(points, [*points[1:], points[0]]):
        if (y1 <= y) != (y2 <= y) and x1 + (y - y1) * (x2 - x1) / (y2 - y1) <= x:
            odd = not odd
    return odd


def test_polygon_contains_pixels_by_their_center():
    square = fill_polygon([1, 2, 4, 2, 4, 5, 1, 5], 7, 6)
    by_hand = np.zeros((7, 6), bool)
    by_hand[2:5, 1:4] = True
    assert (square == by_hand).all()
    triangle = fill_polygon([0, 0, 4, 0, 0, 4], 4, 4)  # middles on the slanting side count once, for either side of it
    assert triangle.astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert (triangle ^ fill_polygon([4, 0, 4, 4, 0, 4], 4, 4)).all()
    rng = np.random.default_rng(0)
    for _ in range(30):
        polygon = blob(rng, int(rng.integers(3, 12)), 30, 20)
        want = [[inside(polygon, x + 0.5, y + 0.5) for x in range(30)] for y in range(20)]
        assert (fill_polygon(polygon, 20, 30) == want).all()
    assert not fill_polygon([1, 1, 5, 1, 3, 1], 4, 4).any() and not fill_polygon([-9, -9, -5, -9, -5, -3], 4, 4).any()


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of pycocotools
def test_polygons_equal_pycocotools():
    rng, overlaps = np.random.default_rng(1), []
    for _ in range(60):
        polygon = blob(rng, int(rng.integers(5, 12)), 60, 50)
        ours = fill_polygon(polygon, 50, 60)
        theirs = coco_mask.decode(coco_mask.frPyObjects([polygon], 50, 60))[..., 0].astype(bool)
        overlaps.append((ours & theirs).sum() / max((ours | theirs).sum(), 1))
        # It lets a pixel in that is touched at one side; beyond the border between, both say the same.
        rim = np.zeros_like(ours)
        for axis in (0, 1):
            for step in (-1, 1):
                rim |= ours != np.roll(ours, step, axis)
        assert (ours == theirs)[~rim].all()
    assert np.mean(overlaps) > 0.95


def test_run_lengths_equal_pycocotools():
    rng = np.random.default_rng(2)
    for size in ((20, 30), (1, 1), (300, 400), (7, 1)):
        for share in (0.0, 0.02, 0.5, 1.0):
            mask = rng.random(size) < share
            packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            runs = decode_run_lengths(packed["counts"].decode())
            assert sum(runs) == mask.size and (object_mask({"runs": runs, "outline": None}, *size) == mask).all()
            again = coco_mask.frPyObjects({"counts": runs, "size": list(size)}, *size)
            assert again["counts"] == packed["counts"] and decode_run_lengths(runs) == runs
    for wrong in ("", "P", "\x10", "é", "0" * 3 + "o", [], [3, -1], [1.5], [True], None, 5, "o" * 20 + "1"):
        assert decode_run_lengths(wrong) is None


def one(*things):
    return pl.Series("objects", [list(things)], dtype=pl.List(OBJECT))


def square(label, left, top, right, bottom, **more):
    return make_object(label, left, top, right, bottom, [[left, top, right, top, right, bottom, left, bottom]], **more)


def test_drawing_order_by_hand():
    """Crowds and boxes first, then large objects before small ones, whatever their order in the list."""
    things = one(
        square("b", 2, 1, 4, 3),
        square("a", 1, 0, 6, 4),
        make_object("a", 5, 0, 8, 2),
        {**make_object("a", 0, 0, 8, 5, crowd=True), "runs": [0, 5, 35]},
        square("other", 0, 4, 8, 5),
    )
    want = [
        [-1, 1, 1, 1, 1, 1, -1, -1],
        [-1, 1, 2, 2, 1, 1, -1, -1],
        [-1, 1, 2, 2, 1, 1, 0, 0],
        [-1, 1, 1, 1, 1, 1, 0, 0],
        [-1, -1, -1, -1, -1, -1, -1, -1],
    ]
    assert LazyMask(things, 0, 8, 5, {"a": 1, "b": 2}).rasterize().tolist() == want
    two = one({**square("a", 0, 0, 2, 2), "outline": [[0, 0, 2, 0, 2, 2, 0, 2], [1, 1, 3, 1, 3, 3, 1, 3]]})
    assert LazyMask(two, 0, 3, 3, {"a": 7}).rasterize().tolist() == [[7, 7, 0], [7, 7, 7], [0, 7, 7]]  # parts add up
    empty = pl.Series("objects", [[], None], dtype=pl.List(OBJECT))
    assert not any(LazyMask(empty, row, 3, 3, {}).rasterize().any() for row in (0, 1))


# Data as users have it

NAMES = ("square", "bar")


def scene(number):
    """Return (class, polygon) of image `number`, 48 x 40: a bright square and a darker vertical bar."""
    rng = np.random.default_rng(number)
    x, y, at = rng.integers(2, 18), rng.integers(2, 24), rng.integers(36, 42)
    both = [(0, [x, y, x + 14, y, x + 14, y + 14, x, y + 14]), (1, [at, 0, at + 5, 0, at + 5, 40, at, 40])]
    return both[:1] if number % 4 == 3 else both


def picture(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 50, (40, 48))
    for kind, polygon in scene(number):
        pixels[fill_polygon(polygon, 40, 48)] += (190, 100)[kind]
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def coco(root, count=120, change=lambda document: None):
    for i in range(count):
        picture(root / "images" / f"p{i:03d}.png", i)
    document = {
        "images": [{"id": i, "file_name": f"p{i:03d}.png", "width": 48, "height": 40} for i in range(count)],
        "categories": [{"id": 3, "name": "square"}, {"id": 8, "name": "bar"}, {"id": 9, "name": "unseen"}],
        "annotations": [],
    }
    for i in range(count):
        for kind, p in scene(i):
            p = [float(v) for v in p]
            document["annotations"].append(
                {
                    "id": len(document["annotations"]),
                    "image_id": i,
                    "category_id": (3, 8)[kind],
                    "iscrowd": 0,
                    "bbox": [min(p[::2]), min(p[1::2]), max(p[::2]) - min(p[::2]), max(p[1::2]) - min(p[1::2])],
                    "segmentation": [p],
                }
            )
    change(document)
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "instances.json").write_text(json.dumps(document))
    return root


def yolo(root, count=120):
    (root / "labels").mkdir(parents=True)
    for i in range(count):
        picture(root / "images" / f"p{i:03d}.png", i)
        (root / "labels" / f"p{i:03d}.txt").write_text(
            "".join(
                f"{kind} {' '.join(str(v / (48, 40)[j % 2]) for j, v in enumerate(polygon))}\n" for kind, polygon in scene(i)
            )
        )
    (root / "data.yaml").write_text("train: images\nnames: [square, bar]\n")
    return root


def asked(path, **more):
    return read_for(
        {
            "data": str(path),
            "target": None,
            "kinds": {},
            "roles": {},
            "group": None,
            "time": None,
            "allow_bad": False,
            "task": "image-segmentation",
            **more,
        }
    )


@pytest.mark.parametrize("form", [coco, yolo])
def test_outlines_become_masks(form, tmp_path):
    data, kind, _ = asked(form(tmp_path, 24))
    assert kind is ImageSegmentation and asked(tmp_path, task=None)[1].name == "object-detection"
    data = kind.build_examples(data, kind.Options())
    assert data.context == {"values": [0, 1, 2], "names": ["background", "square", "bar"]}
    task = kind.fit(data, kind.Options())
    for i, mask in enumerate(task.masks(data)):
        want = np.zeros((40, 48))
        for k, polygon in scene(i):
            want[fill_polygon(polygon, 40, 48)] = k + 1
        assert (mask.rasterize() == want).all() and task.targets(data)["pixels"][i].tolist() == [
            (want == k).sum() for k in range(3)
        ]
    batch = task.batches(data, None, None).make(np.arange(5), None)
    assert batch["truth"].shape == (5, 40, 48) and (batch["truth"][4] == task.masks(data)[4].rasterize()).all()
    fewer = kind.build_examples(data, kind.Options(ignore="bar"))
    assert fewer.context["names"] == ["background", "square"]
    only = kind.fit(fewer, kind.Options(ignore="bar"))
    assert (only.masks(fewer)[0].rasterize() == -1).sum() == 200  # the pixels of a bar are no background, either
    with pytest.raises(SettingsError, match=r"task.ignore names 'bra', which .* does not have\. Did you mean 'bar'"):
        kind.build_examples(data, kind.Options(ignore="bra"))
    with pytest.raises(DataError, match="no object with an outline is left"):
        kind.build_examples(data, kind.Options(ignore="bar,square"))


def damaged(root, **fields):
    """Return COCO data whose annotation 0 (of p000.png, a square) is changed."""
    return coco(root, change=lambda d: d["annotations"][0].update(fields))


def test_damaged_outlines(tmp_path):
    for number, wrong in enumerate(
        (
            [[1, 2, 3, 4]],
            [[1, 2, 3, 4, 5, 6, 7]],
            [[1, 2, "x", 4, 5, 6]],
            "outline",
            {"counts": [5, 5], "size": [40, 48]},
            {"counts": "oo", "size": [40, 48]},
            {"counts": [0, 1920], "size": [48, 40]},
            {"counts": [0, 1920]},
        )
    ):
        data, *_ = asked(damaged(tmp_path / str(number), segmentation=wrong))
        found = finding(data, "malformed-outline")
        assert found.count == 1 and "annotation 0" in found.places[0] and found.remedy
        bare = finding(data, "box-without-outline")
        assert bare.count == 1 and "p000.png: square" in bare.places[0] and not bare.unusable and len(data) == 120
    partly, *_ = asked(damaged(tmp_path / "partly", segmentation=[[1, 1, 9, 1, 9, 9], [4, 4]]))
    assert finding(partly, "malformed-outline").count == 1  # its other part is drawn
    assert not [f for f in partly.findings if f.check == "box-without-outline"]
    none, *_ = asked(damaged(tmp_path / "none", segmentation=[]))
    assert finding(none, "box-without-outline").count == 1 and not [f for f in none.findings if f.check == "malformed-outline"]


def test_crowds_and_damaged_annotations(tmp_path):
    runs = [40 * 10, 40 * 5, 40 * 33]  # columns 10 to 14
    packed = coco_mask.frPyObjects({"counts": runs, "size": [40, 48]}, 40, 48)["counts"].decode()
    for name, counts in (("plain", runs), ("packed", packed)):
        data, kind, _ = asked(damaged(tmp_path / name, segmentation={"counts": counts, "size": [40, 48]}, iscrowd=1))
        assert finding(data, "crowd-pixels").count == 1 and "p000.png" in finding(data, "crowd-pixels").places[0]
        data = kind.build_examples(data, kind.Options())
        mask = kind.fit(data, kind.Options()).masks(data)[0].rasterize()
        assert (mask[:, 10:15] == -1).all() and (mask == -1).sum() == 200 and (mask == 2).sum() == 200
    whole, kind, _ = asked(damaged(tmp_path / "whole", segmentation={"counts": packed, "size": [40, 48]}))
    assert kind.fit(kind.build_examples(whole, kind.Options()), kind.Options()).targets(whole)["pixels"][0, 1] == 200
    outside, kind, _ = asked(
        damaged(tmp_path / "outside", segmentation=[[-20, -20, 10, -20, 10, 8, -20, 8]], bbox=[-20, -20, 30, 28])
    )
    assert finding(outside, "box-over-edge").count == 1
    assert kind.fit(kind.build_examples(outside, kind.Options()), kind.Options()).targets(outside)["pixels"][0, 1] == 80
    alone = coco(tmp_path / "alone", change=lambda d: [a.pop("bbox") for a in d["annotations"]])
    objects = asked(alone)[0].rows["objects"][0].to_list()
    assert [objects[0][s] for s in ("right", "bottom")] == [max(scene(0)[0][1][::2]), max(scene(0)[0][1][1::2])]
    bare = coco(tmp_path / "bare", change=lambda d: [a.pop("segmentation") for a in d["annotations"]])
    with pytest.raises(
        DataError, match=r"the data has 210 boxes without any, and a box is not a mask.*--task object-detection"
    ):
        asked(bare)
    with pytest.raises(BadData, match="size-differs"):
        asked(coco(tmp_path / "size", change=lambda d: [i.update(width=50) for i in d["images"][:5]]))
    with pytest.raises(DataError, match="there are 300 object classes"):
        many = coco(
            tmp_path / "many",
            change=lambda d: (
                d["categories"].extend({"id": 100 + i, "name": f"c{i}"} for i in range(300)),
                [a.update(category_id=100 + a["id"] % 300) for a in d["annotations"]],
                d["annotations"].extend({**d["annotations"][i], "id": 1000 + i, "category_id": 310 + i} for i in range(90)),
            ),
        )
        kind.build_examples(asked(many)[0], kind.Options())
    lines = yolo(tmp_path / "yolo")
    (lines / "labels" / "p000.txt").write_text("0 0.1 0.1 0.5 0.1 0.5\n")  # half a point
    assert finding(asked(lines)[0], "malformed-line").unusable == 1
    (lines / "labels" / "p000.txt").write_text("0 0.3 0.3 0.2 0.2\n")  # a box among outlines
    assert finding(asked(lines)[0], "box-without-outline").count == 1


@pytest.mark.slow
def test_network_learns_from_outlines(tmp_path):
    run = fit(
        str(coco(tmp_path / "data", 60)),
        task="image-segmentation",
        model="unet-mini",
        minutes=2,
        out=tmp_path / "run",
        settings={"steps": 60, "precision": "float32", "evaluate": 30, "lr": 3e-3, "task.crop": 32, "batch": 8},
    )
    assert run.scores["miou"] > 0.75
    answer = run.predict([str(tmp_path / "data" / "images" / "p000.png")])[0]
    mask = np.asarray(Image.open(io.BytesIO(answer["mask"].content)))
    assert mask.shape == (40, 48) and (mask == run_mask(0)).mean() > 0.9 and "bar" in answer["shares"]
    assert len(run.predict([str(tmp_path / "data")])) == 60
    assert run.evaluate(str(tmp_path / "data"))["scores"] == pytest.approx(run.scores)
    other = run.evaluate(str(yolo(tmp_path / "other", 20)))  # the same classes in another form
    assert 0 < other["rows"] < 20 and other["scores"]["miou"] > 0.6  # the images that were used in training are recognized
    good = (tmp_path / "other" / "images" / "p003.png").read_bytes()
    (tmp_path / "other" / "images" / "p003.png").write_bytes(good[:60])
    with pytest.raises(BadData, match=r"1 of 20 examples are unusable .* Correct them, or remove them"):
        run.evaluate(str(tmp_path / "other"))
    assert [("error" in answer) for answer in run.predict([str(tmp_path / "other")])] == [i == 3 for i in range(20)]
    (tmp_path / "other" / "images" / "p003.png").write_bytes(good)
    (tmp_path / "other" / "data.yaml").write_text("train: images\nnames: [square, beam]\n")
    with pytest.raises(DataError, match="has objects of 'beam', which are not classes of this model"):
        run.evaluate(str(tmp_path / "other"))
    with pytest.raises(DataError, match="there are no outlines to evaluate with"):
        run.evaluate(str(tmp_path / "other" / "images"))
    assert "Confusion of pixels" in (run.path / "report.html").read_text()


def run_mask(number):
    want = np.zeros((40, 48))
    for k, polygon in scene(number):
        want[fill_polygon(polygon, 40, 48)] = k + 1
    return want


def test_masks_and_outlines_are_distinguished(tmp_path):
    data = read(coco(tmp_path, 24), column_spec=ImageSegmentation.column_spec)
    assert data.target.kind == "boxes"
    with pytest.raises(SettingsError, match=r"for masks give values or classes \(square, bar, unseen\)"):
        ImageSegmentation.prepare_masks(data, ImageSegmentation.Options(ignore="bra"))

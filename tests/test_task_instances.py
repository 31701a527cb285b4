"""Instance segmentation: readers, damage, masks against loops, the loss, scores, signature, and runs of both networks."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fieldguide.automl.fit import fit
from fieldguide.checkpoints import weights
from fieldguide.core.errors import DataError
from fieldguide.core.packed_masks import decode_mask, encode_mask, overlap_masks, pack_masks, unpack_masks
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.data.media.masks import encode_run_lengths, fill_polygon, object_mask
from fieldguide.data.preprocessing.detection import Letterbox
from fieldguide.data.preprocessing.object_masks import place_mask
from fieldguide.data.samples import path as sample
from fieldguide.models.registry import card, create
from fieldguide.objectives.detection import decode
from fieldguide.objectives.mask_set import MaskSet, MaskSetInstances, rank_masks
from fieldguide.objectives.object_masks import find_box, trace_mask, trace_masks
from fieldguide.objectives.prototype_masks import PrototypeDetection, find_cells
from fieldguide.tasks import infer_task
from fieldguide.tasks.vision.instance_segmentation import InstanceSegmentation, find_regions, stretch
from test_models import batch, tiny

WIDE, HIGH = 40, 30
SETTINGS = {"steps": 4, "batch": 4, "evaluate": 4, "precision": "float32", "channels_last": False}


def scene(i: int) -> list[tuple[str, list[float]]]:
    """Return class and polygon of the objects of image i: a triangle, and in every third image a square that touches it."""
    x, y = 4 + i % 7, 3 + i % 5
    first = (("cat", "dog")[i % 2], [x, y, x + 16.0, y, x + 4.0, y + 14])
    return [first] if i % 3 else [first, ("dog", [24.0, 12, 38, 12, 38, 26, 24, 26])]


def picture(file, i):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(i).integers(0, 90, (HIGH, WIDE, 3), np.uint8)
    for label, polygon in scene(i):
        pixels[fill_polygon(polygon, HIGH, WIDE), int(label == "dog")] = 220
    Image.fromarray(pixels).save(file)


def form_of(polygon, i):
    """Return a COCO segmentation in one of its three forms."""
    mask = fill_polygon(polygon, HIGH, WIDE)
    if i % 3 == 0:
        return [polygon]
    counts = encode_run_lengths(mask) if i % 3 == 1 else encode_mask(mask).decode()
    return {"size": [HIGH, WIDE], "counts": counts}


def sides(polygon):
    return min(polygon[::2]), min(polygon[1::2]), max(polygon[::2]), max(polygon[1::2])


def coco(root, count=60, form=form_of):
    for i in range(count):
        picture(root / "images" / f"p{i:03d}.png", i)
    notes = [(i, *one) for i in range(count) for one in scene(i)]
    document = {
        "images": [{"id": i, "file_name": f"p{i:03d}.png", "width": WIDE, "height": HIGH} for i in range(count)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {
                "id": n,
                "image_id": i,
                "category_id": {"cat": 7, "dog": 9}[label],
                "bbox": [a, b, c - a, d - b],
                "iscrowd": 0,
                "segmentation": form(polygon, n),
            }
            for n, (i, label, polygon) in enumerate(notes)
            for a, b, c, d in [sides(polygon)]
        ],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "instances.json").write_text(json.dumps(document))
    return root


def yolo(root, count=60):
    (root / "labels").mkdir(parents=True)
    for i in range(count):
        picture(root / "images" / f"p{i:03d}.png", i)
        lines = [
            " ".join(map(str, ({"cat": 0, "dog": 1}[label], *(v / (WIDE, HIGH)[k % 2] for k, v in enumerate(polygon)))))
            for label, polygon in scene(i)
        ]
        (root / "labels" / f"p{i:03d}.txt").write_text("\n".join(lines) + "\n")
    (root / "data.yaml").write_text("train: images\nnames: [cat, dog]\n")
    return root


def labelme(root, count=60):
    for i in range(count):
        picture(root / f"p{i:03d}.png", i)
        shapes = [
            {"label": label, "shape_type": "polygon", "points": np.reshape(polygon, (-1, 2)).tolist()}
            for label, polygon in scene(i)
        ]
        document = {"imagePath": f"p{i:03d}.png", "imageWidth": WIDE, "imageHeight": HIGH, "shapes": shapes}
        (root / f"p{i:03d}.json").write_text(json.dumps(document))
    return root


HEAD = "<version>1.1</version><meta><task><labels><label><name>cat</name></label><label><name>dog</name></label></labels></task></meta>"


def shape_of(label, polygon, n):
    """Return a CVAT shape: a polygon, or a mask with run lengths row by row in its box."""
    if n % 2 == 0:
        points = ";".join(f"{x},{y}" for x, y in np.reshape(polygon, (-1, 2)))
        return f'<polygon label="{label}" points="{points}" z_order="0"></polygon>'
    mask = fill_polygon(polygon, HIGH, WIDE)
    left, top, right, bottom = (int(v) for v in find_box(mask))
    runs = encode_run_lengths(mask[top:bottom, left:right].T)
    return (
        f'<mask label="{label}" rle="{", ".join(map(str, runs))}" left="{left}" top="{top}" width="{right - left}" '
        f'height="{bottom - top}" z_order="0"></mask>'
    )


def cvat(root, count=60, head=HEAD, more=""):
    parts = []
    for i in range(count):
        picture(root / "images" / f"p{i:03d}.png", i)
        shapes = "\n".join(shape_of(*one, i) for one in scene(i))
        parts.append(
            f'<image id="{i}" name="p{i:03d}.png" width="{WIDE}" height="{HIGH}">\n{shapes}\n{more if not i else ""}</image>'
        )
    (root / "annotations.xml").write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations>' + head + "\n" + "\n".join(parts) + "</annotations>\n"
    )
    return root


def prepare(source, **options):
    options = InstanceSegmentation.options_from({"side": 64, **options})
    data = InstanceSegmentation.select_columns(read(source, target="objects", column_spec=InstanceSegmentation.column_spec))
    data = InstanceSegmentation.build_examples(data, options)
    return InstanceSegmentation.fit(data, options), data


# ---------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("form", [coco, yolo, labelme, cvat])
def test_formats_give_the_same_masks(form, tmp_path):
    data = read(form(tmp_path))
    assert data.context["classes"] == ["cat", "dog"] and not [f for f in data.findings if f.severity != "note"]
    for i, objects in enumerate(data.rows["objects"].to_list()):
        for one, (label, polygon) in zip(objects, scene(i), strict=True):
            assert one["label"] == label
            np.testing.assert_array_equal(object_mask(one, HIGH, WIDE), fill_polygon(polygon, HIGH, WIDE))


def test_outlines_are_boxes_unless_masks_are_requested(tmp_path):
    kind, why = infer_task(read(coco(tmp_path, 12)))
    assert kind.name == "object-detection" and "--task instance-segmentation" in why


def test_boxes_alone_are_rejected(tmp_path):
    data = read(coco(tmp_path, 12, form=lambda *_: []))
    assert "a box is not a mask" in InstanceSegmentation.missing_requirements(data)
    assert InstanceSegmentation.missing_requirements(read(coco(tmp_path / "b", 12))) is None


def damages():
    some = lambda document, i=0: document["annotations"][i]
    yield "malformed-outline", lambda d: some(d).update(segmentation=[[1, 2, 3, 4]])
    yield "malformed-outline", lambda d: some(d, 1)["segmentation"].update(counts=[5, 5])
    yield "malformed-outline", lambda d: some(d, 2)["segmentation"].update(counts="!!")
    yield "malformed-outline", lambda d: some(d, 2)["segmentation"].update(size=[WIDE, HIGH])
    yield "box-without-outline", lambda d: some(d).pop("segmentation")
    yield "crowd-pixels", lambda d: some(d, 1).update(iscrowd=1)
    yield "degenerate-box", lambda d: some(d).update(bbox=[1, 1, 0, 0])
    yield "unknown-category", lambda d: some(d).update(category_id=77)
    yield "duplicate-box", lambda d: d["annotations"].append({**some(d), "id": 999})
    yield "size-differs", lambda d: d["images"][0].update(width=50)
    yield "outline-far", lambda d: some(d).update(bbox=[20, 20, 5, 5])
    yield "outline-outside", lambda d: some(d).update(segmentation=[[-9, -9, -5, -9, -5, -5]])


@pytest.mark.parametrize(("check", "edit"), [pytest.param(c, e, id=f"{c}-{n}") for n, (c, e) in enumerate(damages())])
def test_damage_is_found(check, edit, tmp_path):
    file = coco(tmp_path, 12) / "annotations" / "instances.json"
    document = json.loads(file.read_text())
    edit(document)
    file.write_text(json.dumps(document))
    data = read(tmp_path, target="objects", column_spec=InstanceSegmentation.column_spec, allow_bad=True)
    expected = {check} | ({"box-without-outline"} if check in ("malformed-outline", "outline-outside") else set())
    also = {"malformed-outline"} if check == "size-differs" else set()  # of run lengths for the true size
    assert {f.check for f in data.findings} == expected | also
    task, data = prepare(tmp_path) if check not in ("unknown-category", "size-differs") else (None, data)
    if task:
        made = task.batches(data, card("yolov8-seg"), Settings(augmentation="none")).make(np.arange(3), torch.Generator())
        assert made["masks"].isfinite().all()


@pytest.mark.parametrize(
    ("more", "check"),
    [
        ('<polygon label="cat" points="1,2;3,4"/>', "malformed-outline"),
        ('<polygon label="cat" points="1,2;3,x;5,6"/>', "malformed-box"),
        ('<polygon label="" points="1,2;3,9;5,6"/>', "malformed-box"),
        ('<mask label="cat" rle="3,4" left="1" top="1" width="3" height="3"/>', "malformed-outline"),
        ('<mask label="cat" rle="0,9" left="39" top="1" width="3" height="3"/>', "malformed-outline"),
        ('<box label="cat" xtl="1" ytl="a" xbr="5" ybr="5"/>', "malformed-box"),
        ('<polyline label="cat" points="1,2;3,4"/>', "unsupported-shape"),
        ('<polygon label="cow" points="1,20;3,28;9,28"/>', "undefined-label"),
        ('<ellipse label="cat" cx="30" cy="6" rx="-1" ry=""/>', "malformed-box"),
        ('<strange label="cat"/>', "malformed-box"),
    ],
)
def test_damaged_shapes_of_cvat(more, check, tmp_path):
    data = read(cvat(tmp_path, 12, more=more), allow_bad=True)
    assert check in {f.check for f in data.findings}
    place = next(f for f in data.findings if f.check == check).places[0]
    assert "annotations.xml:6" in place or check == "undefined-label"


def test_damaged_documents_of_cvat(tmp_path):
    root = cvat(tmp_path / "a", 3)
    file = root / "annotations.xml"
    whole = file.read_text()
    for broken, message in (
        (whole[:-30], r"annotations\.xml:\d+: not well-formed"),
        (whole.replace("<annotations>", "<!DOCTYPE a><annotations>"), "document type"),
        (whole.replace("</annotations>", "<track></track></annotations>"), "annotations of a video"),
    ):
        file.write_text(broken)
        with pytest.raises(DataError, match=message):
            read(root)


def test_shapes_of_cvat(tmp_path):
    """A turned box, an ellipse, a plain box, and two parts of one object."""
    more = (
        '<box label="cat" xtl="10" ytl="20" xbr="20" ybr="22" rotation="90.0"/><ellipse label="dog" cx="30" cy="6" rx="4" ry="2"/>'
        '<box label="dog" xtl="1" ytl="20" xbr="5" ybr="25"/>'
        '<polygon label="cat" points="0,28;2,28;2,30;0,30" group_id="3"/><polygon label="cat" points="8,28;9,28;9,30;8,30" group_id="3"/>'
    )
    data = read(cvat(tmp_path, 3, more=more))
    turned, ellipse, box, parts = data.rows["objects"].to_list()[0][2:]
    assert [turned[s] for s in ("left", "top", "right", "bottom")] == pytest.approx([14, 16, 16, 26])
    assert object_mask(ellipse, HIGH, WIDE).sum() == pytest.approx(math.pi * 8, rel=0.15)
    assert object_mask(box, HIGH, WIDE) is None
    assert object_mask(parts, HIGH, WIDE).sum() == 6 and (parts["left"], parts["right"]) == (0, 9)
    assert [f.check for f in data.findings] == ["object-parts"]
    assert read(tmp_path / "annotations.xml").rows["objects"].to_list() == data.rows["objects"].to_list()


# ---------------------------------------------------------------------------------------------- masks


def test_packed_masks_return():
    rng = np.random.default_rng(0)
    masks = [[rng.random((7, 9)) > 0.5 for _ in range(n)] for n in (2, 0, 3)]
    packed = pack_masks([[encode_mask(m) for m in some] for some in masks], [(7, 9)] * 3, 4)
    assert packed["run_bytes"].shape == (3, 4) and packed["runs"].dtype == np.int8
    for i, some in enumerate(masks):
        found = unpack_masks(packed, i)
        assert len(found) == 4 and not any(decode_mask(m).any() for m in found[len(some) :])
        for mask, runs in zip(some, found):
            np.testing.assert_array_equal(decode_mask(runs), mask)
    first, second = (encode_mask(m) for m in masks[2][:2])
    runs = [{"size": [7, 9], "counts": c} for c in (first, second)]
    joint = (masks[2][0] & masks[2][1]).sum()
    assert overlap_masks(runs[:1], runs[1:], np.array([False]))[0, 0] == pytest.approx(
        joint / (masks[2][0] | masks[2][1]).sum()
    )
    assert overlap_masks(runs[:1], runs[1:], np.array([True]))[0, 0] == pytest.approx(joint / masks[2][0].sum())


def test_coverage_equals_a_loop():
    torch.manual_seed(0)
    mask = torch.rand(5, 7) > 0.5
    for scale, shift in (((0.7, 1.3), (0.4, -0.6)), ((-0.8, 0.5), (6.2, 1.0)), ((2.0, 3.0), (0.0, 0.0))):
        found = place_mask(mask, scale, shift, (4, 6))
        for row in range(4):
            for column in range(6):
                area = 0.0
                for y, x in mask.nonzero().tolist():
                    xs, ys = (
                        sorted((s * v + t, s * (v + 1) + t)) for s, v, t in ((scale[0], x, shift[0]), (scale[1], y, shift[1]))
                    )
                    wide, high = min(xs[1], column + 1) - max(xs[0], column), min(ys[1], row + 1) - max(ys[0], row)
                    area += max(wide, 0) * max(high, 0)
                assert float(found[row, column]) == pytest.approx(area, abs=1e-5)


@pytest.mark.parametrize("augmentation", ["none", "light", "standard"])
def test_masks_move_with_their_image(augmentation, tmp_path):
    """The bright pixels of an object are under its mask, after letterboxing, mosaics, scaling, shifts and mirroring."""
    (tmp_path / "images").mkdir()
    polygon = [6.0, 4, 30, 4, 12, 24]
    for i in range(6):
        pixels = np.full((HIGH, WIDE), 30, np.uint8)
        pixels[fill_polygon(polygon, HIGH, WIDE)] = 255
        Image.fromarray(pixels).save(tmp_path / "images" / f"p{i:03d}.png")
    a, b, c, d = sides(polygon)
    notes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [a, b + i * 1e-3, c - a, d - b], "segmentation": [polygon]}
        for i in range(6)
    ]
    document = {
        "images": [{"id": i, "file_name": f"p{i:03d}.png"} for i in range(6)],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{**n, "bbox": [a, b, c - a - n["id"] * 0.2, d - b]} for n in notes],
    }
    (tmp_path / "instances.json").write_text(json.dumps(document))
    task, data = prepare(tmp_path, channels=1)
    made = task.batches(data, card("yolov8-seg"), Settings(augmentation=augmentation))
    for seed in range(3):
        got = made.make(np.arange(6), torch.Generator().manual_seed(seed))
        shade = got["image"][:, 0]
        ink = torch.nn.functional.avg_pool2d((shade > 0.5).float()[:, None], 4)[:, 0]  # padding is white too
        cover = got["masks"].amax(1)
        assert got["masks"].shape[2:] == (16, 16) and (got["labels"] >= 0).any()
        sure = cover > 0.95
        assert sure.any() and ink[sure].mean() > 0.9
        if augmentation == "none":
            dark = (ink < 0.05) & (cover > 0.3)
            assert not dark.any() and float(cover.sum()) == pytest.approx(6 * 240 * 1.6**2 / 16, rel=0.02)


def test_traced_masks_equal_interpolation_of_the_whole_image():
    torch.manual_seed(0)
    logits = torch.randn(8, 8) - 0.5
    frame = Letterbox.of([50], [20], 32)
    scale, corner = (tuple(v[0].tolist()) for v in (frame.scale, frame.corner))
    found = trace_mask(logits, 4.0, scale, corner, (20, 50))

    def at(y, x):  # bilinear between the centers of cells
        y, x = min(max(y - 0.5, 0), 7), min(max(x - 0.5, 0), 7)
        r, c = min(int(y), 6), min(int(x), 6)
        top = logits[r, c] * (1 - x + c) + logits[r, c + 1] * (x - c)
        low = logits[r + 1, c] * (1 - x + c) + logits[r + 1, c + 1] * (x - c)
        return float(top * (1 - y + r) + low * (y - r))

    place = lambda i, axis: ((i + 0.5) * scale[axis] + corner[axis]) / 4
    want = np.array([[at(place(y, 1), place(x, 0)) > 0 for x in range(50)] for y in range(20)])
    assert (found == want).mean() > 0.999
    inside = trace_mask(logits, 4.0, scale, corner, (20, 50), (10.0, 3.2, 30.6, 12.0))
    cut = np.zeros_like(want)
    cut[3:12, 10:31] = want[3:12, 10:31]
    assert (inside == cut).mean() > 0.999 and not trace_mask(-logits.abs(), 4.0, scale, corner, (20, 50)).any()


def test_boxes_of_sets_are_those_of_masks():
    logits = torch.full((1, 2, 8, 8), -9.0)
    logits[0, 0, 2:4, 3:7] = 9.0
    found = {
        "boxes": torch.zeros(1, 2, 4),
        "labels": torch.tensor([[1, -1]]),
        "scores": torch.tensor([[0.5, 0.0]]),
        "masks": logits,
    }
    traced = trace_masks(found, Letterbox.of([32], [32], 32), 32, False)
    mask = decode_mask(unpack_masks({k: v.numpy() for k, v in traced.items()}, 0)[0])
    assert traced["boxes"][0].tolist() == [list(find_box(mask)), [0, 0, 0, 0]] == [[12, 8, 28, 16], [0, 0, 0, 0]]


def test_stretched_cells():
    cells = np.array([[1, 0], [0, 1]], dtype=bool)
    found = stretch(cells, (1.0, 1.0, 5.0, 3.0), (5, 7))
    assert found.sum() == 4 and found[1, 1:3].all() and found[2, 3:5].all()
    assert not stretch(cells, (3.0, 3.0, 3.0, 3.0), (5, 7)).any()


def test_regions_of_color():
    pixels = np.full((40, 60, 3), 100, np.uint8)
    pixels[5:15, 5:25], pixels[20:30, 40:50] = 250, (0, 255, 0)
    first, second = find_regions(Image.fromarray(pixels))
    assert find_box(first) == (5, 5, 25, 15) and find_box(second) == (40, 20, 50, 30)


# ---------------------------------------------------------------------------------------------- objectives


def test_loss_equals_a_loop():
    torch.manual_seed(0)
    model = tiny("yolov8-seg")
    objective = PrototypeDetection(model).double()
    x = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    boxes = torch.tensor([[[2.0, 3, 20, 25], [10, 12, 60, 31]], [[5, 5, 28, 30], [0, 0, 0, 0]]], dtype=torch.float64)
    labels = torch.tensor([[0, 2], [1, -1]])
    masks = torch.rand(2, 2, 8, 16, dtype=torch.float64)
    sent = {"image": x, "boxes": boxes, "labels": labels, "masks": masks}
    parts = objective(sent)
    raw, coefficients, prototypes = objective.predict_parts(sent)
    points, strides = objective.make_grid(sent)
    found, (rows, places, items, quality, total) = objective.measure(
        sent, *decode(raw, model.bins, points, strides), points, strides
    )
    torch.testing.assert_close({name: parts[name] for name in found}, found)
    want = 0.0
    for row, place, item, weight in zip(rows.tolist(), places.tolist(), items.tolist(), quality.tolist()):
        left, top, right, bottom = boxes[row, item].tolist()
        lost, cells = 0.0, 0
        for i in range(8):
            for j in range(16):
                if 4 * j + 4 > left and 4 * j < right and 4 * i + 4 > top and 4 * i < bottom:
                    z = sum(
                        float(c) * float(p)
                        for c, p in zip(coefficients[row, place].detach(), prototypes[row, :, i, j].detach())
                    )
                    lost += math.log1p(math.exp(z)) - z * float(masks[row, item, i, j])
                    cells += 1
        want += weight * lost / cells
    assert len(rows) and float(parts["mask"].detach()) == pytest.approx(want / float(total), rel=1e-6)
    total = sum(objective.weights[n] * float(part.detach()) for n, part in parts.items() if n != "loss")
    assert float(parts["loss"].detach()) == pytest.approx(total, rel=1e-6)
    parts["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    few = PrototypeDetection(model, max_masks=1).double()(sent)
    assert 0 < few["mask"].item() != parts["mask"].item()


def test_loss_without_objects_is_finite():
    model = tiny("yolov8-seg", torch.float32)
    sent = {
        "image": torch.randn(1, 3, 32, 32),
        "boxes": torch.zeros(1, 1, 4),
        "labels": torch.tensor([[-1]]),
        "masks": torch.zeros(1, 1, 8, 8),
    }
    parts = PrototypeDetection(model)(sent)
    assert parts["mask"].item() == 0 and parts["loss"].isfinite()
    assert find_cells(torch.tensor([[5.0, 1, 5.5, 1.2]]), (2, 3), 4.0).tolist() == [[[False, True, False], [False] * 3]]


def test_masks_belong_to_their_detection():
    model = tiny("yolov8-seg", torch.float32)
    objective = PrototypeDetection(model, max_detections=5)
    sent = {"image": batch("yolov8-seg", 2, torch.float32)[0]}
    found = objective.outputs(sent)
    raw, coefficients, prototypes = objective.predict_parts(sent)
    for row in range(2):
        for d in range(int((found["labels"][row] >= 0).sum())):
            scores = raw[row, :, 16 + found["labels"][row, d]].sigmoid()
            match = (scores == found["scores"][row, d]).nonzero()[0, 0]
            want = (coefficients[row, match][:, None, None] * prototypes[row]).sum(0)
            torch.testing.assert_close(found["masks"][row, d], want)


def test_ranked_masks_equal_a_loop():
    torch.manual_seed(0)
    logits, masks = torch.randn(1, 4, 4), torch.randn(1, 4, 3, 5)
    masks[0, 3] = -1.0  # nothing
    found = rank_masks(logits, masks, 20)
    rated = []
    for q in range(4):
        powers = logits[0, q].exp()
        inside = masks[0, q] > 0
        sure = float(masks[0, q][inside].sigmoid().mean()) if inside.any() else 0.0
        rated += [(float(powers[k] / powers.sum()) * sure, k, q) for k in range(3)]
    rated.sort(key=lambda one: -one[0])
    assert found["scores"].shape == (1, 20) and (found["labels"][0, 9:] == -1).all()
    for d, (score, label, query) in enumerate(rated[:9]):
        assert float(found["scores"][0, d]) == pytest.approx(score, rel=1e-5) and found["labels"][0, d] == label
        torch.testing.assert_close(found["masks"][0, d], masks[0, query])


def test_set_of_instances_is_trained_as_a_set():
    model = tiny("mask2former")
    (x,) = batch("mask2former", 2)
    size = model.mask_size(*x.shape[2:])
    masks = torch.rand(2, 2, *size, dtype=torch.float64)
    labels = torch.tensor([[0, 2], [1, -1]])
    parts = MaskSetInstances(model)({"image": x, "masks": masks, "labels": labels})
    logits, found = (torch.stack(p) for p in zip(*model.predict_layers(x)))
    want = MaskSet()(
        logits, found.flatten(3), labels, masks.flatten(2), torch.ones(2, masks[0, 0].numel(), dtype=torch.float64)
    )
    torch.testing.assert_close(parts, want)


@torch.no_grad()
def test_instances_equal_those_of_transformers():
    """Labels, masks and scores of the same logits; there masks are enlarged to 384 x 384 first, which these logits have already."""
    from tv import transformers

    torch.manual_seed(0)
    logits, masks = (
        torch.randn(2, 5, 4) * 2,
        torch.nn.functional.interpolate(torch.randn(2, 5, 6, 6), (384, 384), mode="bicubic"),
    )
    made = type("Found", (), {"class_queries_logits": logits, "masks_queries_logits": masks})()
    processor = transformers.Mask2FormerImageProcessorPil(num_labels=3)
    theirs = processor.post_process_instance_segmentation(made, threshold=0.0, return_binary_maps=True)
    ours = rank_masks(logits, masks, 5)
    for i, one in enumerate(theirs):
        mine = {(int(k), round(float(s), 4)): m > 0 for k, s, m in zip(ours["labels"][i], ours["scores"][i], ours["masks"][i])}
        assert len(one["segments_info"]) == 5
        for segment, mask in zip(one["segments_info"], one["segmentation"]):
            near = [m for (k, s), m in mine.items() if k == segment["label_id"] and abs(s - segment["score"]) < 1e-3]
            assert any(torch.equal(m, mask > 0) for m in near)


def test_names_of_published_files():
    with torch.device("meta"):
        model = create("yolov8n-seg")
        state = weights.translate(model.state_dict(), weights.get_tables(model)["ultralytics"], reverse=True)
    shapes = {
        "model.22.cv4.0.0.conv.weight": (32, 64, 3, 3),
        "model.22.cv4.2.2.weight": (32, 32, 1, 1),
        "model.22.proto.cv1.conv.weight": (64, 64, 3, 3),
        "model.22.proto.upsample.weight": (64, 64, 2, 2),
        "model.22.proto.upsample.bias": (64,),
        "model.22.proto.cv3.bn.running_var": (32,),
        "model.22.cv3.0.2.bias": (80,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert sum(t.numel() for n, t in state.items() if "running" not in n and "num_b" not in n) == 3_409_968


# ---------------------------------------------------------------------------------------------- scores and runs


def test_scores_of_truth_and_of_shifted_masks(tmp_path):
    task, data = prepare(coco(tmp_path, 12))
    targets = task.targets(data)
    right = {**targets, "scores": (targets["labels"] >= 0).astype(float)}
    assert task.score(right, targets) == {"map": pytest.approx(1), "map50": pytest.approx(1)}
    codes = [
        [encode_mask(np.roll(decode_mask(m), 3, 1)) for m, k in zip(unpack_masks(targets, i), targets["labels"][i]) if k >= 0]
        for i in range(12)
    ]
    moved = {**right, **pack_masks(codes, targets["size"].tolist(), targets["labels"].shape[1])}
    overlaps = {
        k: [
            overlap_masks([a], [b], np.array([False]))[0, 0]
            for i in range(12)
            for a, b, label in zip(unpack_masks(moved, i), unpack_masks(targets, i), targets["labels"][i])
            if label == k
        ]
        for k in (0, 1)
    }
    assert 0 < task.score(moved, targets)["map"] < 0.9 and min(map(min, overlaps.values())) > 0.4
    boxes = task.score({**right, "boxes": right["boxes"] + 100}, targets)
    assert boxes["map"] == pytest.approx(1)  # boxes do not count


def test_objects_without_an_outline_are_neither_trained_nor_scored(tmp_path):
    file = coco(tmp_path, 12) / "annotations" / "instances.json"
    document = json.loads(file.read_text())
    document["annotations"][1].pop("segmentation")
    file.write_text(json.dumps(document))
    task, data = prepare(tmp_path)
    targets = task.targets(data)
    assert targets["crowd"].sum() == 1 and targets["crowd"][0, 1]
    made = task.batches(data, card("yolov8-seg"), Settings(augmentation="none")).make(np.arange(1), torch.Generator())
    assert (made["labels"][0] >= 0).sum() == 1
    found = {**targets, "scores": (targets["labels"] >= 0).astype(float)}
    found["labels"] = np.where(targets["crowd"], -1, targets["labels"])
    assert task.score(found, targets)["map"] == pytest.approx(1)
    alone = replace(data, rows=data.rows[:0])
    with pytest.raises(DataError, match="no box"):
        InstanceSegmentation.check_split(alone, "test", task.options)


def test_baselines_are_scored(tmp_path):
    task, data = prepare(coco(tmp_path))
    targets = task.targets(data)
    for baseline in task.baselines(data, data):
        assert 0 <= task.score(baseline.outputs, targets)["map50"] < 0.9


@pytest.mark.parametrize(
    ("form", "name"), [pytest.param(coco, "yolov8-seg-test", marks=pytest.mark.slow), (cvat, "mask2former-test")]
)
def test_network_trains_and_predicts(form, name, tmp_path):
    source = form(tmp_path / "data")
    settings = {**SETTINGS, "task.side": 64}
    run = fit(str(source), task="instance-segmentation", model=name, minutes=2, out=tmp_path / "run", settings=settings)
    assert set(run.scores) == {"map", "map50"}
    (answer,) = run.predict([str(source / "images" / "p001.png")], threshold=0.0)
    assert answer["objects"]
    for one in answer["objects"]:
        mask = decode_mask({"size": one["mask"]["size"], "counts": one["mask"]["counts"].encode()})
        assert mask.shape == (HIGH, WIDE) and one["label"] in ("cat", "dog")
        left, top, right, bottom = one["box"]
        if mask.any():
            box = find_box(mask)
            assert box[0] >= left - 1 and box[1] >= top - 1 and box[2] <= right + 1 and box[3] <= bottom + 1
    Image.open(__import__("io").BytesIO(answer["picture"].content)).verify()
    steps = [step.name for step in run.signature.postprocessing]
    assert "encode_masks" in steps and ("combine_prototypes" in steps) == (name == "yolov8-seg-test")
    assert run.evaluate(str(source))["scores"].keys() == run.scores.keys()
    report = (run.path / "report.html").read_text()
    assert "True masks on the left" in report


@pytest.mark.slow
def test_sample_reaches_its_floor(tmp_path):
    run = fit(
        "shapes",
        model="yolov8-seg-pico",
        minutes=9,
        out=tmp_path / "run",
        settings={"steps": 500, "batch": 8, "precision": "float32"},
    )
    assert run.scores["map50"] > 0.6 and sample("shapes").is_dir()

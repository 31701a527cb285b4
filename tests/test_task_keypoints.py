"""Keypoint detection: readers, damage, the loss and its decoding against loops, OKS, augmentation, and a run."""

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
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.data.media.boxes import Skeleton
from fieldguide.data.preprocessing.augmentation import BoxAugmentation, mirror_boxes, warp
from fieldguide.data.samples import path as sample
from fieldguide.metrics.detection import average_precision
from fieldguide.models.registry import card, create
from fieldguide.objectives.detection import make_grid
from fieldguide.objectives.pose_detection import PoseDetection, decode_keypoints, keypoint_similarity
from fieldguide.tasks import infer_task
from fieldguide.tasks.vision.keypoint_detection import COCO_SIGMAS, KeypointDetection, choose_sigmas
from fieldguide.tasks.vision.keypoint_report import match_poses, measure_similarity
from test_models import batch, tiny

NAMES = ["tail", "left_paw", "right_paw"]
SETTINGS = {"steps": 4, "batch": 4, "evaluate": 4, "precision": "float32", "channels_last": False}


def scene(i: int) -> list[tuple[int, float, float, float, float, list[float]]]:
    """Return class, left, top, right, bottom and keypoints of the objects of image i."""
    x, y = 4 + i % 7, 3 + i % 5
    first = (i % 2, x, y, x + 16, y + 12, [x + 1, y + 6, 2, x + 10, y + 11, 1, 0, 0, 0])
    return [first] if i % 3 else [first, (1, 25, 10, 38, 28, [26, 12, 2, 30, 27, 2, 36, 26, 2])]


def picture(file, i):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(i).integers(0, 90, (30, 40, 3), np.uint8)
    for kind, left, top, right, bottom, _ in scene(i):
        pixels[int(top) : int(bottom), int(left) : int(right), kind] = 220
    Image.fromarray(pixels).save(file)


def yolo(root, count=60, values=3, head=f"kpt_shape: [3, 3]\nflip_idx: [0, 2, 1]\nkpt_names: {{0: {NAMES}, 1: {NAMES}}}\n"):
    (root / "labels").mkdir(parents=True)
    for i in range(count):
        picture(root / "images" / f"p{i:03d}.png", i)
        lines = []
        for kind, left, top, right, bottom, points in scene(i):
            own = [v / (40, 30, 1)[k % 3] for k, v in enumerate(points) if k % 3 < values]
            box = ((left + right) / 80, (top + bottom) / 60, (right - left) / 40, (bottom - top) / 30)
            lines.append(" ".join(map(str, (kind, *box, *own))))
        (root / "labels" / f"p{i:03d}.txt").write_text("\n".join(lines) + "\n")
    (root / "data.yaml").write_text(f"train: images\nnames: [cat, dog]\n{head}")
    return root


def coco(root, count=60):
    for i in range(count):
        picture(root / "images" / f"p{i:03d}.png", i)
    notes = [(i, *one) for i in range(count) for one in scene(i)]
    posed = {"keypoints": NAMES, "skeleton": [[1, 2], [1, 3]]}
    document = {
        "images": [{"id": i, "file_name": f"p{i:03d}.png", "width": 40, "height": 30} for i in range(count)],
        "categories": [{"id": 7, "name": "cat", **posed}, {"id": 9, "name": "dog", **posed}],
        "annotations": [
            {"id": n, "image_id": i, "category_id": (7, 9)[k], "bbox": [a, b, c - a, d - b], "iscrowd": 0, "keypoints": points}
            for n, (i, k, a, b, c, d, points) in enumerate(notes)
        ],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "person_keypoints.json").write_text(json.dumps(document))
    return root


def change(root, edit):
    file = root / "annotations" / "person_keypoints.json"
    document = json.loads(file.read_text())
    edit(document)
    file.write_text(json.dumps(document))
    return read(root)


# ---------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("form", [yolo, coco])
def test_coco_and_yolo_give_the_same_keypoints(form, tmp_path):
    data = read(form(tmp_path))
    assert infer_task(data)[0] is KeypointDetection
    skeleton = data.context["skeleton"]
    assert skeleton.names == tuple(NAMES) and skeleton.mirrored == (0, 2, 1)
    assert skeleton.lines == (((0, 1), (0, 2)) if form is coco else ())
    for i, objects in enumerate(data.rows["objects"].to_list()):
        for one, (*_, points) in zip(objects, scene(i), strict=True):
            assert one["keypoints"] == pytest.approx(points)


def test_yolo_without_visibility(tmp_path):
    """A keypoint at 0, 0 is not labeled; names and mirrored order may be missing."""
    data = read(yolo(tmp_path, values=2, head="kpt_shape: [3, 2]\n"))
    assert data.context["skeleton"] == Skeleton(("point 1", "point 2", "point 3"))
    assert data.rows["objects"][1][0]["keypoints"][2::3] == [2, 2, 0]


def damages():
    some = lambda document, i=0: document["annotations"][i]
    yield "malformed-keypoints", lambda d: some(d).update(keypoints=[1, 2, 2])
    yield "malformed-keypoints", lambda d: some(d).update(keypoints=["a"] * 9)
    yield "keypoint-visibility", lambda d: some(d)["keypoints"].__setitem__(2, 7)
    yield "keypoint-outside", lambda d: some(d)["keypoints"].__setitem__(0, 400)
    yield "keypoint-far", lambda d: some(d, 1).update(bbox=[30, 20, 5, 5])
    yield "no-keypoints", lambda d: some(d).update(keypoints=[0] * 9)
    yield "keypoint-definitions", lambda d: d["categories"][1].update(keypoints=["a", "b", "c"])
    yield "degenerate-box", lambda d: some(d).update(bbox=[1, 1, 0, 0])


@pytest.mark.parametrize(("check", "edit"), [pytest.param(c, e, id=f"{c}-{n}") for n, (c, e) in enumerate(damages())])
def test_damage_is_found(check, edit, tmp_path):
    data = change(coco(tmp_path, 12), edit)
    assert [f.check for f in data.findings if f.check.startswith(("mal", "key", "no-k", "deg"))] == [check]
    assert all(len(o["keypoints"]) == 9 for objects in data.rows["objects"].to_list() for o in objects if o["keypoints"])


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("kpt_shape: [3, 4]\n", "kpt_shape"),
        ("kpt_shape: [3, 3]\nflip_idx: [0, 1, 1]\n", "flip_idx"),
        ("kpt_shape: [3, 3]\nkpt_names: [a, b]\n", "kpt_names"),
    ],
)
def test_contradictions_in_data_yaml_are_errors(head, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read(yolo(tmp_path, 3, head=head))


def test_data_without_keypoints_is_rejected(tmp_path):
    root = coco(tmp_path, 12)
    data = change(root, lambda d: [c.pop("keypoints") for c in d["categories"]])
    assert infer_task(data)[0].name == "object-detection"
    assert "kpt_shape" in KeypointDetection.missing_requirements(data)
    root = yolo(tmp_path / "other", 12)
    for file in (root / "labels").iterdir():
        file.write_text("0 0.5 0.5 0.2 0.2 0 0 0 0 0 0 0 0 0\n")
    data = read(root)
    assert all(o["keypoints"][2::3] == [0, 0, 0] for row in data.rows["objects"].to_list() for o in row)
    data = replace(data, context={**data.context, "classes": ["cat"]})
    with pytest.raises(DataError, match="no object of the 12 training images has a labeled keypoint"):
        KeypointDetection.check_split(data, "training", KeypointDetection.options_from({}))


def test_tolerances():
    assert choose_sigmas(tuple(COCO_SIGMAS), "") == tuple(COCO_SIGMAS.values()) and len(COCO_SIGMAS) == 17
    assert choose_sigmas(("nose", "tail"), "") == (0.05, 0.05) and choose_sigmas(("a", "b"), "0.1") == (0.1, 0.1)
    for wrong in ("a", "0.1,0.2,0.3", "-1", "nan"):
        with pytest.raises(SettingsError, match=r"task\.sigmas"):
            choose_sigmas(("a", "b"), wrong)


# ---------------------------------------------------------------------------------------------- augmentation


def test_keypoints_move_with_their_image():
    """A bright pixel under a keypoint is under it afterwards; mirrored ones change sides."""
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 64, 64)
    image[0, 0, 20, 30], image[0, 0, 40, 10] = 255, 100
    boxes = torch.tensor([[[5.0, 10, 50, 60, 30.5, 20.5, 10.5, 40.5]]])
    boxes = torch.cat([boxes, torch.full((1, 1, 2), float("nan"))], -1)
    labels = torch.zeros(1, 1, dtype=torch.int64)
    moved, found, _ = warp(image, boxes, labels, torch.tensor([1.0]), torch.tensor([[3.0, -5.0]]), 64, fill=0)
    for x, y, value in ((*found[0, 0, 4:6], 255), (*found[0, 0, 6:8], 100)):
        assert moved[0, 0, int(y), int(x)] == pytest.approx(value, abs=1)
    assert found[0, 0, 8:].isnan().all()
    flipped, mirrored, _ = mirror_boxes(image, boxes, labels, torch.tensor([True]), (1, 0, 2))
    assert mirrored[0, 0, 4:8].tolist() == [53.5, 40.5, 33.5, 20.5] and flipped[0, 0, 40, 53] == 100
    fetch = lambda index: (
        image.expand(len(index), -1, -1, -1),
        boxes.expand(len(index), -1, -1),
        labels.expand(len(index), -1),
    )
    _, four, _ = BoxAugmentation(mosaic=1.0, order=(1, 0, 2))(fetch, np.arange(2), 2, torch.Generator().manual_seed(0))
    assert four.shape[-1] == 10


# ---------------------------------------------------------------------------------------------- objective


def test_decoding_equals_its_description():
    points, strides = make_grid(64, 96, (8, 16, 32), torch.device("cpu"))
    raw = torch.randn(len(points), 6)
    values = raw.tolist()
    places, logits = decode_keypoints(raw, points, strides)
    for a in (0, 7, 50, 96, 100, len(points) - 1):
        s = float(strides[a])
        column, row = (points[a] / s - 0.5).tolist()
        for k in range(2):
            want = [(2 * values[a][3 * k] + column) * s, (2 * values[a][3 * k + 1] + row) * s]
            assert places[a, k].tolist() == pytest.approx(want, rel=1e-4, abs=1e-4)
            assert logits[a, k] == raw[a, 3 * k + 2]


def slow_oks(found, true, area, sigmas):
    parts = [
        math.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * area * (2 * s) ** 2))
        for (x, y), (a, b), s in zip(found, true, sigmas)
        if not math.isnan(a)
    ]
    return sum(parts) / max(len(parts), 1)


def test_similarity_equals_a_loop_and_pycocotools():
    torch.manual_seed(0)
    found, true, area, sigmas = torch.rand(4, 3, 2) * 20, torch.rand(4, 3, 2) * 20, torch.rand(4) * 400 + 50, [0.1, 0.05, 0.2]
    true[1, 2], true[3] = float("nan"), float("nan")
    got = keypoint_similarity(found, true, area, torch.tensor(sigmas))
    for i in range(4):
        assert float(got[i]) == pytest.approx(slow_oks(found[i].tolist(), true[i].tolist(), float(area[i]), sigmas), rel=1e-5)
    points = torch.cat([torch.nan_to_num(true), true.isfinite()[..., :1]], -1)
    other = measure_similarity(torch.cat([found, found[..., :1]], -1).numpy(), points.numpy(), area.numpy(), sigmas)
    np.testing.assert_allclose(np.diag(other), got, rtol=1e-5)
    assert match_poses(np.array([[0.9, 0.6], [0.8, 0.7], [0.6, 0.6]])) == [(0, 0), (1, 1)]


def test_loss_equals_a_loop():
    torch.manual_seed(0)
    model = tiny("yolov8-pose")
    objective = PoseDetection(model, sigmas=[0.1, 0.05]).double()
    x = batch("yolov8-pose", 2)[0]
    boxes = torch.tensor([[[2.0, 3, 20, 25], [10, 12, 30, 31]], [[5, 5, 28, 30], [0, 0, 0, 0]]], dtype=torch.float64)
    labels = torch.tensor([[0, 2], [1, -1]])
    keypoints = torch.rand(2, 2, 2, 2, dtype=torch.float64) * 30
    keypoints[0, 1, 1] = float("nan")
    sent = {"image": x, "boxes": boxes, "labels": labels, "keypoints": keypoints}
    parts = objective(sent)
    raw, poses, points, strides = objective.split_grid(sent)
    from fieldguide.objectives.detection import decode

    found, (rows, places, items, weights_, total) = objective.measure(
        sent, *decode(raw, model.bins, points, strides), points, strides
    )
    torch.testing.assert_close({name: parts[name] for name in found}, found)
    values = {name: float(part.detach()) for name, part in parts.items()}
    pose = labeled = 0.0
    where, logits = decode_keypoints(poses, points, strides)
    for row, place, item, weight in zip(rows, places, items, weights_.tolist()):
        true = keypoints[row, item]
        left, top, right, bottom = boxes[row, item].tolist()
        area = (right - left) * (bottom - top) / 2
        pose += weight * (1 - slow_oks(where[row, place].tolist(), true.tolist(), area, [0.1, 0.05]))
        for k in range(2):
            p = float(logits[row, place, k].detach().sigmoid())
            labeled -= weight * math.log(p if not math.isnan(true[k, 0]) else 1 - p) / 2
    assert len(rows) and values["pose"] == pytest.approx(pose / float(total), rel=1e-6)
    assert values["labeled"] == pytest.approx(labeled / float(total), rel=1e-6)
    assert values["loss"] == pytest.approx(sum(objective.weights[n] * values[n] for n in objective.weights), rel=1e-6)
    parts["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_keypoints_belong_to_their_detection():
    model = tiny("yolov8-pose", torch.float32)
    objective = PoseDetection(model, sigmas=[0.1, 0.05], max_detections=5)
    sent = {"image": batch("yolov8-pose", 2, torch.float32)[0]}
    found = objective.outputs(sent)
    raw, poses, points, strides = objective.split_grid(sent)
    where, _ = decode_keypoints(poses, points, strides)
    for row in range(2):
        for d in range(5):
            if found["labels"][row, d] >= 0:
                scores = raw[row, :, 16 + found["labels"][row, d]].sigmoid()
                match = (scores == found["scores"][row, d]).nonzero()[0, 0]
                torch.testing.assert_close(found["keypoints"][row, d, :, :2], where[row, match])


def test_names_of_published_files(tmp_path):
    """Those of YOLOv8 and `cv4` for keypoints; the counts are those of the documentation."""
    with torch.device("meta"):
        model = create("yolov8n-pose")
        state = weights.translate(model.state_dict(), weights.get_tables(model)["ultralytics"], reverse=True)
    shapes = {
        "model.22.cv4.0.0.conv.weight": (51, 64, 3, 3),
        "model.22.cv4.1.1.bn.running_var": (51,),
        "model.22.cv4.2.2.weight": (51, 51, 1, 1),
        "model.22.cv3.0.2.bias": (1,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert sum(t.numel() for n, t in state.items() if "running" not in n and "num_b" not in n) == 3_295_470


# ---------------------------------------------------------------------------------------------- scores and runs


def test_average_precision_of_keypoints():
    """1 for the truth; an object without keypoints is not scored; a shifted pose is found at low thresholds only."""
    points = np.array([[[[10.0, 10, 2], [20, 20, 2]], [[0, 0, 0], [0, 0, 0]]]])
    truth = {
        "boxes": np.array([[[5.0, 5, 25, 25], [30, 30, 40, 40]]]),
        "labels": np.array([[0, 0]]),
        "crowd": np.zeros((1, 2), bool),
        "keypoints": points,
        "area": np.array([[200.0, 50.0]]),
    }
    found = {"boxes": truth["boxes"][:, :1], "labels": np.array([[0]]), "scores": np.array([[0.9]]), "keypoints": points[:, :1]}
    arguments = {"kind": "keypoints", "sigmas": (0.1, 0.1)}
    assert average_precision(found, truth, 1, **arguments)["map"] == pytest.approx(1)
    moved = found["keypoints"] + np.array([3.0, 0, 0])
    oks = math.exp(-9 / (2 * 200 * 0.04))
    want = sum(oks >= t for t in np.arange(0.5, 0.96, 0.05)) / 10
    assert average_precision({**found, "keypoints": moved}, truth, 1, **arguments)["map"] == pytest.approx(want)


def test_baselines_know_boxes_but_not_poses(tmp_path):
    options = KeypointDetection.options_from({"side": 64})
    data = KeypointDetection.build_examples(read(coco(tmp_path)), options)
    task = KeypointDetection.fit(data, options)
    targets = task.targets(data)
    mean, boxed = task.baselines(data, data)
    assert task.score(boxed.outputs, targets)["map50"] >= 0.5 > task.score(mean.outputs, targets)["map"]
    assert task.score({**targets, "scores": (targets["labels"] >= 0).astype(float)}, targets)["map"] == pytest.approx(1)
    assert task.options.flip == 0.5
    plain = KeypointDetection.fit(replace(data, context={**data.context, "skeleton": Skeleton(tuple(NAMES))}), options)
    assert plain.options.flip == 0 and any("not mirrored" in note for note in plain.notes)
    made = task.batches(data, card("yolov8-pose"), Settings()).make(np.arange(4), torch.Generator())
    assert made["keypoints"].shape == (4, 2, 3, 2) and made["boxes"].shape == (4, 2, 4)
    exact = task.batches(data, card("yolov8-pose"), Settings(augmentation="none")).make(np.arange(1), torch.Generator())
    scale = 64 / 40
    assert exact["keypoints"][0, 0, 0].tolist() == pytest.approx([scale * 5, scale * 9 + 8], abs=0.1)


@pytest.mark.parametrize("form", [yolo, pytest.param(coco, marks=pytest.mark.slow)])
def test_network_trains_and_predicts(form, tmp_path):
    source = form(tmp_path / "data")
    run = fit(str(source), model="yolov8-pose-test", minutes=2, out=tmp_path / "run", settings={**SETTINGS, "task.side": 64})
    assert set(run.scores) == {"map", "map50"} and run.task.skeleton.names == tuple(NAMES)
    (answer,) = run.predict([str(source / "images" / "p001.png")], threshold=0.0)
    assert answer["objects"] and all([p["name"] for p in o["keypoints"]] == NAMES for o in answer["objects"])
    steps = [step.name for step in run.signature.postprocessing]
    assert steps[:2] == ["decode_boxes", "decode_keypoints"]
    assert run.evaluate(str(source))["scores"].keys() == run.scores.keys()
    assert "By keypoint" in (run.path / "report.html").read_text()


@pytest.mark.slow
def test_sample_reaches_its_floor(tmp_path):
    run = fit("puppets", minutes=5, out=tmp_path / "run", settings={"steps": 450, "batch": 8, "precision": "float32"})
    assert run.scores["map50"] > 0.85 and sample("puppets").is_dir()

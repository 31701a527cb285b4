"""Detection as a task: batches whose boxes match their images, scores, predictions, and a complete run."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fieldguide.automl.fit import fit
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.data.samples import path as sample
from fieldguide.metrics.detection import average_precision, bootstrap
from fieldguide.models.registry import card
from fieldguide.tasks.base import Media
from fieldguide.tasks.vision.detection_report import build_elements, match_boxes
from fieldguide.tasks.vision.object_detection import ObjectDetection


def folder(root, count=12):
    """Write wide and tall black images with one white rectangle, the object."""
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        width, height = (90, 50) if i % 2 else (40, 70)
        w, h = rng.integers(15, 30, 2)
        x, y = rng.integers(0, width - w), rng.integers(0, height - h)
        pixels = np.zeros((height, width), np.uint8)
        pixels[y : y + h, x : x + w] = 255
        Image.fromarray(pixels).convert("RGB").save(root / "images" / f"{i:02d}.png")
        (root / "labels" / f"{i:02d}.txt").write_text(
            f"{i % 3} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}\n"
        )
    (root / "data.yaml").write_text("names: [a, b, c]\n")
    return root


def learnt(data, **options):
    options = ObjectDetection.options_from(options)
    data = ObjectDetection.build_examples(data, options)
    return ObjectDetection.fit(data, options), data


def test_mosaics_if_requested(tmp_path):
    data, light, standard = read(folder(tmp_path)), Settings(augmentation="light"), Settings(augmentation="standard")
    for options, expected in (({}, [0, 0.5]), ({"mosaic": 1.0}, [1, 1]), ({"mosaic": 0.0}, [0, 0])):
        task, *_ = learnt(data, **options)
        assert [task.augment(settings).mosaic for settings in (light, standard)] == expected


@pytest.mark.parametrize("kept", [True, False])
def test_boxes_match_their_images(tmp_path, kept, monkeypatch):
    """Images are black on white padding and the object is white, so the pixels show where its box must be."""
    if not kept:
        monkeypatch.setattr("fieldguide.tasks.vision.object_detection.MAX_IMAGE_CACHE_FRACTION_OF_RAM", 0)
    task, data = learnt(read(folder(tmp_path)), side=64)
    batches = task.batches(data, card("yolov8"), Settings())
    batch = batches.make(np.arange(12), torch.Generator())
    assert batch["image"].shape == (12, 3, 64, 64) and batch["image"].max() == 1 and batch["labels"].max() == 2
    for i in range(12):
        left, top, right, bottom = batch["boxes"][i, 0].round().int().tolist()
        inside = batch["image"][i, 0, top + 1 : bottom - 1, left + 1 : right - 1]
        assert inside.mean() > 0.9 and inside.numel() > 50 and batch["labels"][i, 0] == i % 3
    plain = task.batches(data, card("yolov8"), Settings()).make(np.arange(3), None)
    assert {"image", "scale", "corner", "size"} == set(plain) and plain["size"].tolist() == [[40, 70], [90, 50], [40, 70]]
    changed = task.batches(data, card("yolov8"), Settings(augmentation="standard"))
    first, again = (changed.make(np.arange(4), torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["boxes"], again["boxes"])
    assert not torch.equal(first["image"], changed.make(np.arange(4), torch.Generator().manual_seed(2))["image"])


def test_predictions_are_in_original_pixels(tmp_path):
    task, data = learnt(read(folder(tmp_path)), side=64)
    truth = task.targets(data)
    task.predict_options = task.parse_predict_options({"threshold": "0.3"})
    paths = task.predict_batches(data, card("yolov8")).meta["path"]
    assert paths.tolist() == data.rows["image"].to_list()
    outputs = {**truth, "scores": np.where(np.arange(12)[:, None] < 6, 0.9, 0.2) * (truth["labels"] >= 0), "path": paths}
    answers = task.format_predictions(outputs)
    first = data.rows["objects"][0][0]
    assert answers[0]["objects"][0]["box"] == pytest.approx([first[s] for s in ("left", "top", "right", "bottom")], abs=0.1)
    assert answers[1]["found"] == "1 b" and answers[7] == {**answers[7], "found": "nothing", "objects": []}
    assert isinstance(answers[0]["picture"], Media)
    assert Image.open(io.BytesIO(answers[0]["picture"].content)).size == (40, 70)
    model = card("yolov8").make(card("yolov8").resolve_config("yolov8-test", **task.model_dims()))
    objective = task.objective(model, card("yolov8"), Settings())
    objective.confidence = 0.0
    found = task.predict_step(objective)(task.predict_batches(data, card("yolov8")).make(np.arange(2), None))
    assert (found["boxes"][0, :, 0::2] <= 40).all() and found["boxes"][1, :, 0::2].max() > 64  # beyond the square's side
    assert (found["boxes"][1, :, 1::2] <= 50).all()


def test_scores_baselines_and_threshold(tmp_path):
    task, data = learnt(read(folder(tmp_path)), side=64)
    truth = task.targets(data)
    perfect = {**truth, "scores": np.where(truth["labels"] >= 0, 0.6, 0.0)}
    assert task.score(perfect, truth) == {"map": pytest.approx(1), "map50": pytest.approx(1)}
    low, high = task.intervals(perfect, truth)["map"]
    assert low == pytest.approx(1) and high == pytest.approx(1)
    mean, most = task.baselines(data, data)
    assert mean.outputs["boxes"].shape == (12, 3, 4) and most.outputs["labels"].tolist() == [[0]] * 12
    first = [
        np.array([o[s] for s in ("left", "top", "right", "bottom")]) / np.tile(size, 2)
        for (o,), size in zip(data.rows["objects"].to_list()[::3], [(40, 70), (90, 50)] * 2)
    ]
    np.testing.assert_allclose(mean.outputs["boxes"][1, 0] / [90, 50, 90, 50], np.mean(first, 0), rtol=1e-5)
    assert mean.outputs["scores"][0] == pytest.approx([1 / 3] * 3)
    # Right answers with 0.6, wrong ones with 0.3: the threshold must lie between.
    wrong = {
        "boxes": np.concatenate([truth["boxes"], truth["boxes"] * 0 + [0, 0, 3, 3]], 1),
        "scores": np.concatenate([perfect["scores"], np.full((12, 1), 0.3)], 1),
        "labels": np.concatenate([truth["labels"], truth["labels"]], 1),
    }
    task.calibrate(wrong, truth)
    assert 0.3 < task.threshold <= 0.6
    shown = build_elements(data.rows["image"].to_list(), [str(i) for i in range(12)], wrong, truth, task.names, 0.2)
    assert shown["Classes"][0].rows[0][:5] == ("a", 4, 4, 0, 4) and "12 wrong" not in shown["Images"][0].pictures[0].caption
    assert "1 true, 2 predicted, 1 wrong" in shown["Images"][0].pictures[0].caption


def test_bootstrap_equals_matching_each_sample():
    """Matching once and resampling afterwards equals resampling first."""
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 40, (20, 3, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 30, (20, 3, 2))], -1)
    truth = {"boxes": boxes, "labels": rng.integers(-1, 2, (20, 3)), "crowd": np.zeros((20, 3), dtype=bool)}
    found = {
        "boxes": boxes + rng.normal(0, 3, boxes.shape),
        "labels": rng.integers(0, 2, (20, 3)),
        "scores": rng.random((20, 3)),
    }
    draws, again = bootstrap(found, truth, 2, repeats=3, seed=5), np.random.default_rng(5)
    for scores in draws:
        rows = again.integers(0, 20, 20)
        want = average_precision({k: v[rows] for k, v in found.items()}, {k: v[rows] for k, v in truth.items()}, 2)
        assert (scores["map"], scores["map50"]) == (pytest.approx(want["map"]), pytest.approx(want["map50"]))
    assert len({d["map"] for d in draws}) == 3


def test_intervals_of_many_images_use_a_subset(monkeypatch, tmp_path):
    """Resampled from a quarter of the images and halved, they are about as wide as from all."""
    kind, rng, count = ObjectDetection, np.random.default_rng(2), 240
    data = kind.build_examples(read(folder(tmp_path)), kind.Options())
    task = kind.fit(data, kind.Options())
    corner = rng.uniform(0, 40, (count, 2, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(8, 30, (count, 2, 2))], -1)
    truth = {"boxes": boxes, "labels": rng.integers(0, 3, (count, 2)), "crowd": np.zeros((count, 2), dtype=bool)}
    found = {
        "boxes": boxes + rng.normal(0, 1.5, boxes.shape),
        "scores": rng.random((count, 2)),
        "labels": np.where(rng.random((count, 2)) < 0.8, truth["labels"], rng.integers(0, 3, (count, 2))),
    }
    low, high = task.intervals(found, truth)["map"]
    monkeypatch.setattr("fieldguide.tasks.vision.object_detection.MAX_BOOTSTRAP_IMAGES", 60)
    some = task.intervals(found, truth)["map"]
    assert sum(some) == pytest.approx(low + high) and 0.6 < (some[1] - some[0]) / (high - low) < 1.6


def test_matching_is_one_to_one():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 0, 10, 10.0]])
    labels, true = np.array([0, 0, 0, 1]), np.array([[0, 0, 10, 10], [40, 40, 90, 90], [0, 0, 10, 10.0]])
    right, met = match_boxes(boxes, labels, true, np.array([0, 0, 2]), np.array([False, True, False]))
    assert right.tolist() == [True, False, True, False] and met.tolist() == [True, True, False]


def test_invalid_options_are_rejected(tmp_path):
    data = read(folder(tmp_path))
    for options, words in (
        ({"side": 50}, "task.side=50 must be a multiple of 32, for example 64"),
        ({"classes": "a,dog"}, "task.classes names 'dog', but"),
        ({"flip": "2"}, "must be between 0 and 1"),
    ):
        with pytest.raises(SettingsError, match=words):
            learnt(data, **options)
    task, some = learnt(data, classes="c,a")
    assert task.names == ["c", "a"] and task.targets(some)["labels"][:3, 0].tolist() == [1, -1, 0]
    assert ObjectDetection.missing_requirements(read("inked")) and not ObjectDetection.missing_requirements(data)
    (tmp_path / "data.yaml").write_text("names: [a, b, other]\n")
    whole, _ = learnt(data)
    with pytest.raises(DataError, match="has boxes of 'other', which are not classes of this model"):
        whole.read([tmp_path], answered=True)


@pytest.mark.slow
def test_network_learns_to_detect(tmp_path):
    run = fit(
        "scattered",
        model="yolov8-pico",
        minutes=2,
        out=tmp_path / "run",
        settings={
            "steps": 250,
            "precision": "float32",
            "channels_last": True,
            "evaluate": 250,
            "lr": 0.02,
            "batch": 8,
            "ema": 0.9,
            "augment": "none",
            "model.widths": "(8, 16, 24, 32, 48)",
            "task.side": 64,
            "task.classes": "0,1,6",
        },
    )
    assert run.scores["map50"] > FLOOR and run.scores["map"] > FLOOR / 3
    assert all(b["scores"]["map50"] < 0.05 for b in run.record["scores"]["baselines"])
    picture = sample("scattered") / "images" / "0001.png"
    (answer,) = run.predict([str(picture)], threshold=0.01)
    assert answer["objects"] and set(answer["objects"][0]) == {"label", "score", "box"} and answer["input"].endswith("0001.png")
    assert all(0 <= v <= 96 for o in answer["objects"] for v in o["box"]) and answer["found"] != "nothing"
    assert run.evaluate("scattered")["scores"] == pytest.approx(run.scores)
    assert "Precision and recall" in (run.path / "report.html").read_text()


FLOOR = 0.25  # mAP50 after a few seconds; the sample's default run reaches several times that

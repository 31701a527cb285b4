"""Every detector trains, predicts and is described by the same task, whatever its network returns."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from fieldguide import load, save
from fieldguide.automl.fit import NullCallback, fit, resume
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.classes import copy_classes, list_classes
from fieldguide.checkpoints.load import inspect_checkpoint
from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.data.samples import path as sample
from fieldguide.models.registry import card, cards, create
from fieldguide.objectives.detectors import DETECTORS
from fieldguide.tasks.vision.object_detection import ObjectDetection
from fieldguide.training.state import Interrupted
from test_tasks_resume import StopAt

NAMES = [name for name, known in cards().items() if known.output_types[0] in DETECTORS]
SETTINGS = {"steps": 4, "batch": 4, "evaluate": 4, "precision": "float32", "channels_last": False, "augment": "none"}
SMALL = {"task.side": 64, "task.classes": "0,1,6"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder with 60 images of the sample `scattered`."""
    source, root = sample("scattered"), tmp_path_factory.mktemp("images")
    shutil.copy(source / "data.yaml", root)
    for kind in ("images", "labels"):
        (root / kind).mkdir()
        for file in sorted((source / kind).iterdir())[:60]:
            shutil.copy(file, root / kind)
    return root


def some_images(images, count: int, **options):
    options = ObjectDetection.options_from({"side": 64, "classes": "0,1,6", **options})
    data = ObjectDetection.build_examples(read(images), options).take(np.arange(count))
    return ObjectDetection.fit(data, options), data


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ("rt-detr", "yolo11"))) for n in NAMES])
def test_detector_trains_and_predicts(name, images, tmp_path):
    run = fit(str(images), model=f"{name}-test", minutes=2, out=tmp_path / "run", settings={**SETTINGS, **SMALL})
    assert set(run.scores) >= {"map", "map50"}
    picture = sample("scattered") / "images" / "0001.png"
    (answer,) = run.predict([str(picture)], threshold=0.0)
    assert all(set(o) == {"label", "score", "box"} and 0 <= o["score"] <= 1 for o in answer["objects"])
    assert all(0 <= v <= 96 for o in answer["objects"] for v in o["box"])
    steps = [step.name for step in run.signature.postprocessing]
    assert steps[0] == "decode_boxes" and steps[-3:] == ["undo_letterbox", "threshold", "draw"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_loss_falls_on_one_batch(name, images):
    """The loss of the objective that the card gets, with boxes of real images."""
    task, data = some_images(images, 8)
    torch.manual_seed(0)
    model = create(f"{name}-test", **{k: v for k, v in task.model_dims().items() if card(name).accepts(k)})
    objective = task.objective(model, card(name), Settings()).train()
    batch = task.batches(data, card(name), Settings()).make(np.arange(8), torch.Generator())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        torch.manual_seed(1)  # the same samples and noise in each step
        parts = objective(batch)
        parts["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(parts["loss"].item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses


def test_checkpoints_bring_their_normalization(images, tmp_path):
    """Networks with public weights read standardized pixels; runs keep what they were trained with."""
    torch.manual_seed(0)
    save(create("detr-test", num_classes=4), tmp_path / "public", "huggingface")
    settings = {**SETTINGS, **SMALL, "finetune": "whole"}
    run = fit(str(images), weights=str(tmp_path / "public"), minutes=2, out=tmp_path / "run", settings=settings)
    assert run.task.options.pixels.startswith("0.485,")
    assert [step.name for step in run.signature.preprocessing] == ["decode_image", "letterbox", "normalize"]
    assert inspect_checkpoint(run.path).preprocessing_defaults()["pixels"] == run.task.options.pixels
    assert load(run.path).config.num_classes == 3
    task, data = some_images(images, 2, pixels="0.5,0.5,0.5/0.25,0.25,0.25", channels=3)
    plain, _ = some_images(images, 2, channels=3)
    got, raw = (one.predict_batches(data, card("detr")).make(np.arange(2), None)["image"] for one in (task, plain))
    torch.testing.assert_close(got, (raw - 0.5) / 0.25)
    with pytest.raises(SettingsError, match="not a mean and standard deviation for 3 channels"):
        some_images(images, 2, pixels="0.5/0.25", channels=3)


def test_yolo_reads_unscaled_pixels(tmp_path):
    """Its public weights were trained with pixels / 255."""
    model = create("yolov8-test")
    offered = inspect_checkpoint(save(model, tmp_path / "model.safetensors", "ultralytics")).preprocessing_defaults()
    assert offered["pixels"] == "0.0,0.0,0.0/1.0,1.0,1.0"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["faster-rcnn", "rt-detr"])
def test_random_samples_and_noise_are_resumed_exactly(name, images, tmp_path):
    """What a step draws depends on the seed and its number only."""
    arguments = {"model": f"{name}-test", "minutes": 2, "settings": {**SETTINGS, **SMALL, "steps": 6, "evaluate": 2}}
    whole = fit(str(images), out=tmp_path / "whole", **arguments)
    with pytest.raises(Interrupted, match="after step 3 of 6"):
        fit(str(images), out=tmp_path / "stopped", callback=StopAt(3), **arguments)
    again = resume(tmp_path / "stopped")
    for file in whole.path.glob("*.safetensors"):
        assert file.read_bytes() == (again.path / file.name).read_bytes()


FLOORS = {"yolo11-pico": 0.5, "rt-detr-mini": 0.2, "faster-rcnn-mini": 0.03}  # mAP50 after a minute or two of one core


@pytest.mark.slow
@pytest.mark.parametrize("size", FLOORS)
def test_detector_learns_from_the_start(size, tmp_path):
    """On images of the sample with three of its ten classes. DETR is missing: it learns little in such a time."""
    settings = {"batch": 8, "precision": "float32", "augment": "none", "steps": 200, "evaluate": 200, "task.classes": "0,1,6"}
    run = fit("scattered", model=size, minutes=5, out=tmp_path / "run", settings=settings)
    assert run.scores["map50"] > FLOORS[size]


# ---------------------------------------------------------------------------------------------- other classes

OLD, NEW = ("9", "Six_Pack", "x", "zero"), ["zero", "one", "six pack"]


@pytest.mark.parametrize("name", NAMES)
def test_classes_with_the_same_name_keep_their_weights(name):
    """Those of both a checkpoint and the data, wherever they are; the background stays the background."""
    torch.manual_seed(0)
    old, new = create(f"{name}-test", num_classes=4).eval(), create(f"{name}-test", num_classes=3).eval()
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    fresh = weights.load(new, old.state_dict(), head="skip")
    assert copy_classes(new, old.state_dict(), OLD, NEW, fresh) == ["zero", "six pack"]
    mine, theirs, seen = new.state_dict(), old.state_dict(), 0
    for key in fresh:
        for label, place in ((0, 3), (2, 1), (None, None)):
            rows = new.find_class_rows(key, label, 3)
            if rows is not None:
                assert torch.equal(mine[key][rows], theirs[key][new.find_class_rows(key, place, 4)])
                seen += 1
        assert not torch.equal(mine[key], theirs[key][: len(mine[key])])
    assert seen >= 4
    x = torch.rand(2, 3, 64, 64)
    before, after = old(x), new(x)
    first = {"boxes": before.shape[-1] - 4, "queries": 4, "scored-queries": None, "regions": 6}[card(name).output_types[0]]
    if first is not None:  # there the classes choose which queries are decoded
        for label, place in ((0, 3), (2, 1)):
            torch.testing.assert_close(after[..., first + label], before[..., first + place])
        assert not torch.allclose(after[..., first + 1], before[..., first + 1])


def test_classes_are_found_by_name_or_are_those_of_coco(tmp_path):
    assert list_classes(tmp_path, 80)[:3] == ("person", "bicycle", "car") and list_classes(tmp_path, 80)[-1] == "toothbrush"
    assert list_classes(tmp_path, 90)[0] == "person" and list_classes(tmp_path, 91)[:2] == ("", "person")
    assert list_classes(tmp_path, 90)[89] == list_classes(tmp_path, 91)[90] == "toothbrush" and list_classes(tmp_path, 7) == ()
    (tmp_path / "config.json").write_text('{"id2label": {"0": "cat", "1": "dog"}}')
    assert list_classes(tmp_path, 2) == ("cat", "dog")
    (tmp_path / "config.json").write_text('{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}')
    assert list_classes(tmp_path, 2) == ()


def test_fine_tuning_maps_classes(images, tmp_path):
    """From a folder of transformers that knows two of three classes, and then from the run, which knows all."""
    torch.manual_seed(0)
    public = create("detr-test", num_classes=4)
    save(public, tmp_path / "public", "huggingface")
    config = json.loads((tmp_path / "public" / "config.json").read_text())
    config["id2label"] = dict(enumerate(["9", "6", "x", "0"]))
    (tmp_path / "public" / "config.json").write_text(json.dumps(config))
    settings = {**SETTINGS, **SMALL, "finetune": "whole", "lr": 1e-9, "steps": 1}
    said = []
    callback = type("Said", (NullCallback,), {"log": lambda self, text: said.append(text)})()
    run = fit(
        str(images), weights=str(tmp_path / "public"), minutes=2, out=tmp_path / "run", settings=settings, callback=callback
    )
    assert any("2 of 3 classes start from those of the checkpoint: 0, 6" in text for text in said)
    label = load(run.path).label.weight
    torch.testing.assert_close(label[[0, 2, 3]], public.label.weight[[3, 1, 4]], rtol=1e-4, atol=1e-5)
    assert list_classes(run.path, 3) == ("0", "1", "6")

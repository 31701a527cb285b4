"""Rows whose class does not occur in training count as wrong, with a note; they are neither an error nor left out."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from PIL import Image

import fieldguide
from fieldguide.automl.check import check_data
from fieldguide.core.errors import DataError
from fieldguide.tasks.supervised_evaluator import ClassificationEvaluator

SETTINGS = {"steps": 3, "batch_size": 16, "precision": "float32"}
PARTS = ["train"] * 80 + ["val"] * 20 + ["test"] * 30
ANSWERS = [("red", "blue")[i % 2] if i < 120 else f"new{i % 3}" for i in range(130)]  # ten of thirty test rows are unseen
RNG = np.random.default_rng(0)


class Log:
    def __init__(self):
        self.lines = []

    def __getattr__(self, name):
        return lambda *args: self.lines.append(str(args[0])) if name == "log" else None


def table(**columns) -> pl.DataFrame:
    return pl.DataFrame({**columns, "label": ANSWERS, "split": PARTS})


def images(folder) -> list[str]:
    paths = []
    for i in range(130):
        paths.append(str(folder / f"{i}.png"))
        Image.fromarray(RNG.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(paths[-1])
    return paths


CASES = {
    "tabular-classification": ("mlp-test", lambda folder: table(x=RNG.normal(size=130), z=RNG.normal(size=130))),
    "text-classification": (
        "bert-test",
        lambda folder: table(text=[f"this is sentence number {i} of many" for i in range(130)]),
    ),
    "image-classification": ("resnet-test", lambda folder: table(image=images(folder))),
    "visual-question-answering": (
        "vilt-test",
        lambda folder: table(image=images(folder), question=[f"what color is thing {i}?" for i in range(130)]),
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_unseen_classes_count_as_wrong(kind, tmp_path):
    model, make = CASES[kind]
    log = Log()
    run = fieldguide.fit(
        make(tmp_path), task=kind, target="label", model=model, out=tmp_path / "run", settings=SETTINGS, callback=log
    )
    scores, tested = run.scores, run.record["scores"]["tested"]
    assert tested == 30 and scores["accuracy"] <= 20 / 30 and np.isfinite(scores["log_loss"])
    assert any("not in the training data" in line and "new0" in line and "10 rows" in line for line in log.lines), log.lines
    report = (run.path / "report.html").read_text()
    assert "new0" in report


def test_unseen_classes_in_a_folder_of_images(tmp_path):
    for part, names, count in (("train", "ab", 20), ("test", "abc", 6)):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(RNG.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / part / name / f"{i}.png")
    data = fieldguide.read(tmp_path)
    assert len(data) == 58 and next(f for f in data.findings if f.check == "class-not-in-train").count == 6
    run = fieldguide.fit(tmp_path, model="resnet-test", out=tmp_path / "run", settings=SETTINGS)
    assert run.record["scores"]["tested"] == 18 and run.scores["accuracy"] <= 12 / 18


def test_unseen_tags_count_as_wrong(tmp_path):
    words = [[f"word{i}", "in", f"Town{i}"] for i in range(130)]
    tags = [["O", "O", "B-LOC" if i < 120 else "B-NEW"] for i in range(130)]
    data = pl.DataFrame({"tokens": words, "tags": tags, "split": PARTS})
    run = fieldguide.fit(data, task="token-classification", model="bert-test", out=tmp_path / "run", settings=SETTINGS)
    baseline = run.record["scores"]["baselines"][0]["scores"]
    assert 0 < run.record["scores"]["tested"] == 30 and baseline["recall"] == 0  # towns of the test rows are new words
    assert run.scores["accuracy"] <= (90 - 10) / 90 and any("B-NEW" in note for note in run.record["data"]["notes"])


def write_masks(folder):
    for part, count in (("train", 8), ("test", 4)):
        for kind in ("images", "masks"):
            (folder / part / kind).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((16, 16), np.uint8)
            mask[2:8, 2:8], mask[9:14, 9:14] = 1, 3 if part == "test" and i < 2 else 2
            Image.fromarray(mask).save(folder / part / "masks" / f"{i}.png")
            Image.fromarray(RNG.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / part / "images" / f"{i}.png")
    return 2, "'3'"


def write_boxes(folder):
    names = ["cat", "dog", "cow"]
    for part, count in (("train", 8), ("valid", 4), ("test", 4)):
        (folder / part).mkdir(parents=True)
        images, boxes = [], []
        for i in range(count):
            Image.fromarray(RNG.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / part / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": 16, "height": 16})
            category = 2 if part == "test" and i < 3 else i % 2
            boxes.append({"id": i, "image_id": i, "category_id": category, "bbox": [2, 2, 6 + i, 9], "area": 81, "iscrowd": 0})
        categories = [{"id": i, "name": n} for i, n in enumerate(names)]
        content = {"images": images, "annotations": boxes, "categories": categories}
        (folder / part / "_annotations.coco.json").write_text(json.dumps(content))
    return 3, "'cow'"


def write_tags(folder):
    (folder / "train.conll").write_text("".join(f"Ann{i} B-PER\nruns O\n\n" for i in range(20)))
    (folder / "test.conll").write_text("".join(f"Town{i} B-{'LOC' if i < 4 else 'PER'}\nis O\n\n" for i in range(9)))
    return 4, "'B-LOC'"


@pytest.mark.parametrize("make", [write_masks, write_boxes, write_tags])
def test_check_reports_classes_of_other_splits(tmp_path, make):
    count, name = make(tmp_path)
    checked = check_data(str(tmp_path))
    lines = [str(f) for f in checked.data.findings if f.check == "class-not-in-train"] + checked.lines
    (found,) = [line for line in lines if "do not occur in train" in line]
    assert f"{count} x" in found and f"count as wrong predictions: {name} (" in found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("unseen") / "run"
    data = table(x=RNG.normal(size=130), z=RNG.normal(size=130)).filter(pl.col("split") == "train").drop("split")
    return fieldguide.fit(data, target="label", model="mlp-test", out=out, settings=SETTINGS)


def test_evaluation_counts_unseen_classes_as_wrong(trained):
    rows = pl.DataFrame({"x": RNG.normal(size=40), "z": RNG.normal(size=40), "label": ["red", "blue", "green", "green"] * 10})
    result = trained.evaluate(rows)
    assert result["rows"] == 40 and result["scores"]["accuracy"] <= 0.5


def test_evaluation_without_any_known_class_is_an_error(trained):
    rows = pl.DataFrame({"x": RNG.normal(size=40), "z": RNG.normal(size=40), "label": ["Red ", "Blue "] * 20})
    with pytest.raises(DataError, match=r"no class in column 'label'.*knows 'blue', 'red'"):
        trained.evaluate(rows)


def test_scores_with_an_unseen_class_are_those_of_scikit_learn():
    from sklearn import metrics

    evaluator = ClassificationEvaluator()
    p = RNG.dirichlet(np.ones(3), 60)
    y = RNG.integers(-1, 3, 60)
    scores, known = evaluator.score({"probabilities": p}, {"label": y}), y >= 0
    guess = p.argmax(1)
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(y, guess))
    assert scores["macro_f1"] == pytest.approx(metrics.f1_score(y, guess, average="macro"))
    assert scores["balanced_accuracy"] == pytest.approx(metrics.recall_score(y, guess, average="macro"))
    assert scores["log_loss"] == pytest.approx(metrics.log_loss(y[known], p[known]))
    evaluator.calibrate({"probabilities": p}, {"label": y})
    assert 0.2 < evaluator.temperature < 5

"""The metric follows the data: rare classes, the threshold of two classes, and `--metric`."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import average_precision_score, f1_score

import fieldguide
from fieldguide.automl.callbacks import NullCallback
from fieldguide.automl.choose_network import choose_metric
from fieldguide.core.errors import SettingsError
from fieldguide.tasks.supervised_evaluator import average_precision, find_f1_threshold
from fieldguide.tasks.tabular.tables import TabularClassification


def make_table(path, rows=1500, share=0.06):
    """Write a table whose numbers say something about a rare class, but never enough for a probability above one half."""
    rng = np.random.default_rng(0)
    positive = rng.random(rows) < share
    x = rng.normal(size=(rows, 2)) + 1.2 * positive[:, None]
    names = np.where(positive, "yes", "no")
    pl.DataFrame({"a": x[:, 0].round(4), "b": x[:, 1].round(4), "y": names}).write_csv(path)
    return names


def fitted_task(labels, counts):
    task = TabularClassification([], TabularClassification.Options())
    task.labels, task.counts = labels, counts
    return task


def test_average_precision_equals_scikit_learn():
    rng = np.random.default_rng(0)
    p = rng.random((400, 3)).round(2)  # with ties
    y = rng.integers(0, 3, 400)
    mean = np.mean([average_precision_score(y == c, p[:, c]) for c in range(3)])
    assert average_precision(p, y, -1) == pytest.approx(mean)
    assert average_precision(p[:, :2], (y == 1).astype(int), 1) == pytest.approx(average_precision_score(y == 1, p[:, 1]))


def test_threshold_has_the_highest_f1():
    rng = np.random.default_rng(0)
    y = rng.random(500) < 0.1
    p = np.clip(rng.normal(0.2 + 0.2 * y, 0.1), 0, 1).round(2)
    chosen = find_f1_threshold(p, y)
    best = max(f1_score(y, p >= t) for t in np.unique(p))
    assert f1_score(y, p >= chosen) == pytest.approx(best) and chosen not in p


@pytest.mark.parametrize(
    ("counts", "metric"),
    [
        ([94, 6], "average_precision"),
        ([6, 94], "average_precision"),
        ([60, 40], ""),
        ([80, 10, 10], "macro_f1"),
        ([40, 30, 30], ""),
    ],
)
def test_metric_follows_the_share_of_the_classes(counts, metric):
    lines = []
    callback = NullCallback()
    callback.log = lines.append
    task = fitted_task([f"class {i}" for i in range(len(counts))], counts)
    choose_metric(task, None, callback)
    assert task.metric == metric and bool(lines) == bool(metric)
    assert task.monitored_metric().name == (metric or "accuracy") == task.main_metric().name == task.ordered_metrics()[0].name
    if len(counts) == 2:
        assert task.positive == int(np.argmin(counts))


def test_requested_metrics_are_checked():
    task = fitted_task(["a", "b"], [6, 94])
    for name in ("AUC", "auc", "Average precision", "balanced-accuracy"):
        choose_metric(task, name, NullCallback())
        assert task.metric in ("auc", "average_precision", "balanced_accuracy")
    with pytest.raises(SettingsError, match=r"metric='acuracy' is none of the metrics.*Did you mean 'accuracy'"):
        choose_metric(task, "acuracy", NullCallback())


def test_rare_class_is_found_by_a_run_and_its_predictions(tmp_path):
    names = make_table(tmp_path / "rare.csv")
    run = fieldguide.fit(
        tmp_path / "rare.csv", "y", model="linear", out=tmp_path / "run", settings={"minutes": 1}, callback=NullCallback()
    )
    assert run.task.metric == "average_precision" and 0 < run.task.threshold < 0.5
    assert run.scores["average_precision"] > 0.25  # four times the share
    assert run.scores["macro_f1"] > 0.6
    predicted = [p["label"] for p in run.predict(tmp_path / "rare.csv")]
    assert f1_score(names == "yes", np.array(predicted) == "yes") > 0.35
    reopened = fieldguide.open_run(tmp_path / "run")
    assert reopened.task.threshold == run.task.threshold and reopened.task.metric == "average_precision"
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "average precision" in report
    assert "average precision" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_metric_of_the_user_replaces_that_of_the_data(tmp_path):
    make_table(tmp_path / "rare.csv", rows=400)
    run = fieldguide.fit(
        tmp_path / "rare.csv",
        "y",
        model="linear",
        out=tmp_path / "run",
        settings={"minutes": 1, "metric": "accuracy"},
        callback=NullCallback(),
    )
    assert run.task.metric == "accuracy" and run.task.threshold is None
    assert {p["label"] for p in run.predict(tmp_path / "rare.csv")} <= {"yes", "no"}

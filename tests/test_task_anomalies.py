"""Anomaly detection in tables and series: scores, thresholds, windows without look-ahead, damaged data, predictions."""

from __future__ import annotations

import datetime as dt

import numpy as np
import polars as pl
import pytest
from sklearn import metrics

from damage import refused
from fieldguide import open_run
from fieldguide.automl.fit import fit
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.data import read, samples
from fieldguide.data.timeseries.steps import STEP, build_steps
from fieldguide.metrics.anomalies import average_precision, best_f1, choose_threshold, roc_auc
from fieldguide.models.registry import card, create
from fieldguide.tasks.anomaly.anomaly_detection import AnomalyDetection

QUICK = {"precision": "float32", "batch": 64}
SPEC = AnomalyDetection.column_spec

# ------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("ties", [False, True])
def test_scores_equal_scikit_learn(ties):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        label = rng.random(300) < 0.1
        score = rng.normal(size=300) + 1.5 * label
        score = np.round(score) if ties else score
        assert average_precision(score, label) == pytest.approx(metrics.average_precision_score(label, score))
        assert roc_auc(score, label) == pytest.approx(metrics.roc_auc_score(label, score))
        largest = max(metrics.f1_score(label, score >= t) for t in np.unique(score))
        assert best_f1(score, label) == pytest.approx(largest)
    assert all(np.isnan(f(score, np.zeros(300, bool))) for f in (average_precision, roc_auc, best_f1))


def test_threshold_keeps_the_stated_rate():
    """New normal examples exceed it with at most the stated chance, on average over many fits."""
    rng = np.random.default_rng(0)
    for rows, rate in ((99, 0.05), (300, 0.01)):
        exceeded = [(rng.exponential(size=500) > choose_threshold(rng.exponential(size=rows), rate)).mean() for _ in range(300)]
        assert 0.7 * rate < np.mean(exceeded) <= 1.05 * rate
    assert choose_threshold(np.array([1.0, 2.0]), 0.01) == 2.1  # too few for this rate


def table(rows: int = 200, **columns) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    a = rng.normal(size=rows)
    frame = pl.DataFrame({"a": a, "b": 2 * a + 0.1 * rng.normal(size=rows), "kind": ["u", "v"] * (rows // 2)})
    return frame.with_columns(**columns)


def fitted(rows: pl.DataFrame, **options):
    data = read(rows, column_spec=SPEC)
    options = AnomalyDetection.options_from(options)
    made = AnomalyDetection.build_examples(data, options)
    return made, AnomalyDetection.fit(made, options)


def test_scores_with_and_without_labels():
    made, task = fitted(table(label=pl.when(pl.int_range(200) % 20 == 3).then(1).otherwise(0)))
    label = task.targets(made)["label"]
    assert task.is_labeled and label.sum() == 10 and task.normal_label == ["0"]
    rng = np.random.default_rng(0)
    errors = rng.exponential(size=(200, len(task.list_features()))) * np.where(label == 1, 3, 1)[:, None]
    task.calibrate({"errors": errors}, {"label": label})
    outputs = task.postprocess({"errors": errors})
    found = task.score(outputs, {"label": label})
    relative = errors / errors[label == 0].mean(0)
    assert outputs["score"] == pytest.approx(relative.mean(1) / choose_threshold(relative.mean(1)[label == 0], 0.01))
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(label, relative.mean(1)))
    assert found["f1"] == pytest.approx(metrics.f1_score(label, outputs["score"] >= 1))
    assert found["detected"] == pytest.approx((outputs["score"][label == 1] >= 1).mean()) and found["false_alarms"] <= 0.01
    made, task = fitted(table())
    task.calibrate({"errors": errors}, task.targets(made))
    found = task.score(task.postprocess({"errors": errors}), task.targets(made))
    assert np.isnan(found["average_precision"]) and found["alarms"] <= 0.01 and found["reconstruction"] > 0
    assert "no labels" in task.find_doubts(task.targets(made))[0]


def test_one_event_gives_no_interval():
    """Every resample of stretches with anomalies would have the same score."""
    rng = np.random.default_rng(0)
    _, task = fitted(table(label=pl.when(pl.int_range(200) % 20 == 3).then(1).otherwise(0)))
    label, block = np.zeros(400, dtype=int), np.repeat(np.arange(20), 20)
    outputs = {"errors": rng.random((400, 1)), "score": rng.random(400)}
    label[30:35] = 1
    found = task.intervals(outputs, {"label": label, "block": block})
    assert np.isnan(found["average_precision"]).all() and np.isfinite(found["false_alarms"]).all()
    label[[130, 230, 330]] = 1
    low, high = task.intervals(outputs, {"label": label, "block": block})["average_precision"]
    assert low < high


# ------------------------------------------------------------------------------------------------ data


def test_labels_in_words():
    for names, normal in (
        (["normal", "attack"], ["normal"]),
        (["ok", "broken", "worn"], ["ok"]),
        (["false", "true"], ["false"]),
        (["calm", "storm"], ["calm"]),  # the most frequent
    ):
        many = pl.Series("label", [names[0]] * 190 + [names[1 + i % (len(names) - 1)] for i in range(10)])
        assert fitted(table().with_columns(many))[1].normal_label == normal
    assert fitted(table().with_columns(many), anomaly="storm")[1].normal_label == ["calm"]
    with pytest.raises(SettingsError, match=r"'strom' is no label\. Did you mean 'storm'"):
        fitted(table().with_columns(many), anomaly="strom")


def test_extreme_values_stay_extreme():
    made, task = fitted(table())
    far = made.take(range(3))
    far.rows = far.rows.with_columns(pl.Series("a", [0.0, 100.0, None]))
    vectors = task.vectors(far)
    assert vectors[1, 0] > 50 and vectors[2, 0] == 0 and vectors.shape == (3, 4)


def series(steps: int = 100, names=("p", "q"), **columns) -> pl.DataFrame:
    first = dt.datetime(2024, 1, 1)
    parts = [
        pl.DataFrame(
            {
                "series": [name] * steps,
                "time": [first + dt.timedelta(hours=t) for t in range(steps)],
                "x": [1000.0 * i + t for t in range(steps)],
                "z": np.random.default_rng(i).normal(size=steps),
            }
        )
        for i, name in enumerate(names)
    ]
    return pl.concat(parts).with_columns(**columns)


def test_windows_hold_no_later_steps():
    rows = series().sample(fraction=1.0, shuffle=True, seed=0)  # any order
    made, task = fitted(rows, length=8)
    assert [int((made.splits == s).sum()) for s in ("train", "val", "test")] == [120, 40, 40]
    assert "first 60%" in made.split_description and task.input_types == ("series",)
    batch = task.batches(made, card("conv-autoencoder")).make(np.arange(len(made)), None)["series"][..., 0]
    values = batch.numpy() * task.std[0] + task.mean[0]
    at = made.rows[STEP].to_numpy()
    place = at % 100  # within its series, which come one after the other
    wanted = 1000 * (at // 100)[:, None] + np.maximum(place[:, None] + np.arange(-7, 1), 0)
    assert abs(values - wanted).max() < 0.01
    gone = series(x=pl.when(pl.int_range(200) % 100 == 50).then(None).otherwise("x"))
    made, task = fitted(gone, length=4)
    row = int(np.flatnonzero(made.rows[STEP].to_numpy() == 51)[0])
    values = task.batches(made, card("conv-autoencoder")).make(np.array([row]), None)["series"][0, :, 0].numpy()
    assert (values * task.std[0] + task.mean[0]).round().tolist() == [48, 49, 49, 51]  # the last value before


def test_damaged_tables():
    with pytest.raises(DataError, match="60 % of the training rows are anomalies"):
        fitted(table(label=pl.when(pl.int_range(200) < 120).then(1).otherwise(0)))
    with pytest.raises(DataError, match="only 12 training rows are normal"):
        fitted(table(12))
    with pytest.raises(DataError, match="no column varies"):
        fitted(pl.DataFrame({"a": [1.5] * 20 + [2.5], "b": [3.0] * 20 + [4.0], "label": [0] * 20 + [1]}))
    again = pl.concat([series(), series()[:1]])
    with refused("repeated-step", "repeated time"):
        read(again, column_spec=SPEC)
    with pytest.raises(DataError, match="have no time"):
        build_steps(read(series(time=pl.when(pl.int_range(200) != 7).then("time")), column_spec=SPEC, allow_bad=True))
    with pytest.raises(DataError, match="no numeric column to watch"):
        build_steps(read(series().drop("x", "z").with_columns(word=pl.lit("a")), column_spec=SPEC))
    flat = series(x=pl.when(pl.int_range(200) % 100 < 60).then(1.0).otherwise(pl.int_range(200)), z=pl.lit(2.5))
    data = build_steps(read(flat, column_spec=SPEC))
    with pytest.raises(DataError, match="no channel changes"):
        AnomalyDetection.fit(data.take(np.flatnonzero(data.splits == "train")), AnomalyDetection.Options())


# ------------------------------------------------------------------------------------------------ networks


def test_code_is_narrower_than_the_input():
    assert create("autoencoder-s", features=5).encoder[-1].out_features == 2
    assert create("autoencoder-s", features=1).encoder[-1].out_features == 1
    model = create("conv-autoencoder-s", channels=4, code=4)
    import torch

    assert model.encode(torch.zeros(1, 32, 4)).numel() == 16 and model(torch.zeros(1, 30, 4)).shape == (1, 30, 4)


# ------------------------------------------------------------------------------------------------ fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "pumps"
    settings = {**QUICK, "steps": 250, "evaluate": 125, "model.dim": 16, "lr": 4e-3}
    return fit("pumps", model="conv-autoencoder-s", minutes=3, out=out, settings=settings)


@pytest.mark.slow
def test_network_finds_faults_of_the_sample(run):
    scores = {b["name"]: b["scores"] for b in run.record["scores"]["baselines"]}
    assert set(scores) == {"z-score", "nearest neighbors", "isolation forest"}
    assert run.scores["average_precision"] > 0.45 > 160 / 1200 and run.scores["false_alarms"] < 0.03
    assert all(0.1 < s["average_precision"] < 0.6 for s in scores.values())
    page = (run.path / "report.html").read_text()
    assert all(w in page for w in ("Alarms over time: north", "Precision and recall", "Highest scores", "Missed anomalies"))
    assert "chosen with the labels" in page  # best F1 is stated as such


def test_predictions_and_other_rates(run, tmp_path):
    rows = pl.read_csv(samples.path("pumps"))
    found = run.predict(samples.path("pumps"))
    assert len(found) == 6000 and list(found[0]) == ["input", "series", "time", "anomaly", "score", "due_to"]
    assert all(r["anomaly"] == (r["score"] >= 1) and len(r["due_to"]) == 3 for r in found)
    part = rows.filter(pl.col("series") == "south").drop("anomaly")[2000:2200]
    part.write_csv(tmp_path / "new.csv")
    again = open_run(run.path).predict(tmp_path / "new.csv")
    # after a window's length, steps are scored as in the whole series
    assert [r["score"] for r in again[40:]] == pytest.approx([r["score"] for r in found[5040:5200]], rel=1e-3)
    many = open_run(run.path).predict(tmp_path / "new.csv", false_alarms=0.3)
    assert sum(r["anomaly"] for r in many) > sum(r["anomaly"] for r in again)
    with pytest.raises(DataError, match="flow"):
        run.predict(part.drop("flow"))
    result = run.evaluate(samples.path("pumps"))
    assert result["scores"]["average_precision"] == pytest.approx(run.scores["average_precision"])


def test_rows_of_a_table(tmp_path):
    """Tumors, trained on benign ones; scikit-learn's own detectors are the references."""
    run = fit(
        "breast-cancer",
        task="anomaly-detection",
        target="diagnosis",
        model="autoencoder-s",
        minutes=2,
        out=tmp_path / "run",
        settings={**QUICK, "steps": 150, "evaluate": 50, "lr": 3e-3, "task.anomaly": "malignant", "task.false_alarms": 0.05},
    )
    scores = {b["name"]: b["scores"]["average_precision"] for b in run.record["scores"]["baselines"]}
    assert run.scores["average_precision"] > 0.8 and min(scores.values()) > 0.7
    records = run.predict(samples.path("breast-cancer"))
    assert list(records[0]) == ["input", "anomaly", "score", "due_to"]


def test_fit_without_labels_reports_the_reconstruction_error(tmp_path, capsys):
    table().write_csv(tmp_path / "rows.csv")
    run = fit(
        tmp_path / "rows.csv",
        task="anomaly-detection",
        model="autoencoder-test",
        out=tmp_path / "run",
        settings={**QUICK, "steps": 5},
    )
    assert f"{run.scores['reconstruction']:.4g} reconstruction error on held-out examples" in capsys.readouterr().out
    assert {r["anomaly"] for r in run.predict(tmp_path / "rows.csv")} <= {True, False} and run.scores["auc"] is None


def test_baselines_equal_their_definitions():
    made, task = fitted(table())
    reference, held = task.vectors(made), task.vectors(made.take(range(20)))
    found = {b.name: b.outputs["score"] for b in task.detect(reference[20:], held)}
    mean, std = reference[20:].mean(0), reference[20:].std(0)
    z = abs((held - mean) / std).max(1)
    own = abs((reference[20:] - mean) / std).max(1)
    assert found["z-score"] == pytest.approx(z / choose_threshold(own, 0.01), rel=1e-5)
    a, b = (held - mean) / std, (reference[20:] - mean) / std
    distance = np.sort(np.linalg.norm(a[:, None] - b[None], axis=2), 1)[:, 4]
    ranks = lambda x: np.argsort(np.argsort(x))
    assert ranks(found["nearest neighbors"]).tolist() == ranks(distance).tolist()

"""Analyses of tested models find what a known model depends on, repeat exactly, and stop in time."""

from __future__ import annotations

import html
import json
import re
import time

import numpy as np
import polars as pl
import pytest
import torch

import fieldguide
import fieldguide.automl.fit
from fieldguide.core.errors import SettingsError
from fieldguide.core.report_elements import Bars, Gallery, Lines, Quotes, Table
from fieldguide.data.dataset import Column, Data, Manifest
from fieldguide.inference.report_context import build_context
from fieldguide.tasks.analysis import importance, latency, occlusion, preview, subgroups, thresholds
from fieldguide.tasks.analysis.context import Deadline, ReportContext
from fieldguide.tasks.spec import Metric

ACCURACY = Metric("accuracy", "max", "correct", percent=True)
SETTINGS = {"steps": 30, "batch_size": 32, "precision": "float32"}


class Accuracy:
    """An evaluator of probabilities and labels."""

    def score(self, outputs, targets):
        return {"accuracy": float((outputs["probabilities"].argmax(1) == targets["label"]).mean())}

    def intervals(self, outputs, targets):
        value = self.score(outputs, targets)["accuracy"]
        return {"accuracy": (value - 0.1, value + 0.1)}


def as_data(frame):
    return Data("memory", frame, {name: Column(name, "number") for name in frame.columns}, Manifest(""))


def context_of(frame, predict, label, seconds=5.0):
    data = as_data(frame)
    outputs = predict(data)
    return ReportContext(data, outputs, {"label": label}, predict, lambda d: {}, lambda b: {}, Deadline(seconds))


def sure(positive):
    return {"probabilities": np.stack([1 - positive, positive], 1).astype(float)}


def linear(count=400):
    """A model that reads the column `a`, a little of `b`, and nothing of `c`."""
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({name: rng.normal(size=count) for name in "abc"})
    predict = lambda data: sure((data.rows["a"] + 0.2 * data.rows["b"] > 0).to_numpy())
    return frame, predict, (frame["a"] + 0.2 * frame["b"] > 0).to_numpy().astype(int)


def test_importance_finds_what_the_model_reads_and_repeats_exactly():
    found = [importance.build_importance(Accuracy(), ACCURACY, ["c", "b", "a"], context_of(*linear())) for _ in range(2)]
    bars = found[0][0]
    assert found[0] == found[1]
    assert (
        list(bars.values) == ["a", "b", "c"] and bars.values["a"] > 30 and 2 < bars.values["b"] < 15 and bars.values["c"] == 0
    )
    assert all(low <= bars.values[name] <= high for name, (low, high) in bars.intervals.items())


def test_importance_of_errors_is_their_rise():
    frame, _, _ = linear()
    metric = Metric("mae", "min", "mean absolute error", label="MAE")

    class Error:
        def score(self, outputs, targets):
            return {"mae": float(np.abs(outputs["values"] - targets["label"]).mean())}

    context = context_of(frame, lambda data: {"values": data.rows["a"].to_numpy()}, frame["a"].to_numpy())
    bars = importance.build_importance(Error(), metric, ["a", "b"], context)[0]
    assert bars.values["a"] > 0.8 and bars.values["b"] == 0 and "Rise of the MAE" in bars.note


def test_importance_stops_in_time_and_says_so():
    frame, predict, label = linear()

    def slow(data):
        time.sleep(0.02)
        return predict(data)

    context = context_of(frame, slow, label, seconds=0.2)
    started = time.perf_counter()
    bars = importance.build_importance(Accuracy(), ACCURACY, ["a", "b", "c"], context)[0]
    assert time.perf_counter() - started < 2
    assert 1 <= len(bars.values) < 3 and "of 3 columns were not measured" in bars.note
    assert (
        bars.values["a"] == importance.build_importance(Accuracy(), ACCURACY, ["a", "b"], context_of(*linear()))[0].values["a"]
    )


def test_words_are_weighed_by_what_the_prediction_loses():
    def predict(data):
        return np.stack([1 - (p := np.array(["good" in t and "not" not in t for t in data.rows["text"]]) * 0.8), p], 1)

    data = as_data(pl.DataFrame({"text": ["a good film, really", "not good", "日本語のテキスト", "one"]}))
    weights = {data.rows["text"][0][a:b]: w for a, b, w in occlusion.weigh_words(predict, data, "text", 0, 1)}
    assert weights == {"a": 0, "good": pytest.approx(0.8), "film,": 0, "really": 0}
    weights = {data.rows["text"][1][a:b]: w for a, b, w in occlusion.weigh_words(predict, data, "text", 1, 1)}
    assert weights["not"] == pytest.approx(-0.8)
    assert len(occlusion.split_text(data.rows["text"][2])) == 8  # characters, where words are not separated
    assert occlusion.weigh_words(predict, data, "text", 3, 1) == []
    parts = occlusion.split_text("word " * 1000)
    assert len(parts) == occlusion.MAX_PARTS and parts[0][0] == 0 and parts[-1][1] == 4999


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 40, 24), (1, 5, 3)])
def test_pixels_are_weighed_by_what_the_prediction_loses(shape):
    image = torch.zeros(shape)
    height, width = shape[1:]
    image[:, : height // 2, : width // 2] = 1.0
    corner = lambda images: images[:, :, : height // 2, : width // 2].mean((1, 2, 3)).numpy()
    weights = occlusion.weigh_pixels(lambda images: np.stack([1 - corner(images), corner(images)], 1), image, 1)
    rows, columns = weights.shape
    assert weights[: rows // 2, : columns // 2].min() > 0
    assert np.unravel_index(weights.argmax(), weights.shape)[0] <= rows // 2
    assert np.abs(weights[-1, -1]) < 1e-6
    plain, colored = occlusion.draw_weights(image, weights)
    assert plain[:4] == colored[:4] == b"\x89PNG" and plain != colored


def test_thresholds_agree_with_scikit_learn():
    from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score, roc_curve

    rng = np.random.default_rng(0)
    positive = rng.random(500) < 0.3
    p = np.round(np.clip(0.3 * positive + rng.random(500) * 0.7, 0, 1), 2)  # with ties
    roc, curves, table = thresholds.build_thresholds(p, positive, "ill")
    x, y = roc.lines["this model"]
    assert np.trapezoid(y, x) == pytest.approx(roc_auc_score(positive, p), abs=1e-3)
    assert f"{roc_auc_score(positive, p):.3f}" in roc.note and (x[-1], y[-1]) == (1, 1)
    known = roc_curve(positive, p, drop_intermediate=False)
    assert np.allclose(known[0], x) and np.allclose(known[1], y)
    row = next(row for row in table.rows if row[0] == "0.5")
    said = p >= 0.5
    assert row[1] == said.sum()
    assert np.allclose(row[2:4], [precision_score(positive, said), recall_score(positive, said)])
    assert row[5] == pytest.approx(f1_score(positive, said))
    best = max(f1_score(positive, p >= t) for t in np.unique(p))
    assert next(row for row in table.rows if row[-1] == "highest F1")[5] == pytest.approx(best)
    assert set(curves.lines) == {"precision", "recall", "F1"}
    assert thresholds.build_thresholds(p, np.ones(500, dtype=bool), "ill") == []


def test_groups_are_values_ranges_and_missing_ones():
    found = subgroups.find_groups(pl.Series("g", ["b", "a", "b", None, "b"]))
    assert {name: rows.tolist() for name, rows in found.items()} == {"b": [0, 2, 4], "(missing)": [3], "a": [1]}
    numbers = subgroups.find_groups(pl.Series("n", [*np.arange(100.0), None]))
    assert len(numbers) == 5 and sum(map(len, numbers.values())) == 101 and numbers["(missing)"].tolist() == [100]
    many = subgroups.find_groups(pl.Series("m", [str(i % 30) for i in range(90)]))
    assert len(many) == subgroups.MAX_GROUPS + 1 and len(many["(other)"]) == 30


def test_subgroups_are_scored():
    frame, predict, label = linear()
    frame = frame.with_columns(pl.Series("site", np.where(np.arange(400) % 4, "north", "south")))
    label = np.where((np.arange(400) % 4 == 0) & (np.arange(400) % 8 == 0), 1 - label, label)  # half of the south is wrong
    bars, table = subgroups.build_subgroups(Accuracy(), (ACCURACY,), context_of(frame, predict, label), "site")
    assert bars.values == {"north": 100.0, "south": 50.0} and bars.intervals["south"] == pytest.approx((40, 60))
    assert [row[:3] for row in table.rows] == [("north", 300, "100.0 %"), ("south", 100, "50.0 %")]
    packed = context_of(frame, predict, label)
    packed.outputs = {"probabilities": packed.outputs["probabilities"][:7]}  # as in tasks that score other units than rows
    assert subgroups.build_subgroups(Accuracy(), (ACCURACY,), packed, "site")[0].rows == ()


def test_latency_is_measured_within_its_time():
    frame = linear()[0]

    def predict(data):
        time.sleep(0.002 * len(data))
        return sure(np.zeros(len(data)))

    context = ReportContext(as_data(frame), {}, {}, predict, lambda d: {}, lambda b: {}, Deadline(4.0), 0.002)
    found = latency.measure_latency(context)
    assert 0.002 <= found["one"] < 0.1 and 0.12 <= found["batch"] < 1 and found["batch_examples"] == 64
    context.deadline, context.seconds_per_example = Deadline(0.05), 10.0
    started = time.perf_counter()
    assert set(latency.measure_latency(context)) == {"one", "one_examples"}  # a batch would take minutes
    assert time.perf_counter() - started < 1


def test_analyses_have_five_seconds_or_a_twentieth_of_the_training():
    assert Deadline.after_training(3).seconds == 5 and Deadline.after_training(3600).seconds == 180
    over = Deadline(-1)
    assert over.is_over and over.part(0.5).is_over
    assert Deadline(10).part(0.4).seconds == pytest.approx(4)


def columns(**kinds):
    return [Column(name, kind, "target" if name == "target" else "feature") for name, kind in kinds.items()]


def test_preview_shows_the_target_and_examples():
    data = as_data(pl.DataFrame({"x": np.arange(200.0), "target": ["a"] * 150 + ["b"] * 50}))
    bars, table = preview.build_preview(data, columns(x="number", target="category"))
    assert isinstance(bars, Bars) and bars.values == {"a": 150, "b": 50}
    assert isinstance(table, Table) and list(table.header) == ["x", "target"] and len(table.rows) == preview.SHOWN_ROWS
    bars = preview.build_preview(as_data(pl.DataFrame({"target": np.arange(1000.0)})), columns(target="number"))[0]
    assert len(bars.values) == preview.HISTOGRAM_BINS and sum(bars.values.values()) == 1000
    many = as_data(pl.DataFrame({"target": [str(i % 40) for i in range(400)]}))
    bars = preview.build_preview(many, columns(target="category"))[0]
    assert len(bars.values) == preview.MAX_BARS + 1 and bars.values["28 others"] == 280
    boxes = pl.DataFrame({"target": [[{"label": "cat"}, {"label": "dog"}], [{"label": "cat"}]]})
    assert preview.build_distribution(as_data(boxes), columns(target="boxes"))[0].values == {"cat": 2, "dog": 1}
    answers = pl.DataFrame({"target": [[{"text": "red", "answer_start": 4}], []]})
    assert preview.build_distribution(as_data(answers), columns(target="list")) == []
    assert preview.describe_cell(answers["target"][0], 80) == "red"
    tags = pl.DataFrame({"target": [["O", "PER"], ["O"]]})
    assert preview.build_distribution(as_data(tags), columns(target="list"))[0].values == {"O": 2, "PER": 1}
    texts = as_data(pl.DataFrame({"t": ["one text"] * 9, "target": ["a"] * 9}))
    quotes = preview.build_preview(texts, columns(t="text", target="category"))[1]
    assert isinstance(quotes, Quotes) and (quotes.quotes[0].text, quotes.quotes[0].caption) == ("one text", "target: a")
    chat = as_data(pl.DataFrame({"m": [[{"role": "user", "content": "hi"}]] * 3}))
    assert preview.build_preview(chat, columns(m="messages"))[0].quotes[0].text == "user: hi"


def test_preview_leaves_out_files_that_are_gone(tmp_path):
    from PIL import Image

    Image.new("RGB", (300, 200)).save(tmp_path / "a.jpg")
    data = as_data(pl.DataFrame({"i": [str(tmp_path / "a.jpg"), str(tmp_path / "gone.jpg")], "target": ["x", "y"]}))
    gallery = preview.build_preview(data, columns(i="image", target="category"))[1]
    assert isinstance(gallery, Gallery) and [p.caption for p in gallery.pictures] == ["target: x"]


# -- whole runs ----------------------------------------------------------------------------------------------


def page(run):
    return (run.path / "report.html").read_text()


def titles(run):
    return re.findall(r"<h[23][^>]*>([^<]*)<", page(run))


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    folder, rng, n = tmp_path_factory.mktemp("patients"), np.random.default_rng(0), 300
    x, site = rng.normal(size=(n, 2)), rng.choice(["north", "south"], n)
    outcome = np.where(x[:, 0] + 0.3 * rng.normal(size=n) > 0, "ill", "well")
    pl.DataFrame({"lab": x[:, 0], "noise": x[:, 1], "site": site, "outcome": outcome}).write_csv(folder / "p.csv")
    return fieldguide.fit(
        folder / "p.csv", target="outcome", model="mlp-test", out=folder / "run", settings={**SETTINGS, "subgroup": "site"}
    )


def test_the_report_of_a_binary_table_has_every_analysis(patients):
    shown = titles(patients)
    for title in (
        *(
            "ROC curve",
            "Thresholds",
            "Importance of the columns",
            "Accuracy by site",
            "Use this model",
            "Command line",
            "Python",
        ),
        *("Distribution of outcome", "Examples", "Worst mistakes", "Correct predictions", "Loss", "Validation accuracy"),
    ):
        assert title in shown, title
    assert {"one", "batch"} <= set(patients.record["cost"]["latency"]) and "one prediction" in page(patients)
    evaluations = [line for line in patients.losses() if "scores" in line]
    assert evaluations and all(0 < line["scores"]["validation_loss"] < 5 for line in evaluations)


def test_the_instructions_work(patients, tmp_path, monkeypatch, capsys):
    from fieldguide.cli.commands import main

    command, python = (html.unescape(text) for text in re.findall(r"<pre><code>(.*?)</code></pre>", page(patients), re.S))
    monkeypatch.chdir(tmp_path)
    exec(python, {})
    assert "'label': " in capsys.readouterr().out
    words = command.splitlines()[0].split()
    monkeypatch.setattr("sys.argv", words)
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
    assert "p.csv:2" in capsys.readouterr().out


def test_an_analysis_that_fails_does_not_lose_the_report(patients, monkeypatch):
    from fieldguide.report import build

    def fail(context):
        raise RuntimeError("no luck")

    monkeypatch.setattr(build, "measure_latency", fail)
    monkeypatch.setattr(type(patients.task), "explain", lambda self, context: fail(context))
    lines = []

    class Lines(fieldguide.automl.fit.NullCallback):
        def log(self, text):
            lines.append(text)

    run = fieldguide.fit(
        patients.path.parent / "p.csv",
        target="outcome",
        model="mlp-test",
        out=patients.path.parent / "failing",
        callback=Lines(),
        settings={**SETTINGS, "steps": 3},
    )
    assert run.status == "done" and "Use this model" in titles(run) and "Importance of the columns" not in titles(run)
    assert [line for line in lines if "the report has no latency: RuntimeError: no luck" in line]


def test_an_unknown_subgroup_is_rejected_before_training(patients):
    with pytest.raises(SettingsError, match=r"subgroup=sit: .*no column 'sit'. Did you mean 'site'"):
        fieldguide.fit(patients.path.parent / "p.csv", target="outcome", settings={**SETTINGS, "subgroup": "sit"})


def test_reports_of_images_and_texts_show_what_matters(digits_run, text_run, iris_run):
    assert {"Parts that matter", "Worst mistakes", "Correct predictions", "Examples"} <= set(titles(digits_run))
    assert {"Words that matter", "Worst mistakes", "Correct predictions", "Examples"} <= set(titles(text_run))
    assert "<mark" in page(text_run) and ">what matters<" in page(digits_run)
    assert {"Importance of the columns", "Examples"} <= set(titles(iris_run)) and "ROC curve" not in titles(iris_run)


@pytest.mark.slow
def test_a_network_that_reads_images_as_vectors_is_explained_too(digits_run):
    """`fnn` reads 64 numbers: the occlusion does not depend on the architecture."""
    run = fieldguide.fit("digits", model="fnn", out=digits_run.path.parent / "digits-fnn", settings={**SETTINGS, "steps": 5})
    assert "Parts that matter" in titles(run)


def test_analyses_do_not_change_the_run(digits_run):
    """The context computes what the test computed, adds no notes to the task, and leaves torch's random state alone."""
    task = digits_run.task
    data = task.read(["digits"], answered=True).take(digits_run.read_splits().test[:20])
    outputs, state = digits_run.outputs(data), torch.random.get_rng_state()
    context = build_context(digits_run, data, outputs, task.targets(data), Deadline(5))
    notes = list(task.notes)
    assert np.allclose(context.predict(data)["probabilities"], outputs["probabilities"], atol=1e-6)
    assert np.allclose(context.predict_batch(context.make_batch(data))["probabilities"], outputs["probabilities"], atol=1e-6)
    assert task.notes == notes and torch.equal(state, torch.random.get_rng_state())


def test_old_run_folders_have_no_latency_and_can_be_shown(iris_run, tmp_path):
    from fieldguide.report.verdict import list_facts

    record = json.loads((iris_run.path / "run.json").read_text())
    del record["cost"]["latency"]
    assert "one prediction" not in dict(list_facts(record)) and dict(list_facts(record))["network"] == "mlp-s"


def test_lines_of_forecasts_have_dates():
    from fieldguide.data.timeseries.frequency import DAY, Frequency
    from fieldguide.data.timeseries.panel import Panel
    from fieldguide.tasks.timeseries.report import draw_series, draw_window

    times = np.arange(60, dtype=np.int64) * DAY + 19_800 * DAY
    one = np.zeros(1, dtype=int)
    panel = Panel(
        layout="long",
        frequency=Frequency("clock", DAY, "day"),
        columns=["y"],
        values=np.arange(60.0)[:, None],
        row=np.arange(60),
        times=times,
        start=np.array([0, 60]),
        group=one,
        column=one,
        low=one,
        high=one + 60,
        names=["shop"],
    )
    chart = draw_window(panel, 7, 0, 50, np.zeros((5, 3)), 0.5, {0.8: (0, 1)})
    assert isinstance(chart, Lines) and chart.dates
    ahead, _ = chart.lines["forecast"]
    assert np.array_equal(ahead, times[50:55] / 1e6) and chart.marks["forecast starts"] == times[50] / 1e6
    assert draw_series(panel)[0].dates

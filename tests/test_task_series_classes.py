"""Time series classification, from files to predictions; preparation of series; the networks' head for classes."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from fieldguide import open_run
from fieldguide.automl.fit import fit
from fieldguide.core.card import Card
from fieldguide.core.errors import DataError
from fieldguide.core.settings import Settings
from fieldguide.data import read, samples
from fieldguide.data.preprocessing.series import SeriesPreparer, interpolate, shorten
from fieldguide.data.timeseries.cases import build_cases
from fieldguide.models.registry import card, create
from fieldguide.tasks.timeseries.classification import SeriesClassification
from test_models import tiny

NAN = float("nan")
QUICK = {"precision": "float32", "batch": 32}

# ------------------------------------------------------------------------------------------------ preparation


def test_missing_values_are_interpolated():
    values = np.array([[NAN, 1, NAN, NAN, 4, NAN], [NAN] * 6])
    assert interpolate(values).tolist() == [[1, 1, 2, 3, 4, 4], [0] * 6]


def test_long_series_are_averaged():
    assert shorten(np.array([[1.0, 3, 5, 7, 9, 11]]), 2).tolist() == [[2, 6, 10]]
    assert shorten(np.arange(5.0)[None], 2.5)[0] == pytest.approx([(0 + 1 + 0.5 * 2) / 2.5, (0.5 * 2 + 3 + 4) / 2.5])
    kept = SeriesPreparer.fit([np.arange(3000.0)[None]])
    assert (kept.length, kept.factor) == (1024, 3000 / 1024)
    assert kept.count_cut([np.zeros((1, 3000)), np.zeros((1, 3100))]) == 1


def test_series_are_standardized_and_padded():
    series = [np.array([[1.0, 3], [5, 5]]), np.array([[5.0, 7, 9], [5, NAN, 8]])]
    made = SeriesPreparer.fit(series)
    known = np.array([5, 5, 5, 8])
    assert made.mean == (5.0, known.mean()) and made.std == pytest.approx((np.std([1, 3, 5, 7, 9]), known.std()))
    ready = made.apply(series)
    assert ready.shape == (2, 3, 2) and (ready[0, 2] == 0).all() and ready[1, 0, 0] == pytest.approx(0)
    assert ready[1, 1, 1] == pytest.approx((6.5 - known.mean()) / known.std())
    assert SeriesPreparer.from_json(made.to_json()) == made
    own = SeriesPreparer.fit(series, by_series=True).apply(series)
    assert own[0, :2, 0] == pytest.approx([-1, 1]) and (own[0, :, 1] == 0).all()


def test_statistics_are_those_of_the_training_rows():
    data = build_cases(read("motions", column_spec=SeriesClassification.column_spec))
    train = data.take(range(100))
    task = SeriesClassification.fit(train, SeriesClassification.Options())
    joined = np.concatenate([data.context.values[i] for i in range(100)], 1)
    assert task.preparer.mean == pytest.approx(joined.mean(1)) and task.preparer.length == 64
    batches = task.batches(data, card("inceptiontime"), Settings().with_({"augmentation": "light"}))
    rows = np.arange(3)
    plain, again = (batches.make(rows, None) for _ in range(2))
    assert torch.equal(plain["series"], again["series"])
    noisy = [batches.make(rows, torch.Generator().manual_seed(0))["series"] for _ in range(2)]
    assert torch.equal(*noisy) and not torch.equal(noisy[0], plain["series"])


# ------------------------------------------------------------------------------------------------ networks


def test_rocket_kernels():
    model = create("rocket-test", kernels=300, channels=3, length=40)
    lengths = {kernel.length for kernel in model.order}
    assert lengths == {7, 9, 11} and {len(kernel.weights) for kernel in model.order} == {1, 2, 3}
    assert all(abs(sum(weights)) < 1e-9 for kernel in model.order for weights in kernel.weights.values())  # mean 0
    assert all(-1 <= kernel.bias <= 1 and (kernel.length - 1) * kernel.dilation < 40 for kernel in model.order)
    assert 100 < sum(kernel.padding > 0 for kernel in model.order) < 200
    assert max(kernel.dilation for kernel in model.order) >= 4
    other = create("rocket-test", kernels=300, channels=3, length=40, seed=1)
    assert other.order != model.order and create("rocket-test", kernels=300, channels=3, length=40).order == model.order
    assert "weights0" not in model.state_dict()
    short = create("rocket-test", length=3, channels=1)  # shorter than every kernel
    assert short(torch.randn(2, 3, 1)).isfinite().all()
    with pytest.raises(DataError, match="9 steps and 3 channels"):
        create("rocket-test")(torch.zeros(2, 9, 3))


def test_inceptiontime_reads_any_length_and_keeps_it():
    model = tiny("inceptiontime")
    assert {n.eps for n in model.modules() if isinstance(n, torch.nn.BatchNorm1d)} == {1e-3}
    for steps in (2, 5, 30):
        assert model(torch.randn(2, steps, 3, dtype=torch.float64)).shape == (2, 3)


def test_patchtst_classifies_by_the_mean_of_patches():
    model = create("patchtst-test", output_type="label", num_classes=4, channels=3).double().eval()
    series = torch.randn(2, 13, 3, dtype=torch.float64)
    states = []
    model.blocks[-1].register_forward_hook(lambda module, inputs, outputs: states.append(outputs[0]))
    logits = model(series)
    pooled = states[0].unflatten(0, (2, 3)).mean(2).flatten(1)  # transformers: mean over patches, then all channels
    torch.testing.assert_close(logits, pooled @ model.head.weight.T + model.head.bias)


# ------------------------------------------------------------------------------------------------ fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "motions"
    settings = {**QUICK, "steps": 120, "evaluate": 60, "lr": 5e-3, "model.dim": 8, "model.lengths": (15, 7, 3)}
    return fit("motions", model="inceptiontime-mini", minutes=3, out=out, settings=settings)


def test_network_learns_the_sample(run):
    assert run.scores["accuracy"] > 0.85
    baselines = {b["name"]: b["scores"]["accuracy"] for b in run.record["scores"]["baselines"]}
    assert baselines["rocket-2k"] > 0.9 > baselines["majority class"]
    page = (run.path / "report.html").read_text()
    assert all(words in page for words in ("Parts that matter", "Classes: channel_1", "Correct: ", "Confusion"))


def test_predictions(run, tmp_path):
    rows = read("motions").rows.filter(pl.col("series").cast(pl.Int64) <= 6)
    first = run.predict(samples.path("motions"))
    assert len(first) == 900 and first[0]["series"] == "1" and set(first[0]["probabilities"]) == set(run.task.labels)
    rows.select("series", "step", "channel_2", "channel_1").sample(fraction=1.0, shuffle=True, seed=0).write_csv(
        tmp_path / "x.csv"
    )
    again = {r["series"]: r["probability"] for r in open_run(run.path).predict(tmp_path / "x.csv")}
    assert {r["series"]: pytest.approx(r["probability"], abs=1e-5) for r in first[:6]} == again
    with pytest.raises(DataError, match="channel_2"):
        run.predict(rows.select("series", "step", "channel_1"))
    result = run.evaluate(samples.path("motions"))
    assert result["scores"]["accuracy"] == pytest.approx(run.scores["accuracy"])


def test_wide_table_with_the_baseline(tmp_path):
    """A burst somewhere in noise, upward or downward; a series per row."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(120, 40)) * 0.3
    kinds = np.arange(120) % 2
    for row, kind, at in zip(values, kinds, rng.integers(0, 35, 120)):
        row[at : at + 4] += 2 if kind else -2
    names = ["down", "up"]
    table = pl.DataFrame({f"t{t}": values[:, t] for t in range(40)} | {"what": [names[k] for k in kinds]})
    run = fit(table, task="time-series-classification", target="what", model="rocket", minutes=2, out=tmp_path / "run")
    assert run.scores["accuracy"] > 0.9
    records = run.predict(table.drop("what")[:3])
    assert [r["label"] for r in records] == ["down", "up", "down"]


def test_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="no numeric column"):
        fit(
            pl.DataFrame({"a": ["x", "y"] * 20, "label": ["u", "v"] * 20}),
            task="time-series-classification",
            out=tmp_path / "a",
        )
    one = pl.DataFrame({f"t{t}": np.random.default_rng(t).normal(size=30) for t in range(5)} | {"label": ["u"] * 30})
    with pytest.raises(DataError, match="only one class"):
        fit(one, task="time-series-classification", out=tmp_path / "b", settings={"steps": 2})


def test_card_for_classes():
    assert isinstance(card("patchtst"), Card) and card("patchtst").output_types == ("forecast", "label")

"""Forecasting from tables of every layout to forecasts with intervals; published scores of naive forecasts."""

from __future__ import annotations

import csv
import datetime as dt
import json

import numpy as np
import polars as pl
import pytest

from fieldguide import open_run
from fieldguide.automl.fit import fit
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.data import read, samples
from fieldguide.data.splits import split
from fieldguide.data.validation.checks import BadData
from fieldguide.tasks.timeseries.forecasting import Forecasting
from test_data_real import unpack

QUICK = {"precision": "float32", "batch": 64}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit(
        "demand",
        minutes=3,
        out=tmp_path_factory.mktemp("runs") / "demand",
        settings={**QUICK, "steps": 300, "evaluate": 100, "lr": 2e-3},
    )


@pytest.mark.slow
def test_sample_forecast_beats_the_last_day(run):
    naive = {b["name"]: b["scores"]["mase"] for b in run.record["scores"]["baselines"]}
    assert run.record["model"]["architecture"] == "dlinear"  # the advisor's choice
    assert run.scores["mase"] < 0.9 < naive["seasonal naive"] < naive["naive"]
    assert 0.7 < run.scores["coverage_80"] < 0.88 and 0.82 < run.scores["coverage_90"] < 0.96
    assert run.scores["coverage_80"] < run.scores["coverage_90"]
    assert "by time" in run.record["data"]["split"]["how"] and run.record["data"]["split"]["test"] == 6 * (672 - 47)
    page = (run.path / "report.html").read_text()
    for words in ("Error by horizon", "Worst series", "homes-north", "seasonal naive", "Coverage by horizon", "near 80"):
        assert words in page


def test_predictions_start_after_the_series(run):
    said = run.predict("demand")
    assert len(said) == 6 * 48 and list(said[0]) == ["input", "series", "time", "value", "low", "high"]
    assert [said[i]["time"] for i in (0, 1, 47)] == ["2024-05-20 00:00:00", "2024-05-20 01:00:00", "2024-05-21 23:00:00"]
    assert {r["series"] for r in said} == set(read("demand").rows["site"]) and said[0]["input"].endswith(":3361")
    assert all(r["low"] <= r["value"] <= r["high"] for r in said)
    works = [r["value"] for r in said if r["series"] == "works"]
    past = read("demand").rows.filter(pl.col("site") == "works")["demand"].to_numpy()
    assert past.min() * 0.5 < min(works) and max(works) < past.max() * 1.2  # in the unit of the table
    assert abs(works[12] - past[-7 * 24 + 12]) < abs(works[12] - works[0])  # noon of a Monday is like noon, not midnight
    narrow = open_run(run.path).predict("demand", interval=0.8)
    assert np.mean([r["high"] - r["low"] for r in narrow]) < np.mean([r["high"] - r["low"] for r in said])
    with pytest.raises(SettingsError, match=r"0\.8 or 0\.9"):
        run.predict("demand", interval=0.5)
    json.dumps(said)


def test_evaluation_on_the_same_and_other_data(run, tmp_path):
    again = open_run(run.path).evaluate("demand")
    assert again["scores"] == pytest.approx(run.scores) and "only its test rows" in again["note"]
    table = pl.read_csv(samples.path("demand"))
    other = table.filter(pl.col("site") == "shops").with_columns(pl.lit("a new site").alias("site"), pl.col("demand") * 1000)
    other.write_csv(tmp_path / "other.csv")
    result = run.evaluate(tmp_path / "other.csv")
    assert result["rows"] == 3360 - 192 - 48 + 1 and result["note"] == "" and result["scores"]["mase"] < 1.1
    answers = run.predict(tmp_path / "other.csv")
    assert {r["series"] for r in answers} == {"a new site"} and 300 < answers[12]["value"] < 4000
    other.drop("demand").write_csv(tmp_path / "none.csv")
    with pytest.raises(DataError, match="no numeric column to forecast"):
        run.predict(tmp_path / "none.csv")
    other.drop("site").write_csv(tmp_path / "none.csv")
    with pytest.raises(DataError, match="'site'"):
        run.predict(tmp_path / "none.csv")
    pl.concat([other[:1000], other[500:1000].with_columns(pl.col("demand") + 1)]).write_csv(tmp_path / "twice.csv")
    with pytest.raises(BadData, match="conflicting-time"):
        run.predict(tmp_path / "twice.csv")
    other[:100].write_csv(tmp_path / "short.csv")  # less than what is read: the rest stands still
    assert len(run.predict(tmp_path / "short.csv")) == 48
    parts = [tmp_path / "a.csv", tmp_path / "b.csv"]
    other[:2000].write_csv(parts[0])
    other[2000:].write_csv(parts[1])
    assert [r["value"] for r in run.predict(parts)] == pytest.approx([r["value"] for r in answers])  # one series, two files


@pytest.mark.slow
def test_future_covariates_are_used(tmp_path):
    """The future depends on a known column only."""
    rng = np.random.default_rng(0)
    promo = (rng.random(900) < 0.4).astype(int)
    y = 10 + 5 * promo + 0.3 * rng.normal(size=900)
    first = dt.datetime(2024, 1, 1)
    rows = pl.DataFrame({"ds": [first + dt.timedelta(days=t) for t in range(900)], "y": y, "promo": promo})
    run = fit(
        rows,
        task="time-series-forecasting",
        target="y",
        minutes=3,
        out=tmp_path / "run",
        settings={
            **QUICK,
            "steps": 220,
            "lr": 1e-2,
            "evaluate": 110,
            "task.horizon": 4,
            "task.length": 8,
            "task.known": "promo",
            "model.hidden": 16,
            "model.width": 32,
            "model.context": 4,
        },
    )
    assert run.record["model"]["architecture"] == "lstm-forecaster"
    assert run.scores["mase"] < 0.25 and run.record["scores"]["baselines"][0]["scores"]["mase"] > 0.7
    ahead = pl.DataFrame(
        {"ds": [first + dt.timedelta(days=900 + t) for t in range(4)], "y": [None] * 4, "promo": [1, 0, 0, 1]},
        schema_overrides={"y": pl.Float64},
    )
    said = run.predict(pl.concat([rows, ahead], how="vertical_relaxed"))
    assert [r["value"] > 12.5 for r in said] == [True, False, False, True] and said[0]["time"] == "2026-06-19"
    assert not [n for n in said.notes if "no row with" in n]
    holes = ahead.with_columns(promo=pl.Series([1, None, 0, None]))
    notes = run.predict(pl.concat([rows, holes], how="vertical_relaxed")).notes
    assert any(n.startswith("2 of 4 future steps have an empty cell in 'promo'") for n in notes)
    notes = run.predict(rows).notes
    assert any(n.startswith("4 of 4 future steps have no row with promo") for n in notes)


def test_one_series_per_row_from_file_to_forecast(tmp_path):
    t = np.arange(90)
    table = [[f"H{i}", *(f"{v:.3f}" for v in (i + 2) * (2 + np.sin(2 * np.pi * t[: 80 + i % 9] / 12)))] for i in range(35)]
    lines = [",".join([*row, *[""] * (91 - len(row))]) for row in table]
    header = ",".join(f"V{i}" for i in range(1, 92))
    (tmp_path / "t.csv").write_text("\n".join([header, *lines]) + "\n")
    run = fit(
        tmp_path / "t.csv",
        task="time-series-forecasting",
        minutes=1,
        out=tmp_path / "run",
        settings={**QUICK, "steps": 60, "evaluate": 60, "lr": 1e-2},
    )
    assert (run.task.options.season, run.task.options.horizon) == (12, 18)  # as the values show, and M4 has it
    assert run.scores["mase"] < 2  # a sine: the naive scale is the rounding
    longer = ",".join(["new", *(f"{100 * (2 + np.sin(2 * np.pi * s / 12)):.3f}" for s in range(120))])  # trained on up to 88
    (tmp_path / "new.csv").write_text("\n".join([",".join(f"V{i}" for i in range(1, 122)), longer]) + "\n")
    said = run.predict(tmp_path / "new.csv")
    assert [r["time"] for r in said[:2]] == ["120", "121"] and len(said) == 18
    right = 100 * (2 + np.sin(2 * np.pi * np.arange(120, 138) / 12))
    assert np.abs(np.array([r["value"] for r in said]) - right).mean() < 15


def test_a_column_of_text_next_to_series_is_ignored_on_request(tmp_path):
    rng, t = np.random.default_rng(0), np.arange(60)
    rows = [[f"s{i}", str(i + 1), *(f"{v:.2f}" for v in i + t[1:] % 7 + rng.random(59)), "ab"[i % 2]] for i in range(30)]
    (tmp_path / "t.csv").write_text("\n".join(",".join(r) for r in [["name", *(f"V{i}" for i in t), "region"], *rows]))
    settings = {**QUICK, "steps": 5, "column.region": "identifier"}
    run = fit(tmp_path / "t.csv", task="time-series-forecasting", model="dlinear", out=tmp_path / "run", settings=settings)
    assert run.task.list_ignored() == ["region"]  # and not the first step, whose values are different whole numbers
    (tmp_path / "without.csv").write_text("\n".join(",".join(r[:-1]) for r in [["name", *(f"V{i}" for i in t), ""], *rows]))
    assert [dict(r)["value"] for r in run.predict(tmp_path / "t.csv")] == [
        dict(r)["value"] for r in run.predict(tmp_path / "without.csv")
    ]


def scores_of_naive(data, **options):
    made = Forecasting.build_examples(data, Forecasting.options_from(options))
    parts = split(made)
    task, test = Forecasting.fit(made.take(parts.train), Forecasting.Options()), made.take(parts.test)
    return {b.name: task.score(b.outputs, task.targets(test)) for b in task.baselines(made, test)}


@pytest.mark.parametrize(("name", "mse", "mae"), [("ETTh1", 1.295, 0.713), ("ETTh2", 0.432, 0.422)])
def test_naive_scores_on_ett_equal_the_published_ones(name, mse, mae, tmp_path):
    """Repeating the last value, Zeng et al. 2022, arXiv:2205.13504, table 2, with their splits, scales and windows."""
    found = sorted(unpack("series.zip", tmp_path, "").rglob(f"{name}.csv"))[0]
    scores = scores_of_naive(
        read(found, column_spec=Forecasting.column_spec), horizon=96, train=8640, validation=2880, test=2880
    )
    assert (scores["naive"]["mse"], scores["naive"]["mae"]) == pytest.approx((mse, mae), abs=1.1e-3)


def test_seasonal_naive_scores_on_m4_hourly_equal_the_published_ones(tmp_path):
    """Makridakis et al. 2020, Naive S on hourly series: sMAPE 13.912, MASE 1.193."""
    folder = unpack("series.zip", tmp_path, "")
    texts = [(folder / "m4" / f"Hourly-{n}.csv").read_text() for n in ("train", "test")]
    first, rest = (list(csv.reader(text.splitlines()))[1:] for text in texts)
    ahead = {row[0]: row[1:] for row in rest}
    rows = [[v for v in row if v] + ahead[row[0]] for row in first]
    width = max(map(len, rows))
    with (tmp_path / "hourly.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[f"V{i}" for i in range(1, width + 1)], *([*r, *[""] * (width - len(r))] for r in rows)])
    scores = scores_of_naive(read(tmp_path / "hourly.csv", column_spec=Forecasting.column_spec))["seasonal naive"]
    assert (scores["smape"], scores["mase"]) == pytest.approx((13.912, 1.193), abs=5e-4)


def write_series(path, dates, extra=False):
    rows = [f"{day},{f'{i % 5},' if extra else ''}{50 + i % 12 + i / 7}" for i, day in enumerate(dates)]
    path.write_text("\n".join([f"day,{'a,' if extra else ''}riders", *rows]) + "\n")
    return read(path)


def test_dates_and_one_number_are_a_series(tmp_path):
    """Rows at regular steps without other features; other tables of dates remain tables."""
    from fieldguide.tasks import infer_task

    first = dt.date(2021, 1, 31)
    daily = [first + dt.timedelta(i) for i in range(60)]
    months = [f"{2000 + i // 12}-{i % 12 + 1:02}" for i in range(60)]
    working = [day for day in daily if day.weekday() < 5]
    for dates in (daily, months, working, daily[::-1]):
        assert infer_task(write_series(tmp_path / "t.csv", dates))[0] is Forecasting
    rng = np.random.default_rng(0)
    scattered = [first + dt.timedelta(int(i)) for i in np.sort(rng.choice(900, 60, replace=False))]
    for dates in (scattered, [day for day in daily[:30] for _ in range(2)], daily[:10]):
        assert infer_task(write_series(tmp_path / "t.csv", dates))[0].name == "tabular-regression"
    data = write_series(tmp_path / "t.csv", daily, extra=True)
    assert infer_task(data)[0].name == "tabular-regression"
    assert "one row per step" in next(f.what for f in data.findings if f.check == "looks-like-series")


def test_names_of_series_are_found(tmp_path):
    """The only column of categories, if times repeat between its values only."""
    from fieldguide.tasks import infer_task

    days = [dt.date(2021, 1, 31) + dt.timedelta(i) for i in range(12)]
    lines = [f"{day},{source},{20 + i % 7 + len(source)}.5" for source in ("coal", "wind", "sun") for i, day in enumerate(days)]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["day,source,power", *lines]) + "\n")
    data = read(path)
    assert infer_task(data)[0] is Forecasting
    series = read(path, column_spec=Forecasting.column_spec)
    assert series.columns["source"].role == "series" and any(f.check == "series-chosen" for f in series.findings)
    path.write_text("\n".join(["day,source,power", *lines, lines[0]]) + "\n")  # a day of a source twice
    assert infer_task(read(path))[0].name == "tabular-regression"


@pytest.mark.parametrize("months, given, horizon", [(45, {}, 11), (200, {}, 18), (45, {"horizon": 5}, 5)])
def test_default_horizon_suits_short_series(tmp_path, months, given, horizon):
    """18 months, as in the M4 competition, or a quarter of the series; what the user sets is kept."""
    path = tmp_path / "t.csv"
    path.write_text("month,v\n" + "".join(f"{2000 + i // 12}-{i % 12 + 1:02},{50 + i % 12 + i / 7}\n" for i in range(months)))
    data = read(path, column_spec=Forecasting.column_spec)
    assert Forecasting.build_examples(data, Forecasting.options_from(given)).context.options.horizon == horizon

"""Forecasting: normalization, losses, scores, frequencies, covariates, and windows without look-ahead."""

from __future__ import annotations

import datetime as dt

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.data.dataset import Column
from fieldguide.data.preprocessing.covariates import Covariates
from fieldguide.data.splits import split
from fieldguide.data.timeseries.frequency import DAY, HOUR, MINUTE, default_horizon, estimate_season, infer_frequency
from fieldguide.data.timeseries.windows import CUT, SERIES
from fieldguide.metrics import forecasts
from fieldguide.models import registry
from fieldguide.objectives import Forecast
from fieldguide.objectives.forecast import compute_mean_and_scale, pinball_loss
from fieldguide.tasks.timeseries.forecasting import LEVELS, QUANTILES, Forecasting

NAN = float("nan")


class Last(nn.Module):
    """Repeats the last value and its own creation arguments: B T C -> B H C Q."""

    def __init__(self, horizon: int = 3, beside: tuple[float, ...] = ()):
        super().__init__()
        self.horizon, self.beside = horizon, nn.Parameter(torch.tensor([0.0, *beside]))

    def forward(self, series):
        self.seen = series
        return (series[:, -1:, :, None] + self.beside).expand(-1, self.horizon, -1, -1)


# Objective


def test_windows_are_normalized_by_observed_steps():
    series = torch.tensor([[[1.0, 7.0], [3.0, 7.0], [100.0, 7.0], [5.0, 7.0]]])
    observed = torch.tensor([[[True, True], [True, True], [False, True], [True, True]]])
    mean, scale = compute_mean_and_scale(series, observed)
    assert mean.flatten().tolist() == [3.0, 7.0]
    assert scale.flatten().tolist() == pytest.approx([(8 / 3 + 1e-5) ** 0.5, 1e-5**0.5])
    nobody = compute_mean_and_scale(series, torch.zeros_like(observed))
    assert torch.isfinite(nobody[0]).all() and nobody[1].max() < 0.01
    objective = Forecast(Last(), ["series"])
    values = objective.outputs({"series": series, "observed": observed})["values"]
    assert objective.model.seen[0, :2, 0].tolist() == pytest.approx([-2 / (8 / 3) ** 0.5, 0.0], abs=1e-5)
    assert values[0, :, :, 0].detach().numpy() == pytest.approx(np.array([[5.0, 7.0]] * 3))  # and back again
    Forecast(plain := Last(), ["series"], normalise=False).outputs({"series": series})
    assert torch.equal(plain.seen, series)


def test_forecast_follows_level_and_scale():
    torch.manual_seed(0)
    series, objective = torch.randn(4, 9, 2), Forecast(Last(beside=(0.3,)), ["series"], (0.5,))
    before, after = (objective.outputs({"series": x})["values"] for x in (series, 5 * series + 2))
    torch.testing.assert_close(after, 5 * before + 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("point", ["mae", "mse"])
def test_losses_equal_their_formulas(point):
    rng = np.random.default_rng(0)
    quantiles, beside = (0.1, 0.5, 0.9), (-1.0, 0.2, 1.5)
    series, target = rng.normal(size=(5, 4, 2)), rng.normal(size=(5, 3, 2))
    target[0, 1, 0] = target[3, :, 1] = NAN
    objective = Forecast(Last(3, beside), ["series"], quantiles, point, normalise=False)
    got = objective({"series": torch.tensor(series), "target": torch.tensor(target)})
    points, spreads = [], []
    for b in range(5):
        for h in range(3):
            for c in range(2):
                y = target[b, h, c]
                if y == y:
                    e = y - series[b, -1, c]
                    points.append(abs(e) if point == "mae" else e * e)
                    each = [(y - (series[b, -1, c] + d)) for d in beside]
                    spreads.append(sum(q * x if x > 0 else (q - 1) * x for q, x in zip(quantiles, each)) / 3)
    assert len(points) == 26
    assert float(got[point]) == pytest.approx(np.mean(points), rel=1e-5)
    assert float(got["pinball"]) == pytest.approx(np.mean(spreads), rel=1e-5)
    assert got["loss"].item() == pytest.approx(np.mean(points) + np.mean(spreads), rel=1e-5)
    got["loss"].backward()
    assert torch.isfinite(objective.model.beside.grad).all()
    lone = Forecast(Last(3), ["series"], (), point, normalise=False)(
        {"series": torch.tensor(series), "target": torch.tensor(target)}
    )
    assert set(lone) == {"loss"} and lone["loss"].item() == pytest.approx(np.mean(points), rel=1e-5)
    nothing = objective({"series": torch.tensor(series), "target": torch.full((5, 3, 2), NAN, dtype=torch.float64)})
    assert nothing["loss"].item() == 0


def test_errors_of_windows_are_weighted():
    rng = np.random.default_rng(0)
    batch = {name: torch.tensor(rng.normal(size=(3, n, 1))) for name, n in (("series", 4), ("target", 2))}
    objective = Forecast(Last(2, (-1.0, 1.0)), ["series"], (0.3, 0.7), "mase", normalise=False)
    each = [objective({name: x[i : i + 1] for name, x in batch.items()}) for i in range(3)]
    got = objective({**batch, "weight": torch.tensor([2.0, 0.0, 0.5])[:, None, None]})
    for name in ("mase", "pinball", "loss"):
        assert got[name].item() == pytest.approx((2 * each[0][name].item() + 0.5 * each[2][name].item()) / 3, rel=1e-5)


def test_pinball_loss_is_minimal_at_the_quantile():
    draws, levels = torch.randn(20_000, generator=torch.Generator().manual_seed(0)), torch.tensor([0.05, 0.5, 0.9])
    tried = torch.linspace(-3, 3, 601)
    loss = pinball_loss(tried[:, None, None].expand(-1, 1, 3), draws[:1].expand(601, 1), levels)  # shapes broadcast
    assert loss.shape == (601, 1, 3)
    mean = torch.stack([pinball_loss(t.expand(len(draws), 3), draws, levels).mean(0) for t in tried])
    assert tried[mean.argmin(0)].tolist() == pytest.approx(draws.quantile(levels).tolist(), abs=0.03)


def test_crossing_quantiles_and_invalid_settings():
    values = Forecast(Last(2, (2.0, -1.0)), ["series"], (0.1, 0.9), normalise=False).outputs({"series": torch.zeros(1, 3, 1)})
    assert values["values"][0, 0, 0].tolist() == [0.0, -1.0, 2.0]
    for wrong in ({"point": "rmse"}, {"quantiles": (0.9, 0.1)}, {"quantiles": (0.0, 0.5)}, {"quantiles": (0.5, 0.5)}):
        with pytest.raises(SettingsError):
            Forecast(Last(), ["series"], **wrong)


# Scores


def test_mase_and_smape_equal_m4():
    """The competition's definitions: mean |y - f|
    mean |y_t - y_(t-m)|; 200 |y - f|
    (|y| + |f|).
    """
    rng = np.random.default_rng(1)
    past, future, said = rng.uniform(1, 9, 50), rng.uniform(1, 9, 6), rng.uniform(1, 9, 6)
    scale = sum(abs(past[t] - past[t - 12]) for t in range(12, 50)) / 38
    assert forecasts.seasonal_scale(past, 12) == pytest.approx(scale)
    short = past[:10]
    assert forecasts.seasonal_scale(short, 12) == pytest.approx(np.mean([abs(short[t] - short[t - 1]) for t in range(1, 10)]))
    gap = past.copy()
    gap[20] = NAN
    kept = [abs(gap[t] - gap[t - 12]) for t in range(12, 50) if t not in (20, 32)]
    assert forecasts.seasonal_scale(gap, 12) == pytest.approx(np.mean(kept))
    assert np.isnan(forecasts.seasonal_scale(np.ones(30), 7)) and np.isnan(forecasts.seasonal_scale(np.full(30, NAN), 7))
    assert forecasts.seasonal_scale(np.tile([0.0, 1, 3], 9), 3) == pytest.approx(np.mean([1, 2, 3] * 8 + [1, 2]))
    assert forecasts.smape(said, future).mean() == pytest.approx(
        sum(200 * abs(y - f) / (abs(y) + abs(f)) for y, f in zip(future, said)) / 6
    )
    assert forecasts.smape(np.zeros(1), np.zeros(1)).tolist() == [0.0]


def test_widened_intervals_have_nominal_coverage():
    rng = np.random.default_rng(2)
    for spread in (0.3, 1.0, 4.0):  # far too narrow, and far too wide
        y = rng.normal(size=4000)
        low, high = np.full(4000, -spread), np.full(4000, spread)
        grow = forecasts.compute_interval_widening(low, high, y, 0.9)
        more = grow * (high - low)
        assert ((low - more <= y) & (y <= high + more)).mean() == pytest.approx(0.9, abs=0.01)
    assert forecasts.compute_interval_widening(low, high, np.full(4000, NAN), 0.9) == 0


def task_of(horizon=4, season=2, **more):
    task = Forecasting([], Forecasting.Options(horizon=horizon, season=season, length=8, **more))
    task.widths = {}
    return task


def test_scores_equal_their_definitions():
    rng = np.random.default_rng(3)
    task, rows = task_of(), 7
    mean, std, naive = rng.normal(size=rows), rng.uniform(1, 3, rows), rng.uniform(0.5, 2, rows)
    values = np.sort(rng.normal(size=(rows, 4, 1, 6)), -1)
    values[..., 0] = values[..., 3]
    future = rng.normal(size=(rows, 4)) * std[:, None] + mean[:, None]
    future[2, 1] = future[5, 3] = NAN
    truth = {"future": future, "mean": mean, "std": std, "naive": naive, "block": np.arange(rows)}
    scores = task.score({"values": values}, truth)
    se, ae, mase, percent, loss, inside = [], [], [], [], [], {0.8: [], 0.9: []}
    for i in range(rows):
        own, own_percent = [], []
        for h in range(4):
            y = future[i, h]
            if y != y:
                continue
            natural = values[i, h, 0] * std[i] + mean[i]
            z = (y - mean[i]) / std[i]
            se.append((z - values[i, h, 0, 0]) ** 2)
            ae.append(abs(z - values[i, h, 0, 0]))
            own.append(abs(y - natural[0]))
            own_percent.append(200 * abs(y - natural[0]) / (abs(y) + abs(natural[0])))
            gaps = [(q, z - v) for q, v in zip(QUANTILES, values[i, h, 0, 1:])]
            loss.append(np.mean([max(q * gap, (q - 1) * gap) for q, gap in gaps]))
            for level, (a, b) in ((0.8, (2, 4)), (0.9, (1, 5))):
                inside[level].append(natural[a] <= y <= natural[b])
        mase.append(np.mean(own) / naive[i])
        percent.append(np.mean(own_percent))
    wanted = {
        "mse": np.mean(se),
        "mae": np.mean(ae),
        "mase": np.mean(mase),
        "smape": np.mean(percent),
        "pinball": np.mean(loss),
        "coverage_80": np.mean(inside[0.8]),
        "coverage_90": np.mean(inside[0.9]),
    }
    assert scores == pytest.approx(wanted)
    assert {m.name for m in task.metrics} == set(scores)
    for level, (a, b) in LEVELS.items():
        assert QUANTILES[b] - QUANTILES[a] == pytest.approx(level)
    point = task.score({"values": values[..., :1]}, truth)  # a baseline has no interval
    assert point["mase"] == pytest.approx(wanted["mase"]) and np.isnan(point["coverage_80"]) and np.isnan(point["pinball"])
    low, high = task.intervals({"values": values}, truth)["mase"]
    assert low <= wanted["mase"] <= high and high > low


def test_calibration_is_fitted_per_step():
    rng, task = np.random.default_rng(4), task_of(horizon=2)
    spread = np.array([1.0, 3.0])[None, :, None]  # the second step is three times as unsure
    values = np.tile([0, -1, -0.5, 0, 0.5, 1.0], (900, 2, 1, 1))
    future = rng.normal(size=(900, 2)) * spread[..., 0]
    truth = {"future": future, "mean": np.zeros(900), "std": np.ones(900), "naive": np.ones(900), "block": np.arange(900)}
    task.calibrate({"values": values}, truth)
    after = task.postprocess({"values": values})["values"]
    for h in range(2):
        for level, (a, b) in LEVELS.items():
            share = ((after[:, h, 0, 1 + a] <= future[:, h]) & (future[:, h] <= after[:, h, 0, 1 + b])).mean()
            assert share == pytest.approx(level, abs=0.02)
    assert (np.diff(after[..., 1:], axis=-1) >= 0).all() and (values[0, 0, 0, 1:] == [-1, -0.5, 0, 0.5, 1]).all()
    values[..., 0] = 50.0
    assert (task.postprocess({"values": values})["values"][..., 5] >= 50).all()  # the point lies in its interval


# Frequencies and the calendar


def moments(*texts: str) -> np.ndarray:
    return np.array(texts, dtype="M8[us]").astype(np.int64)


@pytest.mark.parametrize(
    ("times", "words", "season", "horizon"),
    [
        (np.arange(50) * HOUR, "hour", 24, 48),
        (np.arange(50) * 15 * MINUTE, "15 minutes", 96, 96),
        (np.arange(50) * DAY, "day", 7, 14),
        (np.arange(50) * 7 * DAY, "week", 52, 13),
        (np.arange(9) * 3 * DAY, "3 days", 1, 12),
        (np.arange(9) * 1_000_000, "second", 60, 60),
        (moments(*(f"20{y:02d}-{m:02d}-01" for y in range(3) for m in range(1, 13))), "month", 12, 18),
        (moments("2020-01-31", "2020-02-29", "2020-03-31", "2020-04-30", "2020-05-31"), "month", 12, 18),
        (moments("2021-02-28", "2021-03-31", "2021-04-30", "2021-05-31"), "month", 12, 18),
        (moments("2020-03-31", "2020-06-30", "2020-09-30", "2020-12-31", "2021-03-31"), "quarter", 4, 8),
        (moments(*(f"{y}-07-01" for y in range(1990, 2020))), "year", 1, 6),
        (moments(*(str(d) for d in np.busday_offset("2024-01-01", np.arange(30)))), "business day", 5, 14),
    ],
)
def test_clock_and_calendar_frequencies(times, words, season, horizon):
    found = infer_frequency([times, times[:3]], dates=True)
    assert (found.words, found.season, default_horizon(found, found.season)) == (words, season, horizon)
    assert (found.times(times[0], len(times)) == times).all()  # going on gives the same moments
    position = found.position(times)
    assert np.diff(position) == pytest.approx(np.ones(len(times) - 1))


def test_numeric_frequencies():
    assert (
        infer_frequency([np.array([3.0, 5.0, 7.0, 11.0])], dates=False).size == 2
        and infer_frequency([np.array([1.0])], dates=False) is None
    )
    assert infer_frequency([np.array([3.0, 5.0])], dates=False).season is None


def test_season_estimated_from_values():
    rng, t = np.random.default_rng(0), np.arange(600)
    for season in (7, 12, 24):
        shape = rng.normal(size=season)
        assert estimate_season([shape[t % season] + 0.1 * rng.normal(size=600) + 0.01 * t for _ in range(4)]) == season
    assert estimate_season([rng.normal(size=600).cumsum() for _ in range(4)]) == 1
    assert estimate_season([np.ones(100)]) == 1 == estimate_season([np.ones(3)])


def test_column_and_calendar_covariates():
    hours = np.arange(24 * 14) * HOUR + moments("2024-01-01")[0]
    rows = pl.DataFrame(
        {"price": [1.0, 3.0, None, 5.0], "promo": [True, False, True, None], "kind": ["a", "b", "a", None], "same": [1.0] * 4}
    )
    columns = [Column("price", "number"), Column("promo", "boolean"), Column("kind", "category"), Column("same", "number")]
    made = Covariates.fit(rows, columns, ["kind"], infer_frequency([hours], True), 2 * 365 * 24)
    assert (made.past, made.known) == (2, 2 + 2 * 4)  # where in its day, week, month and year
    start = np.array([0, 4, 6])
    past = made.past_values(rows, np.array([0, 1, 2, -1, 2, 3]), start)
    z = lambda v: (v - 3) / np.std([1, 3, 5])
    assert past[:, 0] == pytest.approx([z(1), z(3), z(3), z(3), z(5), z(5)])  # the last before; in a new series, the next
    known = made.future_values(rows, np.array([0, 1, 3, -1]), hours[[0, 6, 30, 24 * 7]])
    assert known[:, :2].tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]
    assert known[:, 2] == pytest.approx([0, 1, 1, 0], abs=1e-6)  # sine of the hour: 0, 6, 6, 0 o'clock
    assert known[0, 4:6] == pytest.approx([0, 1]) and known[3, 4:6] == pytest.approx([0, 1], abs=1e-6)  # Mondays
    again = Covariates.from_json(made.to_json())
    assert (again.past_values(rows, np.array([0, 1]), np.array([0, 2])) == past[:2]).all()
    monthly = Covariates.fit(rows, [], [], infer_frequency([moments("2020-01-01", "2020-02-01", "2020-03-01")], True), 25)
    assert monthly.turns == ["year"]
    for weeks, turns in ((0, 0), (1, 1), (2, 2), (8, 2), (9, 3), (104, 3), (105, 4)):  # day, week, month, year: seen twice
        assert len(Covariates.fit(rows, [], [], infer_frequency([hours], True), weeks * 7 * 24).turns) == turns
    assert monthly.future_values(rows, np.array([-1]), moments("2020-07-02"))[0] == pytest.approx([np.sin(np.pi), -1], abs=0.01)


# Windows

ALONE, BESIDE = registry.card("dlinear"), registry.card("lstm-forecaster")


def table(days: int = 60, series: int = 2, **columns) -> pl.DataFrame:
    """Return values that encode their position: series * 1000 + step."""
    first = dt.datetime(2024, 1, 1)
    parts = [
        pl.DataFrame(
            {
                "unique_id": [f"s{i}"] * days,
                "ds": [first + dt.timedelta(days=t) for t in range(days)],
                "y": [1000.0 * i + t for t in range(days)],
                **columns,
            }
        )
        for i in range(series)
    ]
    return pl.concat(parts)


def windows(rows, **options):
    data = read(rows, column_spec=Forecasting.column_spec)
    return Forecasting.build_examples(data, Forecasting.options_from(options))


def test_splits_are_periods_and_windows_do_not_look_ahead():
    made = windows(table(100), horizon=5, length=10)
    found, at = made.context.panel, made.rows[CUT].to_numpy() - made.context.panel.start[made.rows[SERIES].to_numpy()]
    side = {name: at[made.splits == name] for name in ("train", "val", "test")}
    assert (side["train"].min(), side["train"].max()) == (10, 65)  # futures end at 70
    assert (side["val"].min(), side["val"].max()) == (70, 75) and (side["test"].min(), side["test"].max()) == (80, 95)
    assert len(side["test"]) == 2 * 16
    parts = split(made)
    assert (made.splits[parts.train] == "train").all() and "by time" in parts.description and "seed" not in parts.description
    task = Forecasting.fit(made.take(parts.train), Forecasting.Options(horizon=5, length=10))
    assert task.standards["s1"] == pytest.approx((1000 + 34.5, np.arange(70).std()))  # of the training part alone
    batch = task.batches(made, ALONE, Settings()).make(np.arange(len(made)), None)
    mean, std = (np.array([task.standards[f"s{s}"][i] for s in made.rows[SERIES]]) for i in (0, 1))
    past = batch["series"][..., 0].numpy() * std[:, None] + mean[:, None]
    future = batch["target"][..., 0].numpy() * std[:, None] + mean[:, None]
    base = 1000.0 * made.rows[SERIES].to_numpy() + at
    assert abs(past - (base[:, None] + np.arange(-10, 0))).max() < 0.01
    assert abs(future - (base[:, None] + np.arange(5))).max() < 0.01
    assert "observed" not in batch
    truth = task.targets(made)
    assert abs(truth["future"] - (base[:, None] + np.arange(5))).max() < 1e-9
    assert truth["naive"].tolist() == [7.0] * len(made)  # of a line, by the season of seven days
    first = made.take([int(np.flatnonzero(made.splits == "test")[0])])
    assert first.locate_row(0).endswith(":81") and found.names == ["s0", "s1"]  # row 81 is step 80, where the future begins


def test_standard_ett_splits():
    """8640
    2880
    2880 steps, pasts extend over the border: 8209, 2785 and 2785 windows per series.
    """
    hours = [dt.datetime(2016, 7, 1) + dt.timedelta(hours=h) for h in range(17420)]
    wave = np.sin(np.arange(17420))
    made = windows(
        pl.DataFrame({"date": hours, "a": wave, "b": wave + np.arange(17420)}),
        horizon=96,
        length=336,
        train=8640,
        validation=2880,
        test=2880,
    )
    cuts, splits = made.rows[CUT].to_numpy(), made.splits
    counts = [int((splits == name).sum()) for name in ("train", "val", "test")]
    assert counts == [2 * 8209, 2 * -(-2785 // 2), 2 * 2785]  # validation: every second
    assert (cuts[splits == "test"].min(), cuts[splits == "test"].max()) == (11520, 14400 - 96)
    assert (cuts[splits == "val"].max(), cuts[splits == "train"].max()) == (11520 - 96, 8640 - 96)
    assert "6,040 steps after the test unused" in made.split_description  # of both series
    task = Forecasting.fit(made, Forecasting.Options())
    assert task.standards["a"] == pytest.approx((wave[:8640].mean(), wave[:8640].std()))


def test_mase_is_scaled_by_values_before_the_split():
    steps = np.r_[np.arange(70.0), 70 + 5 * np.arange(30.0)]  # steeper from validation on
    rows = table(100, series=1).with_columns(pl.Series("y", steps))
    made = windows(rows, horizon=5, length=10, season=1)
    task = Forecasting.fit(made, Forecasting.Options())
    naive = task.targets(made)["naive"]
    assert set(naive[made.splits != "test"]) == {1.0} and set(naive[made.splits == "test"]) == {np.diff(steps[:80]).mean()}
    beyond = task.outcomes(made.context.panel, torch.tensor([0]), torch.tensor([[98, 99, 100, 101]]))[0]
    assert beyond[:2].tolist() == [210, 215] and beyond[2:].isnan().all()  # nothing is known behind the end


def test_many_series_are_tested_on_the_last_horizon():
    made = windows(table(60, series=31), horizon=5)
    assert [int((made.splits == name).sum()) for name in ("val", "test")] == [31, 31]
    found, rows = made.context.panel, made.rows.filter(pl.Series(made.splits == "test"))
    assert (rows[CUT].to_numpy() == found.high - 5).all()
    with pytest.raises(SettingsError, match="fewer than the horizon"):
        windows(table(60, series=31), horizon=5, test=3)
    with pytest.raises(SettingsError, match="exceed the 60"):
        windows(table(60), horizon=5, train=50, validation=10, test=10)
    with pytest.raises(DataError, match="longest of 2 series has 60 steps, too few"):
        windows(table(60), horizon=40)


def test_splits_given_by_the_source(tmp_path):
    for name, part in (("train", slice(0, 40)), ("test", slice(40, 60))):
        pl.concat([x[part] for x in table(60).partition_by("unique_id")]).write_csv(tmp_path / f"{name}.csv")
    made = windows(tmp_path, horizon=5, length=10)
    at = made.rows[CUT].to_numpy() - made.context.panel.start[made.rows[SERIES].to_numpy()]
    assert (at[made.splits == "train"].max(), at[made.splits == "val"].min(), at[made.splits == "test"].min()) == (30, 35, 40)
    rows = table(60).with_columns(pl.Series("split", (["test"] * 20 + ["train"] * 40) * 2))
    rows.write_csv(tmp_path / "odd.csv")
    with pytest.raises(DataError, match=r"odd.csv:22: .*not consecutive in time: in series 's0'"):
        windows(tmp_path / "odd.csv", horizon=5)


def test_gaps_are_not_trained_on_or_scored():
    gone = pl.col("y").is_in([20.0, 21.0, 55.0])
    rows = table(60, series=1).with_columns(pl.when(gone).then(None).otherwise(pl.col("y")).alias("y"))
    made = windows(rows.filter(pl.col("y").is_null() | (pl.col("y") != 30)), horizon=5, length=10)  # 30 has no row at all
    found = made.context.panel
    assert np.isnan(found.values[[20, 21, 30, 55], 0]).all() and found.row[30] == -1 and len(found.values) == 60
    assert found.filled[[19, 20, 21, 22, 29, 30, 31], 0].tolist() == [19, 19, 19, 22, 29, 29, 31]  # never what comes after
    task = Forecasting.fit(made, Forecasting.Options())
    batches = task.batches(made, ALONE, Settings())
    row = int(np.flatnonzero(made.rows[CUT].to_numpy() == 24)[0])
    batch = batches.make(np.array([row]), None)
    assert (~batch["observed"][0, :, 0]).nonzero().flatten().tolist() == [6, 7]  # 20 and 21 of 14 .. 23
    last = int(np.flatnonzero(made.rows[CUT].to_numpy() == 55)[0])
    assert torch.isnan(batches.make(np.array([last]), None)["target"][0, :, 0]).tolist() == [True] + [False] * 4
    short = windows(table(30, series=1), horizon=3, length=20)
    at = short.rows[CUT].to_numpy()
    assert at.min() < 20
    task = Forecasting.fit(short, Forecasting.Options())
    batch = task.batches(short, ALONE, Settings()).make(np.array([0]), None)
    lacking = 20 - int(at[0])
    assert batch["observed"][0, :lacking].sum() == 0 and batch["observed"][0, lacking:].all()
    assert (batch["series"][0, : lacking + 1] == batch["series"][0, lacking]).all()


def test_future_covariates_cover_the_horizon():
    rows = table(60, promo=[float(t % 5) for t in range(60)], weather=[float(t) for t in range(60)])
    made = windows(rows, horizon=5, length=10, known="promo", calendar=False)
    task = Forecasting.fit(made, Forecasting.options_from({"known": "promo"}))
    assert (task.covariates.past, task.covariates.known) == (1, 1) and task.data_facts()["known"] == 1
    batch = task.batches(made, BESIDE, Settings()).make(np.arange(len(made)), None)
    promo, weather = task.covariates.columns
    at = made.rows[CUT].to_numpy() - made.context.panel.start[made.rows[SERIES].to_numpy()]
    known = batch["known"][..., 0].numpy() * promo.std + promo.mean
    assert abs(known - (at[:, None] + np.arange(-10, 5)) % 5).max() < 1e-4  # also of the second series
    past = batch["past"][..., 0].numpy() * weather.std + weather.mean
    assert abs(past - (at[:, None] + np.arange(-10, 0))).max() < 1e-4
    assert weather.mean < 30  # learnt from the training part
    with pytest.raises(SettingsError, match=r"'promos', which is no covariate\. Did you mean 'promo'"):
        Forecasting.fit(windows(rows, horizon=5, known="promos"), Forecasting.Options())


def test_baselines_equal_their_definitions():
    made = windows(table(100, series=1), horizon=9, length=10)
    task = Forecasting.fit(made.take(split(made).train), Forecasting.Options())
    test = made.take(split(made).test)
    mean, std = task.standards["s0"]
    said = {b.name: b.outputs["values"][0, :, 0, 0] * std + mean for b in task.baselines(made, test)}
    at = int(test.rows[CUT][0])
    assert said["naive"] == pytest.approx(np.full(9, at - 1))
    assert said["seasonal naive"] == pytest.approx(at - 7 + np.arange(9) % 7)
    assert said["drift"] == pytest.approx(at + np.arange(9))  # a line goes on as it is


def test_scaled_loss_is_the_score():
    """With `point="mase"`, errors of standardized values times the weights of their series are the scaled errors of the score."""
    rng = np.random.default_rng(0)
    wide = {"ds": [dt.date(2024, 1, 1) + dt.timedelta(days=t) for t in range(80)]}
    wide |= {name: level * (1 + np.arange(80) % 7) + rng.normal(size=80) for name, level in (("a", 3.0), ("b", 100.0))}
    wide["flat"] = np.arange(80) % 7 * 1.0
    made = windows(pl.DataFrame(wide), horizon=5, length=10, season=7, point="mase")
    part = split(made)
    task = Forecasting.fit(made.take(part.train), made.context.options)
    held = made.take(part.validation)
    batches = task.batches(held, ALONE, Settings())
    batch = batches.make(np.arange(len(held)), None)
    errors = (batch["target"].abs() * batch["weight"])[..., 0].mean(1).numpy()
    values = np.zeros((len(held), 5, 1, 1))
    known = task.window_errors({"values": values}, task.targets(held))["mase"]
    np.testing.assert_allclose(errors, known, rtol=1e-4)
    assert len(np.unique(batch["weight"])) == 3 and "weight" not in task.predict_batches(held, ALONE).make(np.arange(2), None)

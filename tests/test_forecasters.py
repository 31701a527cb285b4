"""iTransformer, N-HiTS, TiDE and the Temporal Fusion Transformer: traps, names of the authors' files, covariates in a fit."""

from __future__ import annotations

import datetime as dt

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from fieldguide import open_run
from fieldguide.automl.fit import fit
from fieldguide.checkpoints import weights
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data.timeseries.windows import CUT, SERIES
from fieldguide.models.registry import card, create
from fieldguide.tasks.timeseries.forecasting import Forecasting
from test_data_real import unpack
from test_forecast import table, windows
from test_models import batch, tiny

QUICK = {"precision": "float32", "batch": 32}

# ------------------------------------------------------------------------------------------------ networks


@torch.no_grad()
def test_itransformer_author_files(tmp_path):
    """Their MLPs are convolutions of width 1, and queries, keys and values are apart."""
    ours = create("itransformer-test", known=0).eval()
    path = weights.save(ours, tmp_path / "model.safetensors", "official")
    theirs = weights.read(path)
    layer = "encoder.attn_layers.1."
    assert theirs[layer + "conv1.weight"].shape == (12, 8, 1) and theirs[layer + "conv2.weight"].shape == (8, 12, 1)
    assert torch.equal(theirs[layer + "attention.key_projection.bias"], ours.blocks[1].qkv.bias[8:16])
    other = create("itransformer-test", known=0).eval()
    assert weights.load(other, theirs) == []
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), other.state_dict().values()))


@torch.no_grad()
def test_itransformer_reads_series_in_any_order_and_number():
    model, (series, past, known) = tiny("itransformer"), batch("itransformer")
    before = model(series, past, known)
    swapped = model(series[..., [2, 0, 1]], past[..., [1, 0]], known[..., [1, 2, 0]])
    torch.testing.assert_close(swapped, before[:, :, [2, 0, 1]], rtol=1e-9, atol=1e-9)
    assert model(series[..., :1], past, known).shape == (5, 4, 1, 2)
    further = model(series[..., :2], torch.cat([past, series[..., 2:]], 2), known)  # a covariate of the past is a series
    torch.testing.assert_close(further, before[:, :, :2], rtol=1e-9, atol=1e-9)
    moved = model(3 * series + 7, past, known)
    torch.testing.assert_close(moved, 3 * before + 7, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_nhits_begins_with_the_last_value_and_predicts_few_values():
    model = create("nhits-test").eval()
    for block in model.blocks:
        nn.init.zeros_(block.head.weight)
        nn.init.zeros_(block.head.bias)
    (series,) = batch("nhits", dtype=torch.float32)
    assert torch.equal(model(series), series[:, -1:, :, None].expand(-1, 6, -1, 2))
    widths = [block.head.out_features - 13 for block in model.blocks]
    assert widths == [2 * 2, 2 * 3, 2 * 6] and [block.layers[0].in_features for block in model.blocks] == [4, 7, 13]
    assert all(sum(isinstance(m, nn.Linear) for m in block.layers) == 2 for block in model.blocks)
    with pytest.raises(SettingsError, match=r"pools=\(2,\)"):
        create("nhits-test", pools=(2,))


@pytest.mark.parametrize("name", ["itransformer", "nhits", "tide"])
def test_past_of_another_length_is_rejected(name):
    first, *others = batch(name)
    with pytest.raises(DataError, match=r"has \d+ steps, but the model was created with length"):
        tiny(name)(torch.cat([first, first], 1), *others)


def test_tide_single_forecast_depends_on_covariates():
    """Normalizing the output of a step, as a package does, would make a single value constant."""
    model, (series, past, known, static) = tiny("tide", values=1), batch("tide")
    before = model(series, past, known, static)
    moved = known.clone()
    moved[:, -1] += 1  # the last step of the horizon
    assert not torch.allclose(model(series, past, moved, static), before)


def test_tft_weights_are_distributions_and_look_back_only():
    model, inputs = tiny("tft"), batch("tft")
    found = model.weigh_inputs(*inputs)
    rows = 5 * 3  # windows times series
    assert found["past"].shape == (rows, 7, 5) and found["known"].shape == (rows, 3, 2) and found["static"].shape == (rows, 2)
    assert found["attention"].shape == (rows, 3, 10)
    assert all(torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0])) for weights in found.values())
    assert [int((row == 0).sum()) for row in found["attention"][0]] == [2, 1, 0]
    moved = inputs[2].clone()
    moved[:, -1] += 1
    before, after = model(*inputs), model(inputs[0], inputs[1], moved, inputs[3])
    assert torch.equal(before[:, :2], after[:, :2]) and not torch.allclose(before[:, 2], after[:, 2])


def test_tft_norms_and_size_of_the_authors():
    model = tiny("tft")
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-3}
    with torch.device("meta"):
        large = create("tft-electricity")
    c = large.config
    d, grn = (
        160,
        lambda i, o, context=0: i * 160 + 160 + context * 160 + 160 * 161 + 161 * 2 * o + 2 * o + (i != o) * (i * o + o),
    )
    select = lambda widths, context: (
        sum((w + 1) * d + grn(d, d) for w in widths) + (grn(len(widths) * d, len(widths), context) if len(widths) > 1 else 0)
    )
    unit = d * 2 * d + 2 * d + 2 * d
    expected = select((369,), 0) + 4 * grn(d, d) + select((1, 1, 1, 1), d) + select((1, 1, 1), d) + 2 * (8 * d * d + 8 * d)
    expected += 3 * unit + grn(d, d, d) + 2 * d * d + 2 * d * d // 4 + grn(d, d) + 3 * d + 3
    assert (c.static, c.known, c.past) == (369, 3, 0) and sum(p.numel() for p in large.parameters()) == expected


def test_tft_without_covariates_reads_the_place():
    model = create("tft-test", past_variables=(), known_variables=(), static_variables=()).eval()
    empty = torch.zeros(2, 7, 0), torch.zeros(2, 10, 0), torch.zeros(2, 0)
    assert model(torch.randn(2, 7, 1), *empty).shape == (2, 3, 1, 2)
    assert set(model.weigh_inputs(torch.randn(2, 7, 1), *empty)) == {"past", "known", "attention"}


# ------------------------------------------------------------------------------------------------ data


def test_static_columns_are_properties_of_a_series():
    rows = table(60, series=3).with_columns(
        size=pl.col("unique_id").replace_strict({"s0": 1.0, "s1": 2.0, "s2": 6.0}),
        kind=pl.when(pl.col("unique_id") == "s1").then(pl.lit("b")).otherwise(pl.lit("a")),
        weather=pl.int_range(pl.len()) % 7,
    )
    made = windows(rows, horizon=5, length=10)
    task = Forecasting.fit(made, Forecasting.Options())
    dims = task.model_dims()
    assert dims["static_variables"] == (1, 2, 3) and dims["past_variables"] == (1,) and dims["past"] == 1 + 1 + 2
    assert task.name_variables()["static"] == ["size", "kind", "series"]
    made_batch = task.batches(made, card("tide"), Settings()).make(np.arange(len(made)), None)
    mean, std = 3.0, np.std([1, 2, 6])
    for row, series in zip(made_batch["static"], made.rows[SERIES]):
        wanted = [(([1, 2, 6][series] - mean) / std), *([0, 1] if series == 1 else [1, 0]), *np.eye(3)[series]]
        assert row.tolist() == pytest.approx(wanted)
    assert made_batch["past"].shape[2] == 1
    assert task.batches(made, card("lstm-forecaster"), Settings()).make(np.arange(2), None)["past"].shape[2] == 4
    again = Forecasting.from_state(task.columns, task.options, task.state(), None)
    assert again.covariates == task.covariates


def test_other_series_of_a_wide_table(tmp_path):
    days = [dt.datetime(2024, 1, 1) + dt.timedelta(days=t) for t in range(80)]
    rng = np.random.default_rng(0)
    rows = pl.DataFrame({"ds": days, **{name: rng.normal(size=80).cumsum() for name in "abc"}})
    made = windows(rows, horizon=4, length=8, others=True)
    task = Forecasting.fit(made, Forecasting.options_from({"others": True}))
    assert task.model_dims()["past"] == 2 and task.model_dims()["past_variables"] == (1, 1)
    made_batch = task.batches(made, card("itransformer"), Settings()).make(np.arange(len(made)), None)
    for row, series in enumerate(made.rows[SERIES]):
        others = [name for name in "abc" if name != "abc"[series]]
        at = int(made.rows[CUT][row])
        for place, name in enumerate(others):
            mean, std = task.standards[name]
            past = made_batch["past"][row, :, place].numpy() * std + mean
            assert past == pytest.approx(rows[name].to_numpy()[at - 8 : at], abs=1e-2)
    with pytest.raises(SettingsError, match="needs a wide table"):
        Forecasting.fit(windows(table(60), horizon=4, others=True), Forecasting.options_from({"others": True}))


@pytest.fixture(scope="module")
def shops() -> pl.DataFrame:
    """Sales of shops of two kinds; promotions, which are known in advance, double those of one kind."""
    rng = np.random.default_rng(0)
    parts = []
    for shop in range(4):
        promo = (rng.random(300) < 0.4).astype(int)
        sales = 20 + (10 if shop % 2 else -10) * promo + rng.normal(size=300)
        days = [dt.datetime(2024, 1, 1) + dt.timedelta(days=t) for t in range(300)]
        parts.append(
            pl.DataFrame(
                {"unique_id": f"s{shop}", "ds": days, "sales": sales, "promo": promo, "kind": "odd" if shop % 2 else "even"}
            )
        )
    return pl.concat(parts)


@pytest.mark.parametrize("name", ["tide", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tft", "itransformer"))])
def test_networks_use_what_is_known_in_advance(name, shops, tmp_path):
    fields = {
        "tft": {"dim": 8, "heads": 2},
        "tide": {"hidden": 24, "local": 16},
        "itransformer": {"dim": 16, "hidden": 24},
    }[name] | {"dropout": 0.0}
    run = fit(
        shops,
        task="time-series-forecasting",
        target="sales",
        model=name,
        minutes=3,
        out=tmp_path / "run",
        settings={
            **QUICK,
            "steps": 250 if name == "itransformer" else 120,
            "lr": 1e-2,
            "evaluate": 60,
            "task.horizon": 3,
            "task.length": 8,
            "task.known": "promo",
            "task.calendar": False,
            "task.normalise": False,
            **{f"model.{key}": value for key, value in fields.items()},
        },
    )
    assert run.record["model"]["architecture"] == name
    naive = min(b["scores"]["mase"] for b in run.record["scores"]["baselines"])
    assert run.scores["mase"] < 0.5 * naive, (run.scores, naive)
    if name == "tft":
        page = (run.path / "report.html").read_text()
        assert all(words in page for words in ("Variables of the past", "Properties of the series", "Attention", "promo"))
        assert len(open_run(run.path).predict(shops)) == 4 * 3


@pytest.mark.slow
def test_nhits_learns_a_season(tmp_path):
    """Two series of 24 hours, one of them with another season on top; the report has no weights."""
    hours = np.arange(700)
    noise = np.random.default_rng(0).normal(size=(2, 700)) * 0.2
    a = 10 + 3 * np.sin(hours / 24 * 2 * np.pi) + noise[0]
    b = 50 + 5 * np.cos(hours / 24 * 2 * np.pi) + 4 * np.sin(hours / 17 * 2 * np.pi) + noise[1]
    times = [dt.datetime(2024, 1, 1) + dt.timedelta(hours=int(h)) for h in hours]
    run = fit(
        pl.DataFrame({"ds": times, "a": a, "b": b}),
        task="time-series-forecasting",
        model="nhits-mini",
        minutes=3,
        out=tmp_path / "run",
        settings={
            **QUICK,
            "steps": 400,
            "lr": 3e-3,
            "evaluate": 200,
            "task.horizon": 12,
            "task.length": 72,
            "model.hidden": 48,
        },
    )
    naive = {b["name"]: b["scores"]["mase"] for b in run.record["scores"]["baselines"]}
    assert run.scores["mase"] < 0.5 * naive["seasonal naive"], (run.scores, naive)
    assert "What the forecasts depend on" not in (run.path / "report.html").read_text()


@pytest.mark.slow
def test_itransformer_on_real_data(tmp_path):
    """ETTh1 with the usual borders; repeating the last value has an MSE of 1.295, and the paper .386."""
    found = sorted(unpack("series.zip", tmp_path, "").rglob("ETTh1.csv"))[0]
    borders = {"task.horizon": 96, "task.length": 96, "task.train": 8640, "task.validation": 2880, "task.test": 2880}
    run = fit(
        found,
        task="time-series-forecasting",
        model="itransformer-etth1",
        minutes=10,
        out=tmp_path / "run",
        settings={"precision": "float32", "batch": 64, "steps": 300, "evaluate": 100, "task.others": True, **borders},
    )
    assert run.scores["mse"] < 0.43 and run.scores["mae"] < 0.44

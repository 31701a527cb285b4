"""Chronos-Bolt: the authors' files and pipeline, missing values, long horizons; and zero-shot forecasts in a fit."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fieldguide
from cases import build_chronos
from fieldguide.automl import pretrained
from fieldguide.automl.fit import fit
from fieldguide.checkpoints import load
from fieldguide.core.errors import SettingsError
from fieldguide.models.registry import card, create
from fieldguide.models.transformer.chronos_bolt import weigh_levels
from test_tuning import Says

SIZES = [size for size in card("chronos-bolt").sizes if size != "chronos-bolt-test"]
LEVELS = tuple(round(0.1 * i, 1) for i in range(1, 10))


def package() -> ModuleType:
    """Return the authors' module, after the operators of torchvision are defined that transformers needs."""
    importlib.import_module("tv")
    return importlib.import_module("chronos.chronos_bolt")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder as on the hub, of a small network."""
    torch.manual_seed(0)
    ours = create(
        "chronos-bolt-test", levels=LEVELS, quantiles=(), max_length=64, block=8, patch=8, stride=8, horizon=8, values=1, far=16
    )
    network = build_chronos(ours.config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("chronos")
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_equal_the_package(size):
    with torch.device("meta"):
        ours, theirs = create(size), build_chronos(card("chronos-bolt").resolve_config(size))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    c = ours.config
    assert (c.block, c.max_length, c.patch, c.levels) == (64, 2048, 16, LEVELS)


def test_folder_is_recognized_and_written_back(checkpoint, tmp_path):
    found = load.inspect_checkpoint(checkpoint)
    assert found.card.name == "chronos-bolt" and found.values["levels"] == LEVELS and found.values["block"] == 8
    ours = fieldguide.load(checkpoint)
    load.save(ours, tmp_path / "again", format="hf")
    written = json.loads((tmp_path / "again/config.json").read_text())
    known = json.loads((checkpoint / "config.json").read_text())
    assert written["chronos_config"] == known["chronos_config"] and written["architectures"] == known["architectures"]
    again = package().ChronosBoltModelForForecasting.from_pretrained(tmp_path / "again").state_dict()
    theirs = package().ChronosBoltModelForForecasting.from_pretrained(checkpoint).state_dict()
    assert again.keys() == theirs.keys() and all(torch.equal(again[name], theirs[name]) for name in again)


def test_published_shapes_are_recognized_without_a_configuration(tmp_path):
    with torch.device("meta"):
        names = {
            name: t.shape
            for name, t in build_chronos(card("chronos-bolt").resolve_config("chronos-bolt-tiny")).state_dict().items()
        }
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, tmp_path / "model.safetensors")
    assert load.inspect_checkpoint(tmp_path / "model.safetensors").size == "chronos-bolt-tiny"


def test_t5_is_still_recognized(tmp_path):
    load.save(create("t5-test"), tmp_path / "t5", format="hf")
    assert load.inspect_checkpoint(tmp_path / "t5").card.name == "t5"


@pytest.mark.parametrize("steps, horizon", [(40, 8), (37, 5), (90, 20), (3, 8)])
def test_forecasts_equal_the_pipeline(checkpoint, steps, horizon):
    """Windows that are no multiple of a patch, longer than the context, or shorter than a patch; horizons beyond a block."""
    pipeline = package().ChronosBoltPipeline(package().ChronosBoltModelForForecasting.from_pretrained(checkpoint).eval())
    ours = fieldguide.load(checkpoint, horizon=horizon, quantiles=LEVELS, values=10)
    x = 50 + 9 * torch.randn(4, steps).cumsum(1)
    x[1, : steps // 2] = torch.nan
    x[2, -1] = torch.nan
    x[3] = 7.0  # constant
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pipeline.predict(x, prediction_length=horizon)
        got = ours(x[..., None])[:, :, 0]
    torch.testing.assert_close(got[..., 1:].transpose(1, 2), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(got[..., 0], got[..., 5])  # the median


def test_quantiles_between_and_beyond_the_trained_ones():
    assert weigh_levels(0.3, LEVELS) == [0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert weigh_levels(0.15, LEVELS) == pytest.approx([0.5, 0.5, 0, 0, 0, 0, 0, 0, 0])
    normal = np.array([-1.2815515655, -0.8416212336, -0.5244005127, -0.2533471031, 0.0, 0.2533, 0.5244, 0.8416, 1.2815515655])
    assert np.dot(weigh_levels(0.05, LEVELS), normal) == pytest.approx(-1.6448536, abs=1e-5)
    assert np.dot(weigh_levels(0.95, LEVELS), normal) == pytest.approx(1.6448536, abs=1e-5)
    with pytest.raises(SettingsError, match=r"quantiles=\(0.0,\)"):
        create("chronos-bolt-test", quantiles=(0.0,))


def test_scale_and_shift_of_a_window_carry_over(checkpoint):
    ours = fieldguide.load(checkpoint, horizon=20).double()
    x = torch.randn(2, 30, 1, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(3 * x - 5), 3 * ours(x) - 5, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------ fit


@pytest.fixture
def table(tmp_path) -> Path:
    """Hourly values of two series with a daily season."""
    hours = np.arange(500)
    times = np.datetime64("2024-01-01T00:00") + hours.astype("timedelta64[h]")
    a, b = 10 + 3 * np.sin(hours / 24 * 2 * np.pi), 200 + 50 * np.cos(hours / 24 * 2 * np.pi)
    rows = [f"{t},{x:.3f},{y:.3f}" for t, x, y in zip(times, a, b)]
    path = tmp_path / "hours.csv"
    path.write_text("\n".join(["time,a,b", *rows]) + "\n")
    return path


SETTINGS = {"batch": 16, "steps": 3, "eval_steps": 1, "precision": "float32", "task.horizon": 12, "task.length": 48}


def test_untrained_network_stays_if_training_is_worse(checkpoint, table, tmp_path):
    says = Says()
    run = fit(
        table,
        task="time-series-forecasting",
        weights=checkpoint,
        out=tmp_path / "run",
        callback=says,
        settings={**SETTINGS, "lr": 300.0, "grad_clip": 0, "ema": 0},
    )
    (line,) = (text for text in says.said if "without training" in text)
    assert "MASE" in line and run.record["cost"]["best_step"] == 0
    assert run.record["choice"]["untrained"] == run.record["choice"]["validation"]
    ours, theirs = run.model.state_dict(), fieldguide.load(checkpoint).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    records = fieldguide.open_run(run.path).predict(table)
    assert len(records) == 2 * 12 and all(step["low"] <= step["value"] <= step["high"] for step in records)


def test_training_goes_on_from_it(checkpoint, table, tmp_path):
    run = fit(
        table,
        task="time-series-forecasting",
        weights=checkpoint,
        out=tmp_path / "run",
        callback=Says(),
        settings={**SETTINGS, "steps": 12, "lr": 0.003},
    )
    assert run.record["cost"]["best_step"] > 0
    assert run.record["choice"]["validation"] < run.record["choice"]["untrained"]


def test_rule_prefers_larger_ones_with_more_time():
    facts = lambda minutes: pretrained.Facts("time-series-forecasting", 5000, minutes, 64e9, 5e11)
    assert pretrained.choose(facts(0.2)).size == "chronos-bolt-tiny"
    assert pretrained.choose(facts(60)).size == "timesfm-2.5-200m" and pretrained.choose(facts(60)).licence == "Apache-2.0"
    sizes = [pretrained.choose(facts(minutes)).size for minutes in (1, 2, 4, 8, 16)]
    assert "chronos-bolt-base" in sizes or "chronos-bolt-small" in sizes


# ------------------------------------------------------------------------------------------------ pipeline


def test_checkpoint_forecasts_new_series_like_the_authors_pipeline(checkpoint, tmp_path):
    """Two series of different length, one with a gap; missing values are read as such."""
    times = np.datetime64("2024-01-01T00:00") + np.arange(60).astype("timedelta64[h]")
    rng = np.random.default_rng(0)
    a, b = 50 + rng.normal(size=60).cumsum(), 1000 + 40 * rng.normal(size=60)
    b[:20] = np.nan
    b[40] = np.nan
    rows = [f"{t},{x:.4f},{'' if np.isnan(y) else f'{y:.4f}'}" for t, x, y in zip(times, a, b)]
    (tmp_path / "new.csv").write_text("\n".join(["time,a,b", *rows]) + "\n")
    predictor = fieldguide.pipeline(checkpoint, horizon=8)
    records = predictor.predict(tmp_path / "new.csv")
    pipeline = package().ChronosBoltPipeline(package().ChronosBoltModelForForecasting.from_pretrained(checkpoint).eval())
    expected = pipeline.predict(torch.tensor(np.stack([a, b]), dtype=torch.float32))  # B R H
    for i, name in enumerate("ab"):
        steps = [r for r in records if r["series"] == name]
        assert len(steps) == 8 and steps[0]["time"] == "2024-01-03 12:00:00"
        np.testing.assert_allclose([r["value"] for r in steps], expected[i, 4], rtol=1e-4)
        assert all(r["low"] <= r["value"] <= r["high"] for r in steps)
    assert predictor.predict(tmp_path / "new.csv") == records  # a request leaves no traces
    assert len(fieldguide.pipeline(checkpoint).predict(tmp_path / "new.csv")) == 2 * 64
    with pytest.raises(SettingsError, match="horizon=-1 is not possible"):
        fieldguide.pipeline(checkpoint, horizon=-1)


def test_checkpoint_is_evaluated_and_described(checkpoint, table):
    predictor = fieldguide.pipeline(checkpoint, horizon=8)
    found = predictor.evaluate(table)
    assert np.isfinite(found["scores"]["mase"]) and found["rows"] > 10
    signature = predictor.signature
    assert signature.series.horizon == 8 and [field.name for field in signature.record][:2] == ["series", "time"]

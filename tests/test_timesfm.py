"""TimesFM 2.5: files and forecasts of transformers, padding, missing values, long horizons; and series models from a local hub."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import fieldguide
import tv
from cases import build_chronos, build_timesfm
from fieldguide.automl.fit import fit
from fieldguide.checkpoints import load
from fieldguide.core.errors import SettingsError
from fieldguide.models.registry import card, create
from fieldguide.models.transformer.timesfm import interpolate, measure_until
from hub_server import Hub

LEVELS = tuple(round(0.1 * i, 1) for i in range(1, 10))
NAN = float("nan")


def small(**changes):
    return create("timesfm-test", **{"levels": LEVELS, "quantiles": LEVELS, "values": 10, "horizon": 8, **changes}).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder as on the hub, of a small network."""
    torch.manual_seed(0)
    network = build_timesfm(small().config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("timesfm")
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(checkpoint):
    return tv.transformers.TimesFm2_5ModelForPrediction.from_pretrained(checkpoint).eval()


def test_published_size_equals_transformers():
    with torch.device("meta"):
        ours, peer = (
            create("timesfm-2.5-200m"),
            tv.transformers.TimesFm2_5ModelForPrediction(tv.transformers.TimesFm2_5Config()),
        )
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters()) == 231_289_280
    c, theirs = ours.config, peer.config
    assert (c.patch, c.block, c.far, c.max_length) == (32, theirs.horizon_length, theirs.output_quantile_len, 16_384)


def test_folder_is_recognized_and_written_back(checkpoint, tmp_path):
    found = load.inspect_checkpoint(checkpoint)
    assert found.card.name == "timesfm" and found.values["levels"] == LEVELS and found.values["block"] == 8
    load.save(fieldguide.load(checkpoint), tmp_path / "again", format="hf")
    written, known = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", checkpoint))
    assert all(written[key] == known[key] for key in written if key in known)
    again = tv.transformers.TimesFm2_5ModelForPrediction.from_pretrained(tmp_path / "again").state_dict()
    first = tv.transformers.TimesFm2_5ModelForPrediction.from_pretrained(checkpoint).state_dict()
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in again)


@torch.no_grad()
@pytest.mark.parametrize("steps", [32, 13, 3, 50])
def test_forecasts_equal_transformers(checkpoint, theirs, steps):
    """Shorter than the context, which is filled with zeros there; shorter than a patch; longer than the context."""
    ours = fieldguide.load(checkpoint, horizon=8, quantiles=LEVELS, values=10)
    x = 50 + 9 * torch.randn(4, steps).cumsum(1)
    x[1] -= 60  # of both signs
    x[2] = 7.0  # constant
    x[3] = x[3].abs() / 100
    for row in x:  # apart: negative values of one series would allow negative forecasts of another
        expected = theirs([row]).full_predictions[0]
        got = ours(row[None, :, None])[0, :, 0]
        torch.testing.assert_close(got[:, 1:], expected[:, 1:], rtol=1e-3, atol=1e-3)
        assert torch.equal(got[:, 0], got[:, 5])
    assert (ours(x[3:, :, None]) >= 0).all()


@torch.no_grad()
def test_each_series_of_a_batch_counts_for_itself(checkpoint, theirs):
    ours = fieldguide.load(checkpoint, horizon=8)
    x = torch.stack([torch.rand(24) * 0.01, -5 - torch.rand(24)])
    alone, together = ours(x[:1, :, None]), ours(x[..., None])
    torch.testing.assert_close(alone[0], together[0])
    assert (together[0] >= 0).all()


@torch.no_grad()
def test_mirror_image_and_scale(checkpoint):
    ours = fieldguide.load(checkpoint, horizon=12, quantiles=LEVELS, values=10, positive=False).double()
    x = torch.randn(2, 24, 1, dtype=torch.float64)
    before = ours(x)
    torch.testing.assert_close(ours(3 * x - 5), 3 * before - 5, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours(-x)[..., 1:], -before[..., 1:].flip(-1), rtol=1e-9, atol=1e-9)
    plain = fieldguide.load(checkpoint, horizon=12, flip=False, positive=False).double()
    assert not torch.allclose(plain(-x), -plain(x))


@torch.no_grad()
def test_longer_horizon_continues_with_the_median(checkpoint, theirs):
    """One block after the other; the quantiles' spread is that of the second head, as far as it reaches."""
    ours = fieldguide.load(checkpoint, horizon=20, quantiles=LEVELS, values=10, flip=False, positive=False)
    x = torch.randn(30)
    got = ours(x[None, :, None])[0, :, 0, 1:]
    theirs.config.force_flip_invariance, theirs.config.infer_is_positive = False, False
    parts, spreads, past = [], None, x
    scale = lambda y: (y - past.mean()) / past.std()
    series = [scale(x)]
    for _ in range(3):
        joined = torch.cat(series)[-32:]
        padded, missing = theirs._preprocess([joined])
        point, spread, _ = theirs._decode_and_project(padded, missing)
        spreads = spread if spreads is None else spreads
        parts.append(point[0])
        series.append(point[0, :, 5])
    point = torch.cat(parts)[:20]
    spread = spreads[0, :16]
    wanted = point[:, 1:].clone()
    wanted[:16] = spread[:, 1:] - spread[:, 5:6] + point[:16, 5:6]
    wanted[:16, 4] = point[:16, 5]
    theirs.config.force_flip_invariance, theirs.config.infer_is_positive = True, True
    torch.testing.assert_close(got, wanted * x.std() + x.mean(), rtol=1e-3, atol=1e-3)


def test_missing_values_are_interpolated():
    x = torch.tensor([[NAN, 2.0, NAN, NAN, 5.0, NAN], [NAN] * 6])
    full, known = interpolate(x)
    assert full.tolist() == [[0, 2, 3, 4, 5, 5], [0] * 6] and known.sum() == 2
    model = small()
    series = torch.randn(1, 20, 1)
    torch.testing.assert_close(  # before the first value is padding, however long
        model(torch.cat([torch.full((1, 7, 1), NAN), series], 1)), model(series), rtol=1e-4, atol=1e-4
    )
    assert model(torch.full((1, 9, 1), NAN)).isfinite().all()


def test_running_statistics_equal_their_definition():
    values, missing = 1e4 + torch.randn(3, 5, 4, dtype=torch.float64), torch.rand(3, 5, 4) < 0.3
    missing[0, 0] = True
    mean, std = measure_until(values, missing)
    for b in range(3):
        for n in range(5):
            seen = values[b, : n + 1][~missing[b, : n + 1]]
            if len(seen):
                assert mean[b, n] == pytest.approx(float(seen.mean()), rel=1e-12)
                assert std[b, n] == pytest.approx(float(seen.std(correction=0)), rel=1e-9, abs=1e-12)
    assert mean[0, 0] == 0 == std[0, 0]


def test_impossible_quantiles_are_rejected():
    with pytest.raises(SettingsError, match=r"quantiles=\(0.0,\)"):
        create("timesfm-test", quantiles=(0.0,))


# ------------------------------------------------------------------------------------------------ from a hub


@pytest.fixture(scope="module")
def hub(checkpoint, tmp_path_factory):
    """A local server with a model of each kind."""
    torch.manual_seed(0)
    ours = create("chronos-bolt-test", levels=LEVELS, max_length=64, block=8, patch=8, stride=8, far=16)
    folder = tmp_path_factory.mktemp("chronos")
    build_chronos(ours.config).save_pretrained(folder)
    files = lambda home: {p.name: p.read_bytes() for p in home.iterdir()}
    made = Hub(files(checkpoint), {"org/timesfm": files(checkpoint), "org/chronos": files(folder)})
    yield made
    made.close()


@pytest.fixture
def online(hub, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return hub


def write_hours(path: Path) -> Path:
    """Two series of 60 hours, one with a gap."""
    times = np.datetime64("2024-01-01T00:00") + np.arange(60).astype("timedelta64[h]")
    rng = np.random.default_rng(0)
    a, b = 50 + rng.normal(size=60).cumsum(), 1000 + 40 * rng.normal(size=60)
    b[40] = NAN
    rows = [f"{t},{x:.4f},{'' if np.isnan(y) else f'{y:.4f}'}" for t, x, y in zip(times, a, b)]
    path.write_text("\n".join(["time,a,b", *rows]) + "\n")
    return path


@pytest.mark.parametrize("name", ["timesfm", "chronos"])
def test_forecasts_with_a_model_of_the_hub(online, name, tmp_path):
    path = write_hours(tmp_path / "hours.csv")
    predictor = fieldguide.pipeline(f"hf:org/{name}", horizon=12)
    records = predictor.predict(path)
    assert len(records) == 2 * 12 and records[0]["time"] == "2024-01-03 12:00:00"
    assert all(np.isfinite(r["value"]) and r["low"] <= r["value"] <= r["high"] for r in records)
    assert predictor.predict(path) == records
    requests = len(online.downloads())
    assert fieldguide.pipeline(f"hf:org/{name}", horizon=12).predict(path) == records  # from the cache
    assert len(online.downloads()) == requests


@torch.no_grad()
def test_forecasts_of_the_pipeline_equal_transformers(online, theirs, tmp_path):
    path = write_hours(tmp_path / "hours.csv")
    records = fieldguide.pipeline("hf:org/timesfm", horizon=8).predict(path)
    table = np.genfromtxt(path, delimiter=",", skip_header=1, usecols=(1, 2))
    table[40, 1] = (table[39, 1] + table[41, 1]) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for column, name in enumerate("ab"):
            series = table[:, column]
            standard = (series - np.nanmean(series)) / np.nanstd(series)  # so that nothing is kept positive
            expected = theirs([torch.tensor(standard, dtype=torch.float32)]).full_predictions[0, :, 5]
            got = [r["value"] for r in records if r["series"] == name]
            np.testing.assert_allclose(got, expected * np.nanstd(series) + np.nanmean(series), rtol=1e-3)


def test_untrained_network_is_scored_in_a_fit(checkpoint, tmp_path):
    path = write_hours(tmp_path / "hours.csv")
    settings = {
        "batch": 8,
        "steps": 2,
        "evaluate": 1,
        "precision": "float32",
        "task.horizon": 4,
        "task.length": 16,
        "lr": 300.0,
    }
    run = fit(path, task="time-series-forecasting", weights=checkpoint, out=tmp_path / "run", settings=settings)
    assert run.record["cost"]["best_step"] == 0 and run.record["choice"]["untrained"] == run.record["choice"]["validation"]
    assert len(fieldguide.open_run(run.path).predict(path)) == 2 * 4


def test_card():
    assert card("timesfm").endless and card("timesfm").default == "timesfm-2.5-200m"

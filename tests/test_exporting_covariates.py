"""Exports of forecasting with covariates, compared with the run in a process without torch."""

from __future__ import annotations

import datetime
import json

import numpy as np
import pytest

import fieldguide
from fieldguide.exporting.comparison import Comparison
from fieldguide.exporting.verify import verify

HOUR = datetime.timedelta(hours=1)


def write_shops(path, dates: bool = True):
    """Write series with covariates: measured, known ahead, constant, as categories and truth values, with gaps and off the grid."""
    rng, lines = np.random.default_rng(0), ["shop,time,sold,visitors,open,weather,size,region"]
    start = datetime.datetime(2024, 1, 29, 5)
    for number, shop in enumerate(("north", "south, 2", "west")):
        for step in range(-4, 300):
            is_open, weather = rng.random() < 0.7, ["sun", "rain", "fog"][rng.integers(3)]
            visitors = 20 + 10 * np.sin(step / 4) + rng.normal(0, 2)
            sold = visitors * (1 + number) * (0.4 + is_open) + (5 if weather == "sun" else 0)
            if rng.random() < 0.04:
                continue
            cells = [f"{sold:.3f}", f"{visitors:.2f}", "yes" if is_open else "no", weather, str(10 * number), "ab"[number % 2]]
            cells = [("" if rng.random() < 0.06 else cell) for cell in cells]
            cells[0] = "" if step < 0 else cells[0]
            time = start + step * HOUR if dates else step
            lines.append(f'"{shop}",{time},{",".join(cells)}')
        if dates:
            lines.append(f'"{shop}",{start + 20.4 * HOUR},1.0,99,yes,fog,{10 * number},a')
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "model, dates",
    [
        ("tft-test", True),
        *(
            pytest.param(model, dates, marks=pytest.mark.slow)
            for model, dates in [("tide-test", True), ("itransformer-test", False), ("lstm-forecaster-test", True)]
        ),
    ],
)
@pytest.mark.slow
def test_forecasts_with_covariates_are_equal(model, dates, tmp_path):
    source = write_shops(tmp_path / "shops.csv", dates)
    settings = {"steps": 10, "precision": "float32", "task.length": 24, "task.horizon": 6, "task.known": "open,weather"}
    settings |= {"role.time": "time", "role.series": "shop"}
    asked = {"task": "time-series-forecasting", "target": "sold"}
    run = fieldguide.fit(source, model=model, out=tmp_path / "run", settings=settings, allow_bad=True, **asked)
    assert {c.column for c in run.task.covariates.columns} == {"visitors", "open", "weather", "size", "region"}
    done = run.export(out=tmp_path / "export")
    assert done.passed, done.verification.problems
    assert done.verification.rows == 3 * 6 * 8
    for name in ("run.py", "cells.py"):
        assert len((done.path / name).read_text().splitlines()) < 150
    if "static" in run.card.inputs:  # iTransformer standardizes each covariate itself, so that another mean changes nothing
        check_mistakes(run, done.path, source)


def check_mistakes(run, folder, source):
    """Check that another mean, another order of categories, other phases and forgotten future values are found."""
    values = json.loads((folder / "export.json").read_text())

    def change(kind, **others):
        covariates = values["covariates"]
        changed = [{**c, **{k: v(c[k]) for k, v in others.items()}} for c in covariates[kind]]
        return {"covariates": covariates | {kind: changed}}

    changes = [change("past", mean=lambda m: m + 0.1), change("known", values=lambda v: v[::-1])]
    changes += [change("known", name=lambda n: "no " + n), {"turns": values["turns"][::-1]} if len(values["turns"]) > 1 else {}]
    changes += [change("static", std=lambda s: 2 * s), {"names": values["names"][::-1]}] if values["names"] else []
    for changed in filter(None, changes):
        (folder / "export.json").write_text(json.dumps(values | changed))
        assert not verify(run, folder, source).passed, changed
    (folder / "export.json").write_text(json.dumps(values))


@pytest.mark.slow
def test_other_series_as_covariates_are_refused(tmp_path):
    rows = [f"{datetime.date(2024, 1, 1) + datetime.timedelta(i)},{i % 7},{i % 5}" for i in range(200)]
    (tmp_path / "wide.csv").write_text("\n".join(["day,a,b", *rows]) + "\n")
    settings = {"steps": 2, "precision": "float32", "task.length": 14, "task.horizon": 4, "task.others": True}
    run = fieldguide.fit(
        tmp_path / "wide.csv", task="time-series-forecasting", model="tft-test", out=tmp_path / "run", settings=settings
    )
    with pytest.raises(fieldguide.SettingsError, match="from columns next to the series only"):
        run.export(out=tmp_path / "export")


def test_intervals_are_compared_relative_to_their_values():
    """A limit may be near 0 in a series of large numbers, where float32 has no more digits."""
    want = {"series": "a", "time": "1", "value": 1000.0, "low": 0.01, "high": 2000.0}
    find = lambda **changed: Comparison(1e-4).compare(want, want | changed)[1]
    assert find(low=0.2) == "" == find(high=2000.1) and "low" in find(low=0.3) and "high" in find(high=2000.3)
    assert "time" in find(time="2") and "missing" in Comparison(1e-4).compare(want, {"series": "a", "value": 1000.0})[1]

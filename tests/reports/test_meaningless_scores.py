"""A score that says nothing comes with a warning, and one that is 0 because nothing is known is an error."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

import fieldguide
from fieldguide.cli import commands
from fieldguide.core.errors import DataError

SETTINGS = {"steps": 3, "batch_size": 16, "precision": "float32"}
RNG = np.random.default_rng(0)


def table(label) -> pl.DataFrame:
    return pl.DataFrame({"x": RNG.normal(size=len(label)), "z": RNG.normal(size=len(label)), "label": label})


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    out = tmp_path_factory.mktemp("doubts") / "run"
    return fieldguide.fit(table(["yes", "no"] * 60), target="label", model="mlp-test", out=out, settings=SETTINGS)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    out = tmp_path_factory.mktemp("doubts") / "run"
    return fieldguide.fit(table(RNG.normal(size=120)), target="label", model="mlp-test", out=out, settings=SETTINGS)


def test_one_class_alone(classes, tmp_path):
    notes = classes.evaluate(table(["yes"] * 30))["notes"]
    assert any("all 30 rows have the class 'yes'" in note for note in notes)
    assert not any("all " in note for note in classes.evaluate(table(["yes", "no"] * 15))["notes"])
    table(["no"] * 30).write_csv(tmp_path / "no.csv")
    done = CliRunner().invoke(commands.app, ["evaluate", str(classes.path), str(tmp_path / "no.csv"), "--json"])
    assert "all 30 rows have the class 'no'" in done.stderr and json.loads(done.stdout)["rows"] == 30


def test_equal_numbers(numbers):
    assert any("variance explained is undefined" in note for note in numbers.evaluate(table([4.0] * 30))["notes"])


def test_test_rows_of_one_class_are_noted_in_a_fit(tmp_path):
    data = table(["yes", "no"] * 50 + ["yes"] * 30).with_columns(split=pl.Series(["train"] * 80 + ["val"] * 20 + ["test"] * 30))
    run = fieldguide.fit(data, target="label", model="mlp-test", out=tmp_path / "run", settings=SETTINGS)
    assert any("test rows: all 30 rows have the class 'yes'" in note for note in run.record["data"]["notes"])


def events(users, prefix=""):
    rows = [(u, f"{prefix}{(u * 3 + t) % 12:03d}", t) for u in range(users) for t in range(8)]
    return pl.DataFrame(rows, schema=["user", "item", "time"], orient="row")


def test_items_that_lost_their_zeros(tmp_path):
    run = fieldguide.fit(events(60), task="recommendation", model="sasrec-test", out=tmp_path / "run", settings=SETTINGS)
    with pytest.raises(DataError, match=r"no item is in the training data.*leading zeros"):
        run.evaluate(events(20, "x"))
    mixed = pl.concat([events(20), events(20, "x").with_columns(pl.col("user") + 100)])
    result = run.evaluate(mixed)
    assert any("next items are not in the training data" in note for note in result["notes"])
    assert result["scores"]["hr_10"] <= 0.5 + 1e-9


def test_class_names_that_changed(classes):
    with pytest.raises(DataError, match=r"no class in column 'label' is in the training data"):
        classes.evaluate(table(["Yes!", "No!"] * 10))

"""Repeatable runs: splits that do not depend on the columns, `deterministic=true`, and fit.yaml."""

from __future__ import annotations

import itertools

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from typer.testing import CliRunner

import fieldguide
from fieldguide.automl import profile, time_budget
from fieldguide.automl.fit import NullCallback
from fieldguide.cli.commands import app
from fieldguide.core.errors import TrainingError
from fieldguide.core.settings import Settings
from fieldguide.data import read, split
from fieldguide.training import trainer
from fieldguide.training.precision import deterministic_kernels, use_threads


@pytest.fixture(scope="module")
def passengers(tmp_path_factory):
    """Return a table in which rows become equal if columns are ignored."""
    rng, n = np.random.default_rng(0), 400
    age = rng.integers(18, 70, n)
    path = tmp_path_factory.mktemp("data") / "passengers.csv"
    pl.DataFrame(
        {
            "ticket": np.arange(n) + 0.5,
            "age": age,
            "fare": np.round(rng.gamma(2, 15, n)),
            "port": rng.choice(["a", "b", "c"], n),
            "survived": np.where(age + rng.normal(0, 10, n) < 40, "yes", "no"),
        }
    ).write_csv(path)
    return path


# Splits


def sides(data, seed=0):
    made = split(data, seed=seed)
    side = np.zeros(len(data), dtype=int)
    side[made.validation], side[made.test] = 1, 2
    return side


def test_same_split_whatever_columns_are_ignored(passengers):
    whole = sides(read(passengers, target="survived"))
    for ignored in (["age"], ["port"], ["fare"], ["age", "port"]):
        other = sides(read(passengers, target="survived", kinds=dict.fromkeys(ignored, "identifier")))
        assert np.array_equal(whole, other), ignored


def test_only_rows_that_become_equal_move(passengers):
    table = pl.read_csv(passengers)
    whole = sides(read(table, target="survived"))
    for ignored in (["ticket"], ["ticket", "port"]):
        rest = table.drop(ignored)
        side = sides(read(rest, target="survived"))
        equal = rest.drop("survived").is_duplicated().to_numpy()
        assert equal.any() and np.array_equal(side[~equal], whole[~equal]), ignored
        for rows in rest.with_row_index().group_by(rest.drop("survived").columns).agg("index")["index"].to_list():
            assert np.unique(side[rows]).size == 1  # equal rows are in one split
        moved = (side != whole).mean()
        assert 0 < moved < equal.mean() / 2
        assert abs((side == 2).mean() - 0.2) < 0.05


def test_few_distinct_rows_still_fill_every_split():
    rng = np.random.default_rng(0)
    table = {"x": rng.integers(0, 5, 500), "z": rng.integers(0, 4, 500), "y": rng.choice(["a", "b"], 500)}
    for seed in range(5):
        counts = np.bincount(sides(read(table, target="y"), seed), minlength=3)
        assert (counts > 40).all()


def test_every_class_keeps_training_rows_when_duplicates_are_joined():
    table = {"x": np.arange(200) % 90 * 0.5, "y": ["rare" if i in (90, 91) else f"c{i % 2}" for i in range(200)]}
    for seed in range(10):
        data = read(table, target="y", allow_bad=True)
        assert "rare" in data.rows["y"].to_numpy()[sides(data, seed) == 0]


# deterministic=true


class Log(NullCallback):
    def __init__(self):
        self.lines, self.settings = [], None

    def log(self, text):
        self.lines.append(text)

    def on_train_start(self, settings, done):
        self.settings = settings


def load_machine(monkeypatch, seconds):
    """Let this machine appear to be under load: each measurement gives another time, and another precision is the fastest."""
    times = itertools.cycle((seconds, 3 * seconds, 0.5 * seconds))
    monkeypatch.setattr(time_budget, "measure_step_seconds", lambda *arguments, **options: next(times))
    monkeypatch.setattr(
        time_budget,
        "choose_precision",
        lambda *arguments: ("bfloat16" if seconds < 0.01 else "float32", False, {"float32": 2 * seconds, "bfloat16": seconds}),
    )
    monkeypatch.setattr(profile, "measure_flops", lambda *arguments, **options: 1e9 / seconds)
    profile.measure_machine.cache_clear()


@pytest.fixture
def restored_machine():
    yield
    profile.measure_machine.cache_clear()


def train(passengers, out, callback=None, **settings):
    return fieldguide.fit(
        passengers, target="survived", model="mlp", minutes=0.02, out=out, callback=callback, settings=settings, seed=5
    )


@pytest.mark.slow
def test_deterministic_runs_do_not_depend_on_the_load(passengers, tmp_path, monkeypatch, restored_machine):
    runs, logs = [], []
    for name, seconds in (("idle", 0.001), ("loaded", 0.05)):
        load_machine(monkeypatch, seconds)
        logs.append(Log())
        runs.append(train(passengers, tmp_path / name, logs[-1], deterministic=True))
    first, second = runs
    assert first.record["settings"] == second.record["settings"] and first.record["model"] == second.record["model"]
    assert first.record["scores"] == second.record["scores"]
    assert (first.path / "model.safetensors").read_bytes() == (second.path / "model.safetensors").read_bytes()
    settings = first.settings
    assert (settings.precision, settings.minutes, settings.threads) == ("float32", 0, torch.get_num_threads())
    assert settings.steps > 20 and first.record["cost"]["max_steps"] == 0
    (said,) = [line for line in logs[0].lines if line.startswith("deterministic:")]
    assert (
        f"{settings.steps:,} steps" in said and "float32" in said and "do not limit the time" in said and "same scores" in said
    )
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_runs_depend_on_the_load(passengers, tmp_path, monkeypatch, restored_machine):
    """So the test above would notice a measurement."""
    found = []
    for name, seconds in (("idle", 0.001), ("loaded", 0.05)):
        load_machine(monkeypatch, seconds)
        found.append(train(passengers, tmp_path / name).settings)
    assert found[0].precision != found[1].precision and found[0].steps != found[1].steps


def test_deterministic_run_uses_given_steps_epochs_and_precision(passengers, tmp_path):
    callback = Log()
    run = train(
        passengers, tmp_path / "a", callback, deterministic=True, epochs=2, batch_size=64, precision="bfloat16", threads=1
    )
    assert run.settings.steps == 2 * (run.record["data"]["split"]["train"] // 64)
    assert (run.settings.precision, run.settings.threads) == ("bfloat16", 1)
    assert train(passengers, tmp_path / "b", callback, deterministic=True, steps=7).settings.steps == 7


def test_operations_that_are_not_deterministic_are_named(passengers, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("put_cuda does not have a deterministic implementation, but you set 'deterministic'. Turn it off.")

    monkeypatch.setattr(trainer.Trainer, "train_step", fail)
    with pytest.raises(TrainingError, match=r"deterministic=true is not possible .*: put_cuda does not have"):
        train(passengers, tmp_path / "run", deterministic=True, steps=3)


def test_deterministic_mode_ends():
    with deterministic_kernels(True), use_threads(3):
        assert torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == 3
    assert not torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == 1


# fit.yaml


@pytest.mark.parametrize("deterministic", [False, True])
def test_run_is_repeated_by_its_settings_file(deterministic, passengers, tmp_path):
    settings = {
        "column.port": "identifier",
        "column.age": "number",
        "model.dim": 12,
        "task.drop": None,
        "lr": 0.004,
        "ema": 0.9,
        "mixup": 0.1,
        "patience": 3,
        "eval_steps": 5,
        "threads": 1,
    }
    del settings["task.drop"]
    settings |= {"deterministic": True} if deterministic else {"steps": 30, "precision": "float32"}
    first = fieldguide.fit(
        passengers, target="survived", model="mlp", minutes=0.02 if deterministic else None, seed=7, group="fare",
        settings=settings, out=tmp_path / "first",
    )  # fmt: skip
    text = (first.path / "fit.yaml").read_text()
    assert "with 1 threads and these versions, the result is the same" in text
    config = yaml.safe_load(text)
    assert config["settings"].get("deterministic", False) is deterministic and config["settings"]["column.port"] == "identifier"
    called = CliRunner().invoke(app, ["fit", "--config", str(first.path / "fit.yaml"), "--out", str(tmp_path / "second")])
    assert called.exit_code == 0, called.exception
    second = fieldguide.open_run(tmp_path / "second")
    assert second.scores == first.scores
    for name in ("model.safetensors", "preprocess/task.json"):
        assert (second.path / name).read_bytes() == (first.path / name).read_bytes()
    assert all(np.array_equal(getattr(second.read_splits(), k), getattr(first.read_splits(), k)) for k in ("train", "test"))
    repeated = yaml.safe_load((second.path / "fit.yaml").read_text())
    assert repeated == config


def test_settings_file_says_if_a_repetition_is_not_exact(passengers, tmp_path, monkeypatch):
    def replan(self):
        self.state.repeatable = False
        return False

    monkeypatch.setattr(trainer.Trainer, "replan_steps", replan)
    run = train(passengers, tmp_path / "run", precision="float32", batch_size=16, eval_steps=5)
    assert "so the result is similar; --deterministic avoids that" in (run.path / "fit.yaml").read_text()


def test_command_line_has_an_option(passengers, tmp_path):
    arguments = ["fit", str(passengers), "--target", "survived", "--model", "mlp-test", "--set", "steps=4"]
    called = CliRunner().invoke(app, [*arguments, "--deterministic", "--out", str(tmp_path / "run")])
    assert called.exit_code == 0 and "deterministic: 4 steps" in called.stdout
    assert fieldguide.open_run(tmp_path / "run").settings.deterministic
    assert Settings().deterministic is False

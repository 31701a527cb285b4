"""Experiment trackers, with stand-ins for the packages of MLflow and Weights & Biases."""

from __future__ import annotations

import json
import signal
import sys

import numpy as np
import polars as pl
import pytest

import fieldguide
from fieldguide.automl.fit import NullCallback
from fieldguide.core.errors import SettingsError
from fieldguide.training.state import Interrupted

QUICK = {"steps": 8, "eval_steps": 4, "batch_size": 16, "precision": "float32"}

# The calls that we use, with the signatures of MLflow 2 and wandb 0.17. They append to the list CALLS of `builtins`.
MLFLOW = """
import builtins
from types import SimpleNamespace
class MlflowClient:
    def get_experiment_by_name(self, name): builtins.CALLS.append(("experiment", name))
    def create_experiment(self, name): return "7"
    def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
        builtins.CALLS.append(("create", experiment_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="run-1"))
    def update_run(self, run_id, status=None, name=None): builtins.CALLS.append(("update", run_id, status))
    def log_param(self, run_id, key, value, synchronous=None): builtins.CALLS.append(("param", run_id, key, value))
    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
        builtins.CALLS.append(("metrics", run_id, [(m.key, m.value, m.step) for m in metrics]))
    def set_terminated(self, run_id, status=None, end_time=None): builtins.CALLS.append(("end", run_id, status))
"""
ENTITIES = """
class Metric:
    def __init__(self, key, value, timestamp, step):
        assert isinstance(timestamp, int) and timestamp > 1_000_000_000_000  # milliseconds
        self.key, self.value, self.step = key, value, step
"""
WANDB = """
import builtins
class Run:
    id = "abc"
    def log(self, data, step=None, commit=None):
        if getattr(builtins, "FAIL", False): raise ConnectionError("no network")
        builtins.CALLS.append(("metrics", data, step))
    def finish(self, exit_code=None, quiet=None): builtins.CALLS.append(("end", exit_code))
def init(project=None, name=None, dir=None, config=None, id=None, resume=None):
    if getattr(builtins, "NO_LOGIN", False): raise RuntimeError("no API key configured")
    builtins.CALLS.append(("init", project, name, id, resume, config["steps"]))
    return Run()
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Install the stand-ins, and return the list of their calls."""
    import builtins

    for path, source in {"mlflow/__init__": MLFLOW, "mlflow/entities": ENTITIES, "wandb": WANDB}.items():
        file = tmp_path / "packages" / f"{path}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    for name in ("mlflow", "mlflow.entities", "wandb"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    made: list[tuple] = []
    monkeypatch.setattr(builtins, "CALLS", made, raising=False)
    yield made
    for name in ("mlflow", "mlflow.entities", "wandb"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2)).round(3)
    return pl.DataFrame({"a": x[:, 0], "b": x[:, 1], "y": np.where(x.sum(1) > 0, "up", "down")})


class Stop(NullCallback):
    """Stop the run after a step, and keep the log."""

    def __init__(self, at=0):
        self.at, self.lines = at, []

    def log(self, text):
        self.lines.append(text)

    def on_step(self, step, losses):
        if step == self.at:
            signal.raise_signal(signal.SIGINT)


def train(table, out, tracker, callback=None):
    return fieldguide.fit(
        table, target="y", model="mlp-test", out=out, callback=callback, settings={**QUICK, "tracker": tracker}
    )


def expected(run) -> list[tuple[str, float, int]]:
    """Return the numbers of metrics.jsonl and of the test, with their names in a tracker."""
    values = []
    for line in [*run.losses(), {"step": 8, "test": run.scores}]:
        for name, value in line.items():
            if isinstance(value, dict):
                values += [(f"{name}/{key}", number, line["step"]) for key, number in value.items()]
            elif name != "step":
                values.append((f"train/{name}", value, line["step"]))
    return values


def test_mlflow_receives_settings_losses_and_scores(calls, table, tmp_path):
    run = train(table, tmp_path / "run", "mlflow")
    assert calls[:2] == [("experiment", "fieldguide"), ("create", "7", "run")] and calls[-1] == ("end", "run-1", "FINISHED")
    params = {call[2]: call[3] for call in calls if call[0] == "param"}
    assert params == run.settings.to_dict()
    assert [m for call in calls if call[0] == "metrics" for m in call[2]] == expected(run)


def test_wandb_receives_settings_losses_and_scores(calls, table, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run = train(table, tmp_path / "run", "wandb")
    assert calls[0] == ("init", "mine", "run", None, "allow", 8) and calls[-1] == ("end", 0)
    assert [(k, v, call[2]) for call in calls if call[0] == "metrics" for k, v in call[1].items()] == expected(run)


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_resumed_run_is_tracked_only_if_it_is_asked_for(tracker, calls, table, tmp_path):
    for name, settings in (("silent", {}), ("tracked", {"tracker": tracker})):
        callback, path = Stop(5), tmp_path / name
        with pytest.raises(Interrupted):
            train(table, path, tracker, callback)
        assert calls[-1] in (("end", "run-1", "KILLED"), ("end", 1))
        calls.clear()
        callback = Stop()
        fieldguide.resume(path, data=table, callback=callback, settings=settings)
        assert bool(calls) == bool(settings)
        assert any("name it again" in line for line in callback.lines) == (not settings)
        if tracker == "mlflow" and settings:
            assert calls[0] == ("update", "run-1", "RUNNING")
        if tracker == "wandb" and settings:
            assert calls[0] == ("init", "fieldguide", name, "abc", "allow", 8)
        calls.clear()


def test_failing_tracker_does_not_stop_the_training(calls, table, tmp_path, monkeypatch):
    import builtins

    monkeypatch.setattr(builtins, "FAIL", True, raising=False)
    callback = Stop()
    assert train(table, tmp_path / "run", "wandb", callback).status == "done"
    (line,) = [line for line in callback.lines if "tracker=wandb" in line]
    assert line == "tracker=wandb failed and is not used any more: no network. metrics.jsonl has all values."


def test_tracker_that_cannot_start_is_reported_before_training(calls, table, tmp_path, monkeypatch):
    import builtins

    monkeypatch.setattr(builtins, "NO_LOGIN", True, raising=False)
    with pytest.raises(SettingsError, match=r"tracker=wandb could not be started: no API key configured\. .*tracker=none"):
        train(table, tmp_path / "run", "wandb")
    assert fieldguide.resume(tmp_path / "run", data=table).status == "done"


@pytest.mark.parametrize(("tracker", "extra"), [("mlflow", "mlflow"), ("wandb", "wandb"), ("tensorboard", "track")])
def test_missing_package_names_the_install_line_before_anything_is_read(tracker, extra, table, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError) as raised:
        fieldguide.fit("nowhere.csv", out=tmp_path / "run", settings={"tracker": tracker})
    assert str(raised.value) == f"tracker={tracker} needs the optional package {tracker}: pip install 'fieldguide[{extra}]'"


def test_tensorboard_receives_the_test_scores(table, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(table, tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(run.path / "events"))
    events.Reload()
    assert {name: events.Scalars(f"test/{name}")[0].value for name in run.scores} == pytest.approx(run.scores, rel=1e-6)
    assert json.loads((run.path / "run.json").read_text())["settings"]["tracker"] == "tensorboard"

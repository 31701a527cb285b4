"""Stopped runs: signals, closed pipes and workers; prediction with the best weights so far; `finish`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

import fieldguide
from fieldguide.automl import output, progress
from fieldguide.automl.fit import NullCallback
from fieldguide.core.errors import RunError, SettingsError
from fieldguide.training.state import Interrupted

QUICK = {"steps": 12, "eval_steps": 2, "batch_size": 16, "precision": "float32"}


class At(NullCallback):
    """Do something at a step, and keep the log."""

    def __init__(self, step, action):
        self.step, self.action, self.lines = step, action, []

    def log(self, text):
        self.lines.append(text)

    def on_step(self, step, losses):
        if step == self.step:
            self.action()


def stop(table, out, step=7, number=signal.SIGINT, **settings):
    """Train until a signal stops the run after a step."""
    callback = At(step, lambda: signal.raise_signal(number))
    with pytest.raises(Interrupted, match=rf"after step {step} of 12.*fit --resume .*fit --finish"):
        fieldguide.fit(table, target="y", model="mlp-test", out=out, callback=callback, settings=QUICK | settings)
    return out, callback.lines


# What a stopped run can do


@pytest.mark.parametrize("settings", [{}, {"ema": 0.9}, {"eval_steps": 9}, {"eval_steps": 9, "ema": 0.9}])
def test_stopped_run_predicts_with_the_best_weights_so_far(settings, table, tmp_path):
    path, _ = stop(table, tmp_path / "run", **settings)
    run = fieldguide.open_run(path)
    predictions = run.predict(pl.read_csv(table).drop("y").head(5))
    (note,) = [n for n in predictions.notes if "not finished" in n]
    state = json.loads((path / "checkpoints" / "step-00000007.json").read_text())["state"]["state"]
    tensors = load_file(path / "checkpoints" / "step-00000007.safetensors")
    if state["best"] is not None:
        assert f"best weights so far, those of step {state['best_step']}," in note and "step 7 of 12" in note
        for name, tensor in run.model.state_dict().items():
            assert torch.equal(tensor, tensors[f"best.model.{name}"])
    else:
        assert "last weights, not scored yet," in note
        live = torch.cat([tensors[f"objective.model.{n}"].flatten() for n, _ in run.model.named_parameters()])
        used = torch.cat([p.detach().flatten() for p in run.model.parameters()])
        assert torch.equal(live, used) == ("ema" not in settings)
    assert any("not finished" in n for n in run.evaluate(table)["notes"])
    assert "not finished" in run.get_notes()[0] and run.predict(pl.read_csv(table).head(1)).notes == predictions.notes


def test_finish_tests_what_is_there(table, tmp_path):
    path, _ = stop(table, tmp_path / "run")
    before = fieldguide.open_run(path)
    best = {k: t.clone() for k, t in before.model.state_dict().items()}
    callback = At(0, lambda: None)
    run = fieldguide.finish(path, callback=callback)
    assert run.status == "done" and set(run.scores) and run.record["cost"]["steps"] == 7
    assert run.record["cost"]["stopped"] == "finished on request after step 7 of 12" and not run.get_notes()
    assert all(torch.equal(t, best[k]) for k, t in run.model.state_dict().items())
    assert "finished on request after step 7 of 12" in (path / "report.html").read_text()
    assert "cut short" in (path / "fit.yaml").read_text()
    assert [json.loads(x)["step"] for x in (path / "metrics.jsonl").read_text().splitlines()][-1] == 7
    assert fieldguide.resume(path, callback=callback).scores == run.scores and "finished already" in callback.lines[-1]


def test_finish_before_the_first_evaluation_scores_the_weights(table, tmp_path):
    path, _ = stop(table, tmp_path / "run", step=3, eval_steps=9)
    run = fieldguide.finish(path)
    assert run.record["cost"]["best_step"] == 3 and "scores" in run.losses()[-1]


def test_finish_needs_a_checkpoint(table, tmp_path):
    def fail():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        fieldguide.fit(table, target="y", model="mlp-test", out=tmp_path / "run", callback=At(3, fail), settings=QUICK)
    with pytest.raises(RunError, match="before its first checkpoint"):
        fieldguide.finish(tmp_path / "run")
    with pytest.raises(RunError, match="no checkpoint to predict with"):
        fieldguide.open_run(tmp_path / "run").predict(pl.read_csv(table))
    assert fieldguide.resume(tmp_path / "run").status == "done"


def test_stopped_run_is_no_teacher_and_no_source_of_weights(table, tmp_path):
    path, _ = stop(table, tmp_path / "run")
    with pytest.raises(SettingsError, match=r"training is not finished.*--finish"):
        fieldguide.fit(table, target="y", model="mlp-test", out=tmp_path / "a", settings=QUICK | {"teacher": str(path)})
    with pytest.raises(RunError, match="fit --finish"):
        fieldguide.fit(table, target="y", out=tmp_path / "b", weights=path, settings=QUICK)


def test_command_line_finishes_a_run(table, tmp_path, capsys):
    from typer.testing import CliRunner

    from fieldguide.cli.commands import app

    path, _ = stop(table, tmp_path / "run")
    call = lambda *arguments: CliRunner().invoke(app, [*map(str, arguments)])
    for arguments, words in (
        (["fit", "--finish", path, "--resume", path], "pass either data"),
        (["fit", table, "--finish", path], "pass either data"),
        (["fit", "--finish", path, "--set", "lr=0.1"], "lr: a run is finished as it is"),
        (["fit", "--finish", path, "--target", "y"], "--target cannot change"),
    ):
        assert words in str(call(*arguments).exception)
    predicted = call("predict", path, table, "--json")
    assert predicted.exit_code == 0 and predicted.stderr.startswith("note: training is not finished (step 7 of 12)")
    assert len(predicted.stdout.splitlines()) == 60
    assert call("fit", "--finish", path).exit_code == 0
    assert fieldguide.open_run(path).status == "done"


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_saves_and_the_run_continues_bit_exact(number, table, tmp_path):
    path, lines = stop(table, tmp_path / "run", number=number)
    assert any(("press Ctrl-C again" in line) == (number == signal.SIGINT) for line in lines if "stopping after" in line)
    whole = fieldguide.fit(table, target="y", model="mlp-test", out=tmp_path / "whole", settings=QUICK)
    fieldguide.resume(path)
    assert (path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()


def test_second_hangup_does_not_lose_the_step(table, tmp_path):
    """A closed terminal sends it twice: the system to the foreground processes, and the shell to its jobs."""

    def twice():
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)

    with pytest.raises(Interrupted):
        fieldguide.fit(table, target="y", model="mlp-test", out=tmp_path / "run", callback=At(5, twice), settings=QUICK)
    assert (tmp_path / "run" / "checkpoints" / "step-00000005.json").exists()


def test_ignored_hangup_stays_ignored(table, tmp_path):
    """As `nohup` sets it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        callback = At(5, lambda: signal.raise_signal(signal.SIGHUP))
        run = fieldguide.fit(table, target="y", model="mlp-test", out=tmp_path / "run", callback=callback, settings=QUICK)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert run.status == "done"


def start(*arguments, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fieldguide", "fit", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_signal_to_all_processes_saves_although_it_reaches_the_workers(number, table, tmp_path):
    path = tmp_path / "run"
    long = ["--target", "y", "--model", "mlp-test", "--set", "steps=100000", "--set", "num_workers=2", "--set", "patience=0"]
    process = start(
        table, *long, "--set", "precision=float32", "--set", "eval_steps=50", "--out", path,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    while not (path / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the state is saved" in err and "Traceback" not in err, err
    (checkpoint,) = (path / "checkpoints").glob("*.json")
    assert f"stopped after step {int(checkpoint.stem[5:])} of 100000" in err
    assert fieldguide.finish(path).status == "done"


@pytest.mark.slow
def test_closed_pipe_does_not_end_the_training(table, tmp_path):
    """`fieldguide fit ... | head -1`"""
    path = tmp_path / "run"
    process = start(
        table, "--target", "y", "--model", "mlp-test", "--set", "steps=40", "--set", "precision=float32", "--out", path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline()
    process.stdout.close()
    with process.stderr as stream:
        err = stream.read()
    assert process.wait(timeout=60) == 0
    assert err == "fieldguide: the output was closed; training continues without it. Stop it with Ctrl-C.\n"
    assert fieldguide.open_run(path).status == "done"


def test_closed_terminal_silences_the_console(monkeypatch):
    lost = []

    class Closed:
        encoding = "utf-8"

        def write(self, text):
            raise OSError(5, "Input/output error")

        def flush(self):
            raise OSError(5, "Input/output error")

        def isatty(self):
            return False

        def fileno(self):
            raise OSError

    console = output.OutputConsole(file=Closed())
    console.on_lost = lambda: lost.append(1)
    console.print("one")
    console.print("two")
    assert lost == [1] and console.quiet
    assert isinstance(progress.console, output.OutputConsole)

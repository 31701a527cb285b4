"""No silent waits: every phase has a name, the display fits 80 columns, and `fit` shows progress by default."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from rich.console import Console

import fieldguide
from fieldguide.automl import progress
from fieldguide.automl.callbacks import NullCallback
from fieldguide.automl.phases import Phases
from fieldguide.automl.progress import Progress

SETTINGS = {"steps": 3, "precision": "float32"}


@pytest.fixture
def frame():
    draw = np.random.default_rng(0)
    return pl.DataFrame({"x": draw.normal(size=80), "z": draw.normal(size=80), "y": ["no", "yes"] * 40})


class Recorder(NullCallback):
    """Records the events of a fit."""

    def __init__(self):
        self.events = []

    def on_phase(self, name, total=None):
        self.events.append(name)

    def on_progress(self, done):
        self.events.append(done)

    def on_train_start(self, settings, done):
        self.events.append("training")

    def close(self):
        self.events.append("closed")


def test_every_phase_is_named_in_order(frame, tmp_path):
    recorder = Recorder()
    fieldguide.fit(frame, "y", out=tmp_path / "run", callback=recorder, settings=SETTINGS)
    names = [e for e in recorder.events if isinstance(e, str)]
    words = (
        "reading",
        "checking",
        "preprocessing",
        "choosing",
        "measuring",
        "training",
        "testing",
        "baselines",
        "report",
        "closed",
    )
    places = [next(i for i, name in enumerate(names) if word in name) for word in words]
    assert places == sorted(places)
    assert max(e for e in recorder.events if isinstance(e, int)) == len(frame) // 5  # all test rows were counted


def test_the_callback_is_closed_after_an_error(frame, tmp_path):
    recorder = Recorder()
    with pytest.raises(fieldguide.DataError):
        fieldguide.fit(frame.head(2), "y", out=tmp_path / "run", callback=recorder)
    assert recorder.events[-1] == "closed"


def test_fit_in_python_shows_progress_unless_told_otherwise(frame, tmp_path, monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=output, width=200, soft_wrap=True))
    fieldguide.fit(frame, "y", out=tmp_path / "shown", settings=SETTINGS)
    assert "reading the table in memory" in output.getvalue() and "Report:" in output.getvalue()
    before = output.getvalue()
    fieldguide.fit(frame, "y", out=tmp_path / "silent", settings=SETTINGS, callback=NullCallback())
    assert output.getvalue() == before


def terminal(columns):
    return Console(file=io.StringIO(), force_terminal=True, width=columns, legacy_windows=False, _environ={"TERM": "xterm"})


def lines_of(console):
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    return re.split(r"[\r\n]+", text)


@pytest.mark.parametrize("metric", ["accuracy", "a_metric_with_an_unusually_long_name"])
def test_the_training_bar_fits_80_columns(metric, monkeypatch):
    console = terminal(80)
    monkeypatch.setattr(progress, "console", console)
    display = Progress()
    display.on_train_start(SimpleNamespace(steps=1_234_567, batch_size=256, optimizer="muon", lr=1e-3, precision="bfloat16"), 0)
    losses = {"generator_loss": -1234.5678, "critic_loss": 1e-7, "loss": 0.123456}
    for step in (1, 1_234_566):
        display.on_step(step, losses)
        display.on_evaluate(step, {metric: 0.123456789}, best=True)
    display.close()
    bars = [line for line in lines_of(console) if "1234567" in line]
    assert bars and all(len(line) <= 80 for line in lines_of(console))
    assert any("loss -1235 1e-07" in line and "left" in line and "0.1235" in line for line in bars), bars


def test_phases_run_a_clock_and_count_on_a_terminal():
    console = terminal(80)
    phases = Phases(console)
    phases.start("testing", total=1500)
    phases.advance(700)
    phases.stop()
    text = " ".join(lines_of(console))
    assert "testing" in text and "700 of 1,500" in text and "0:00:00" in text


def test_phases_are_lines_in_a_log_and_nothing_on_a_silent_stream():
    for lines, expected in ((True, "reading data.csv ...\n"), (False, "")):
        console = Console(file=io.StringIO(), force_terminal=False)
        Phases(console, lines=lines).start("reading data.csv")
        assert console.file.getvalue() == expected

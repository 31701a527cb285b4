"""Mistaken calls: what was passed is recognized, and the error suggests the right call in a few lines."""

from __future__ import annotations

import json
import sys

import numpy as np
import polars as pl
import pytest
from PIL import Image

import fieldguide
from fieldguide.cli import commands
from fieldguide.core.errors import DataError, RunError

MAX_LINES = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run, a table, an image, a text, a checkpoint one level down, and an empty folder."""
    folder = tmp_path_factory.mktemp("mistakes")
    draw = np.random.default_rng(0)
    frame = pl.DataFrame({"age": draw.normal(size=60), "city": draw.choice(["a", "b"], 60), "bought": ["no", "yes"] * 30})
    frame.write_csv(folder / "people.csv")
    fieldguide.fit(folder / "people.csv", out=folder / "runs" / "people-1", settings={"steps": 2})
    Image.fromarray(draw.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / "photo.png")
    (folder / "notes.txt").write_text("some words\n")
    (folder / "hub" / "bert").mkdir(parents=True)
    (folder / "hub" / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "hub" / "bert" / "model.safetensors").write_bytes(b"")
    (folder / "empty").mkdir()
    return folder


CALLS = {
    "swapped": ("predict people.csv runs/people-1", "The run comes first: `fieldguide predict runs/people-1 people.csv`"),
    "swapped, several": (
        "predict people.csv photo.png runs/people-1",
        "`fieldguide predict runs/people-1 people.csv photo.png`",
    ),
    "swapped in evaluate": ("evaluate people.csv runs/people-1", "`fieldguide evaluate runs/people-1 people.csv`"),
    "data as run": ("predict people.csv", "people.csv is a file. Pass a run folder (`fieldguide fit people.csv` makes one)"),
    "data to resume": ("fit --resume people.csv", "people.csv is a file. Pass a run folder"),
    "folder of runs": ("predict runs people.csv", "contains runs/people-1. Did you mean 'runs/people-1'?"),
    "folder of checkpoints": ("predict hub photo.png", "contains hub/bert. Did you mean 'hub/bert'?"),
    "misspelled run": ("predict runs/people-2 people.csv", "Did you mean 'people-1'?"),
    "empty folder": ("predict empty people.csv", "empty is not a run folder"),
    "image for a table": ("predict runs/people-1 photo.png", "predicts from a table with the columns 'age', 'city'"),
    "run as data": ("fit runs/people-1", "is a run folder, not data"),
    "run to check": ("check runs/people-1", "is a run folder, not data"),
    "run as input": ("predict runs/people-1 runs/people-1", "is a run folder, not data"),
    "checkpoint as data": ("fit hub/bert", "`fieldguide fit DATA --weights hub/bert`"),
    "half a task name": ("fit people.csv --task classification", "tabular-classification, text-classification"),
    "task that does not exist": ("fit people.csv --task regresion", "Did you mean 'tabular-regression'?"),
    "task in settings": ("settings classification", "Did you mean one of audio-classification, tabular-classification"),
    "task that does not suit": ("fit people.csv --task object-detection", "lacks what object-detection needs"),
    "single image": ("fit photo.png", "the task cannot be inferred"),
    "misspelled column": ("fit people.csv --target boght", "Did you mean 'bought'?"),
    "unsupported": ("fit hub/bert/model.safetensors", "this kind of data is not supported"),
}


@pytest.mark.parametrize("name", CALLS)
def test_error_suggests_the_right_call(folder, name, monkeypatch, capsys):
    arguments, expected = CALLS[name]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["fieldguide", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    error = capsys.readouterr().err
    assert ended.value.code == 1, error
    assert expected in error
    assert "Traceback" not in error and error.count("\n") <= MAX_LINES
    assert len(error) < 2000


def test_a_table_for_a_model_of_images(folder, tmp_path):
    for i in range(24):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 100 + 150 * (i % 2), (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    run = fieldguide.fit(tmp_path, out=tmp_path / "run", settings={"steps": 1, "batch_size": 8})
    with pytest.raises(DataError, match="predicts from files of the type image"):
        run.predict(folder / "people.csv")


def test_python_gives_the_same_suggestions(folder):
    with pytest.raises(RunError, match=r"contains .*people-1"):
        fieldguide.pipeline(folder / "runs")
    with pytest.raises(RunError, match="is a file"):
        fieldguide.pipeline(folder / "people.csv")
    with pytest.raises(RunError):
        fieldguide.open_run(folder / "people.csv")

"""The worked examples of CONTRIBUTING are run: an objective, a task and a reader."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import fieldguide
from fieldguide.data import source
from fieldguide.tasks import tasks

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.M | re.S)


def example(folder: Path, *words: str) -> types.ModuleType:
    """Return a module made of the blocks that contain these words, in the order of the file."""
    (folder / "contributed.py").write_text("\n\n".join(block for block in BLOCKS if any(word in block for word in words)))
    spec = importlib.util.spec_from_file_location("contributed", folder / "contributed.py")
    sys.modules["contributed"] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def contributed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "contributed", None)
    module = example(tmp_path, "class QuantileRegression")
    for kind in module.TASKS:
        monkeypatch.setitem(tasks(), kind.name, kind)
    return module


def test_the_objective_and_task_of_the_examples_can_be_fitted_and_predict(contributed, tmp_path):
    settings = {"steps": 60, "batch_size": 64, "lr": 0.01, "precision": "float32", "task.quantile": 0.9}
    run = fieldguide.fit("diabetes", task="quantile-regression", model="mlp-test", out=tmp_path / "run", settings=settings)
    assert 0.7 < run.scores["coverage"] <= 1  # a mean would cover about half
    predictor = fieldguide.pipeline(tmp_path / "run")
    data = fieldguide.read("diabetes")
    rows = predictor.predict(data.rows.head(3))
    assert len(rows) == 3 and all(np.isfinite(next(iter(row[k] for k in row if k != "input"))) for row in rows)
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_reader_of_the_examples_reads_and_names_what_it_cannot_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "contributed", None)
    module = example(tmp_path, "def accepts(source, options)")
    readers = (*source.find_readers(), module)
    monkeypatch.setattr(source, "find_readers", lambda: readers)
    lines = [f"x={i * 37 % 100 / 7:.2f} y={i % 7} label={'ab'[i % 2]}" for i in range(200)]
    (tmp_path / "rows.kv").write_text("\n".join([*lines[:5], "no pair", *lines[5:]]))
    data = fieldguide.read(tmp_path / "rows.kv", target="label")
    assert len(data) == 200 and data.columns["x"].kind == "number" and data.target.kind == "category"
    assert "rows.kv:6" in str(next(f for f in data.findings if f.check == "no-pair"))

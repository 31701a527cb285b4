"""Fixtures and settings of all tests: a single thread, a cache of samples, and small trained runs."""

from __future__ import annotations

import os

# The networks of tests are small: a second thread costs more than it brings, and the tests run side by side. Before numpy and torch
# are imported, which read it, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

import fieldguide
from fieldguide.training import solvers

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quick_baselines(monkeypatch):
    """Try fewer penalties and settings of trees: most tests fit baselines only because every fit does."""
    monkeypatch.setattr(solvers, "PENALTIES", (1e-2, 1.0, 100.0))
    monkeypatch.setattr(solvers, "TREE_SETTINGS", solvers.TREE_SETTINGS[:1])


@pytest.fixture(scope="session")
def iris_run(tmp_path_factory):
    """A small network trained on iris, in a run folder."""
    return fieldguide.fit(
        "iris", model="mlp-s", out=tmp_path_factory.mktemp("runs") / "iris", settings={"steps": 60, "precision": "float32"}
    )


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """A small network trained on digits, in a run folder."""
    return fieldguide.fit(
        "digits",
        model="simplecnn",
        out=tmp_path_factory.mktemp("runs") / "digits",
        settings={"steps": 120, "precision": "float32"},
    )


@pytest.fixture(scope="session")
def text_run(tmp_path_factory):
    """A small network trained on sentences of documentation, in a run folder."""
    return fieldguide.fit(
        "docstrings",
        model="gru-s",
        out=tmp_path_factory.mktemp("runs") / "text",
        settings={"steps": 60, "precision": "float32", "task.length": 24},
    )


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Four images of different sizes; the last leaves an odd number of pixels to crop from a square of 24."""
    path, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, (width, height) in {"a": (40, 31), "b": (24, 24), "c": (30, 90), "d": (41, 24)}.items():
        Image.fromarray(rng.integers(0, 255, (height // 2, width // 2, 3), dtype=np.uint8)).resize((width, height)).save(
            path / f"{name}.png"
        )
    return path


def pytest_collection_modifyitems(items):
    """Run tests that start processes first: they take longest, and no worker should end with one."""
    first = ("test_resume", "test_distributed", "test_readme", "test_cli")
    items.sort(key=lambda item: next((i for i, name in enumerate(first) if name in item.nodeid), len(first)))

"""Two processes under torchrun train like one."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fieldguide import open_run
from fieldguide.models import registry
from fieldguide.tasks import tasks

HERE = Path(__file__).parent


def torchrun(processes: int, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=HERE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "gan"])  # one phase, or two of them
def test_gradients_of_two_processes_equal_one_process(kind, tmp_path):
    """Eight SGD steps in float64: any difference of gradients would change the weights."""
    for processes in (1, 2):
        torchrun(processes, str(HERE / "distributed_worker.py"), str(tmp_path / f"{processes}.pt"), kind)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert (one["world"], two["world"]) == (1, 2)
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_fit_under_torchrun_scores_like_one_process(tmp_path, digits_run):
    out = tmp_path / "two"
    said = torchrun(
        2,
        "-m",
        "fieldguide",
        "fit",
        "digits",
        "--model",
        "simplecnn",
        "--set",
        "steps=120",
        "--set",
        "precision=float32",
        "--out",
        str(out),
    )
    record = json.loads((out / "run.json").read_text())
    assert record["cost"]["processes"] == 2 and record["status"] == "done"
    low, high = digits_run.record["scores"]["intervals"]["accuracy"]
    assert low - 0.02 <= record["scores"]["test"]["accuracy"] <= high + 0.02
    assert said.count("Baselines:") == 1  # printed by one process only
    assert (out / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sample",
    [
        "scattered",
        "inked",
        "scenery",
        "manual",
        "phrases",
        "demand",
        "figures",
        "moving",
        "captions",
        "questions",
        "spoken",
        "series",
        "clicks",
    ],
)
def test_every_task_runs_on_two_processes(sample, tmp_path):
    """Predictions of two processes equal those of one, including generated images and videos."""
    out = tmp_path / "two"
    said = torchrun(
        2,
        "-m",
        "fieldguide",
        "fit",
        sample,
        "--set",
        "steps=3",
        "--set",
        "batch=8",
        "--set",
        "precision=float32",
        "--out",
        str(out),
    )
    record = json.loads((out / "run.json").read_text())
    assert record["cost"]["processes"] == 2 and record["status"] == "done" and said.count("Baselines:") == 1
    alone = open_run(out).evaluate(sample)["scores"]
    near = 0.03 if sample == "captions" else 1e-3  # whose vectors, after three steps, rounding puts in another order
    assert alone == pytest.approx(record["scores"]["test"], rel=1e-3, abs=near, nan_ok=True)


def test_baselines_can_be_sent_to_other_processes():
    """The first process fits them, and sends them to the others as `torch.distributed` does: pickled."""
    for name in sorted({name for kind in tasks().values() for name in kind.baseline_models}):
        network = registry.card(name).make(registry.card(name).resolve_config(registry.card(name).tiny))
        again = pickle.loads(pickle.dumps(network))
        assert again.state_dict().keys() == network.state_dict().keys()

"""Runs that are killed, interrupted, damaged or out of disk space resume without loss."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TASKS = {
    "tabular-classification": ["wine", "--model", "tabm-s", "--set", "steps=50", "--set", "evaluate=10"],
    # Two worker processes prepare the batches; augmentation, averaging of weights and mixup are on.
    "image-classification": [
        "digits",
        "--model",
        "simplecnn",
        "--set",
        "steps=50",
        "--set",
        "evaluate=20",
        "--set",
        "workers=2",
        "--set",
        "mixup=0.2",
        "--set",
        "channels_last=true",
    ],
    "text-classification": [
        "docstrings",
        "--model",
        "gru-s",
        "--set",
        "steps=36",
        "--set",
        "evaluate=12",
        "--set",
        "task.length=16",
        "--set",
        "accumulate=2",
    ],
}
KILLS = 7  # for each task


def start(arguments: list[str], **kw) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fieldguide", "fit", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **kw,
    )


def complete(arguments: list[str]) -> str:
    process = start(arguments)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def begin(task: str, out: Path, *more: str) -> list[str]:
    return [*TASKS[task], "--set", "precision=float32", "--set", "checkpoint=0", *more, "--out", str(out)]


def losses(run: Path) -> list[dict]:
    """Return the lines of the log without times."""
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def step_of(run: Path) -> int:
    found = sorted((run / "checkpoints").glob("step-*.json")) if (run / "checkpoints").exists() else []
    return int(found[-1].stem[5:]) if found else 0


# Seven kills a task, in `make test-all`: each takes a minute. Ctrl-C below and test_tasks_resume.py stop runs quickly.
@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_killed_run_resumes_bit_exact(task, tmp_path):
    whole, killed, dice = tmp_path / "whole", tmp_path / "killed", random.Random(task)
    complete(begin(task, whole))
    last = losses(whole)[-1]["step"]
    arguments, kills, done = begin(task, killed), 0, 0
    targets = sorted(dice.sample(range(1, last), KILLS))
    for target in targets:
        process = start(arguments)
        while step_of(killed) < target and process.poll() is None:
            time.sleep(0.002)
        time.sleep(dice.random() * 0.02)  # anywhere in a step, or in the writing of a checkpoint
        alive = process.poll() is None
        process.kill()
        process.communicate()
        kills += alive
        done = step_of(killed)
        arguments = ["--resume", str(killed)]
    assert kills == KILLS, f"only {kills} kills met a living process; the run got to step {done}"
    said = complete(arguments)
    assert "resumed at step" in said
    assert losses(killed) == losses(whole)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_ctrl_c_leaves_a_resumable_run(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    complete(begin("tabular-classification", whole))
    process = start(begin("tabular-classification", stopped))
    while step_of(stopped) < 5 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in said and "Traceback" not in said, said
    complete(["--resume", str(stopped)])
    assert losses(stopped) == losses(whole)
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    run = tmp_path / "run"
    process = start(begin("tabular-classification", run))
    while step_of(run) < 5 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    before = step_of(run)
    sizes = [f.stat().st_size for f in (run / "checkpoints").glob("*.safetensors")]

    def limit() -> None:  # writing beyond this many bytes fails, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (min(sizes) // 2, min(sizes) // 2))

    process = start(["--resume", str(run)], preexec_fn=limit)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "could not write" in said and "Traceback" not in said, said
    assert step_of(run) == before and not list((run / "checkpoints").glob(".*partial"))
    complete(["--resume", str(run)])


@pytest.mark.slow
def test_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    complete(begin("tabular-classification", whole))
    process = start(begin("tabular-classification", run))
    while step_of(run) < 12 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    process.communicate()
    newest = sorted((run / "checkpoints").glob("step-*.safetensors"))[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    newest.write_bytes(content)
    said = complete(["--resume", str(run)])
    assert f"{newest.stem} is damaged" in said
    assert losses(run) == losses(whole)


@pytest.mark.slow
def test_changed_settings_on_resume(tmp_path):
    run = tmp_path / "run"
    process = start(begin("tabular-classification", run))
    while step_of(run) < 5 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    process.communicate()
    process = start(["--resume", str(run), "--set", "batch=7"])
    said, _ = process.communicate()
    assert process.returncode == 1 and "batch_size cannot change" in said
    said = complete(["--resume", str(run), "--set", "lr=0.0001"])
    assert "changed on resume: lr" in said and "-> 0.0001" in said


@pytest.mark.slow
def test_changed_data_on_resume_is_rejected(tmp_path):
    from fieldguide.data.samples import path

    table, run = tmp_path / "wine.csv", tmp_path / "run"
    source = path("wine")
    table.write_bytes((source if source.is_file() else next(source.glob("*.csv"))).read_bytes())
    process = start([table.name, *begin("tabular-classification", run)[1:]], cwd=tmp_path)  # found again from elsewhere
    while step_of(run) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    process.communicate()
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:-1]) + "\n")
    process = start(["--resume", str(run)])
    said, _ = process.communicate()
    assert process.returncode == 1 and "has changed since" in said, said

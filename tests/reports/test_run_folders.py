"""Run folders: kills at any moment, damaged files, two processes in one folder, stored settings, folders that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import fieldguide
from fieldguide.automl.fit import NullCallback
from fieldguide.core import files, lock
from fieldguide.core.errors import DataError, RunError, TrainingError, WriteError
from fieldguide.core.run_files import remove_leftovers
from fieldguide.data import samples
from fieldguide.training import checkpoint

QUICK = {"steps": 8, "eval_steps": 4, "batch_size": 16, "precision": "float32"}


def train(table, out, **options):
    return fieldguide.fit(table, target="y", model="mlp-test", out=out, **{"settings": QUICK, **options})


@pytest.fixture(scope="module")
def done(table, tmp_path_factory):
    return train(table, tmp_path_factory.mktemp("runs") / "done")


def copy(run, to: Path) -> Path:
    return shutil.copytree(run.path, to)


def rewrite(path: Path, **changes) -> None:
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(record | changes))


# Kills


@pytest.mark.slow
def test_kill_after_any_write_leaves_a_resumable_run(table, done, tmp_path, monkeypatch):
    """The folder is copied after every write. Each copy is what a kill at that moment leaves, and ends like the whole run."""
    states, replace = [], os.replace
    whole = tmp_path / "whole"

    def copying(source, target):
        replace(source, target)
        states.append(shutil.copytree(whole, tmp_path / "states" / f"{len(states):02d}-{Path(target).name}"))

    monkeypatch.setattr(os, "replace", copying)
    train(table, whole)
    monkeypatch.undo()
    assert 20 < len(states) < 50
    found = {"new": 0, "training": 0, "trained": 0, "done": 0}
    for state in states:
        if not (state / "run.json").exists():
            found["new"] += 1
            continue
        status = json.loads((state / "run.json").read_text())["status"]
        found[status] += 1
        run = fieldguide.resume(state)
        assert run.status == "done" and run.scores == done.scores and (state / "report.html").exists(), state.name
        assert (state / "model.safetensors").read_bytes() == (done.path / "model.safetensors").read_bytes(), state.name
        assert not list(state.glob(".*")), state.name
    assert found["new"] and found["training"] and found["trained"] > 5 and found["done"] == 1


def test_killed_between_report_and_done_is_tested_again(done, tmp_path):
    path = copy(done, tmp_path / "run")
    rewrite(path, status="trained")
    (path / "report.html").write_text("half")
    assert fieldguide.open_run(path).predict(samples_of(done))  # usable all the time
    assert fieldguide.resume(path).status == "done"
    assert (path / "report.html").read_text().rstrip().endswith("</html>")


def samples_of(run) -> pl.DataFrame:
    return pl.read_csv(run.record["request"]["data"]).drop("y").head(3)


def test_killed_before_training_leaves_a_usable_folder(table, tmp_path):
    (tmp_path / "run" / ".staging-x" / "preprocess").mkdir(parents=True)
    (tmp_path / "run" / ".lock").write_text("")
    assert train(table, tmp_path / "run").status == "done"
    assert not list((tmp_path / "run").glob(".*"))


# Digests


@pytest.mark.parametrize("name", ["model.safetensors", "preprocess/task.json", "splits.npz", "row_digests.npz"])
def test_a_changed_byte_is_found(name, done, table, tmp_path):
    path = copy(done, tmp_path / "run")
    content = (path / name).read_bytes()
    assert name in done.record["digests"]
    for place in np.linspace(0, len(content) - 1, 9).astype(int):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        (path / name).write_bytes(damaged)
        run = fieldguide.open_run(path)
        with pytest.raises(RunError, match=rf"{Path(name).name} is damaged or was changed"):
            if name == "splits.npz":
                run.evaluate(table)
            elif name == "row_digests.npz":
                run.evaluate(pl.read_csv(table).head(50))
            else:
                run.predict(samples_of(done))


@pytest.mark.parametrize("name", ["model.safetensors", "preprocess/task.json"])
def test_damaged_run_is_no_source_of_weights(name, done, table, tmp_path):
    path = copy(done, tmp_path / "run")
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(RunError, match="damaged or was changed"):
        from fieldguide.checkpoints.run_folder import read_network, read_preprocessing

        read_network(path)
        read_preprocessing(path)


def test_damaged_digests_and_foreign_names(done, tmp_path):
    path = copy(done, tmp_path / "run")
    for digests in ([], {"model.safetensors": 3}, {"preprocess/../../x": "0"}, {"/etc/passwd": "0"}):
        rewrite(path, digests=digests)
        with pytest.raises(RunError, match=r"run\.json is damaged"):
            fieldguide.open_run(path).predict(samples_of(done))


def test_run_without_digests_is_read(done, tmp_path):
    path = copy(done, tmp_path / "run")
    record = json.loads((path / "run.json").read_text())
    del record["digests"], record["cost"]["repeatable"], record["machine"]["threads"], record["settings"]["deterministic"]
    (path / "run.json").write_text(json.dumps(record | {"status": "training"}))
    for file in (path / "checkpoints").glob("*.json"):
        state = json.loads(file.read_text())
        del state["digest"], state["state"]["state"]["repeatable"]
        file.write_text(json.dumps(state))
    assert fieldguide.resume(path).scores == done.scores


@pytest.mark.parametrize("change", [{"step": 3}, {"state": {}}, {"extra": 1}, {"sha256": "0"}])
def test_changed_checkpoint_state_is_found(change, done, tmp_path):
    path = copy(done, tmp_path / "run")
    rewrite(path, status="training")
    for file in (path / "checkpoints").glob("*.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(TrainingError, match=r"all checkpoints .* are damaged"):
        fieldguide.resume(path)


def test_changed_number_in_a_checkpoint_is_found(done, tmp_path):
    path = copy(done, tmp_path / "run")
    rewrite(path, status="training")
    (file,) = (path / "checkpoints").glob("*.json")
    record = json.loads(file.read_text())
    record["state"]["state"]["best_step"] += 4
    file.write_text(json.dumps(record))
    with pytest.raises(TrainingError, match="damaged"):
        fieldguide.resume(path)


# Two processes

# Holds a lock, and starts a worker that outlives it.
HOLD = """
import os, sys, time
from pathlib import Path
from fieldguide.core.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    worker = os.fork()
    if worker:
        print(worker, flush=True)
    time.sleep(60)
"""


def test_second_process_is_rejected_until_the_first_is_killed(done, tmp_path):
    path = copy(done, tmp_path / "run")
    rewrite(path, status="training")
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        worker = int(first.stdout.readline())
        with pytest.raises(RunError, match=rf"in use: process {first.pid} on .* trains in it"):
            fieldguide.resume(path)
        assert fieldguide.open_run(path).predict(samples_of(done))  # reading is always possible
        first.kill()
        first.wait()
        assert (path / lock.NAME).exists()
        assert fieldguide.resume(path).status == "done" and not (path / lock.NAME).exists()
    finally:
        first.kill()
        os.kill(worker, signal.SIGKILL)
        first.communicate()


def test_second_thread_is_rejected(done, tmp_path):
    path, refused = copy(done, tmp_path / "run"), []

    def other():
        try:
            fieldguide.resume(path / ".." / "run")
        except RunError as error:
            refused.append(str(error))

    with lock.lock_folder(path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1 and "another thread" in refused[0]
    assert fieldguide.resume(path).status == "done"


# Stored settings


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"num_workers": 100_000}, "num_workers=100000 must be at most"),
        ({"batch_size": "many"}, r"settings\.batch_size must be an integer"),
        ({"lr": float("inf")}, r"settings\.lr must be a number, but is inf"),
        ({"threads": -1}, "at least 1"),
        ({"nothing": 3}, "nothing"),
    ],
)
def test_settings_are_validated_on_resume(setting, words, done, tmp_path):
    path = copy(done, tmp_path / "run")
    rewrite(path, status="training", settings=done.record["settings"] | setting)
    with pytest.raises(RunError, match=words) as raised:
        fieldguide.resume(path)
    assert "run.json" in str(raised.value)
    if "num_workers" in setting:
        assert fieldguide.resume(path, settings={"num_workers": 0}).status == "done"


@pytest.mark.parametrize(
    "key", ["num_workers", "batch_size", "steps", "epochs", "minutes", "seed", "threads", "grad_accum_steps"]
)
def test_limits_of_settings_have_a_reason(key):
    from fieldguide.core.errors import SettingsError
    from fieldguide.core.settings import parse

    with pytest.raises(SettingsError, match=rf"{key}=.* must be at most [\d,]+: \w+"):
        parse(key, 10**20)
    with pytest.raises(SettingsError):
        parse("lr", "nan")


# Folders that cannot be written


def test_out_folder_is_checked_before_data_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="a part of the path is a file"):
        fieldguide.fit("nowhere.csv", out=tmp_path / "file" / "run")
    for code, words in (
        (errno.EROFS, "the file system is read-only"),
        (errno.ENOSPC, "the disk is full"),
        (errno.EACCES, "permission denied"),
    ):

        def fail(*arguments, code=code, **options):
            raise OSError(code, "no")

        monkeypatch.setattr(files.tempfile, "TemporaryFile", fail)
        with pytest.raises(WriteError, match=words) as raised:
            fieldguide.fit("nowhere.csv", out=tmp_path / "new" / "run")
        assert "\n" not in str(raised.value) and "new/run" in str(raised.value)


def test_too_little_space_for_the_network_is_found_before_training(table, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(WriteError, match=r"KiB are needed for checkpoints and weights, but 1000 bytes are free"):
        train(table, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class At(NullCallback):
    """Do something at a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step(self, step, losses):
        if step == self.step:
            self.action()


def test_removed_run_folder_is_one_clear_error(table, tmp_path):
    with pytest.raises(WriteError, match="its folder does not exist"):
        train(table, tmp_path / "run", callback=At(3, lambda: shutil.rmtree(tmp_path / "run")))
    assert not (tmp_path / "run").exists()  # not created again, without its other files


def test_checkpoint_does_not_create_a_removed_run_folder(tmp_path):
    with pytest.raises(WriteError, match="its folder does not exist"):
        checkpoint.save(tmp_path / "run" / "checkpoints", 3, {"x": torch.zeros(1)}, {})
    assert not (tmp_path / "run").exists()


def test_incomplete_checkpoint_gives_its_space_back(tmp_path, monkeypatch):
    write = checkpoint.write_atomically

    def fail_for_json(path, content):
        if path.suffix == ".json":
            raise WriteError("full")
        write(path, content)

    monkeypatch.setattr(checkpoint, "write_atomically", fail_for_json)
    with pytest.raises(WriteError, match="full"):
        checkpoint.save(tmp_path / "checkpoints", 3, {"x": torch.zeros(1)}, {})
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_file_size_limit_is_one_clear_error(table, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(WriteError, match=r"file size limit of this process is reached \(see `ulimit -f`\)"):
            train(
                table,
                tmp_path / "run",
                callback=At(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))),
                settings={**QUICK, "checkpoint_seconds": 0},
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = [p.name for p in (tmp_path / "run").rglob("*") if p.name.startswith(".")]
    assert left == []
    assert fieldguide.resume(tmp_path / "run").status == "done"


def test_full_disk_in_the_test_keeps_the_trained_network(table, done, tmp_path, monkeypatch):
    from fieldguide.report import pages

    def fail(*arguments):
        files.write_atomically(tmp_path / "run" / "report.html", b"x")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(*arguments):
        monkeypatch.setattr(os, "fsync", full)
        fail()

    monkeypatch.setattr(pages, "write", write)
    with pytest.raises(WriteError, match=r"report\.html: the disk is full"):
        train(table, tmp_path / "run")
    monkeypatch.undo()
    run = fieldguide.open_run(tmp_path / "run")
    assert run.status == "trained" and run.predict(samples_of(done))
    assert fieldguide.resume(tmp_path / "run").scores == done.scores


def test_no_home_directory(tmp_path, monkeypatch):
    def unknown(*arguments):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.setattr(Path, "expanduser", unknown)
    with pytest.raises(DataError, match="HOME is not set"):
        samples.path("iris")
    with pytest.raises(DataError, match="no such file"):
        fieldguide.read("~/x.csv")
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="Set XDG_CACHE_HOME to a folder that can be written"):
        samples.path("iris")


def test_leftovers_are_removed(tmp_path):
    (tmp_path / ".staging-a" / "x").mkdir(parents=True)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".step-1.json.7.partial").write_text("")
    (tmp_path / "run.json").write_text("{}")
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["checkpoints", "run.json"]
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # so that the limit is an error, not the end

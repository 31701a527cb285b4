"""Exports of recommendation: events of new users and items, compared with the run in a process without torch."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import fieldguide
from fieldguide.exporting.builders import BUILDERS, REASONS
from fieldguide.exporting.comparison import Comparison
from fieldguide.exporting.graph import ExportError
from fieldguide.exporting.verify import verify
from fieldguide.tasks import tasks

SETTINGS = {"steps": 15, "precision": "float32", "task.length": 6}


def write_events(path, dates: bool, seed: int = 0, users: int = 60):
    """Write events of users who mostly continue a series of items, with features, some without a time, in no order."""
    rng, lines = np.random.default_rng(seed), []
    for user in range(users):
        item, start = int(rng.integers(30)), int(rng.integers(1_000_000_000, 1_100_000_000))
        for step in range(int(rng.integers(3, 12))):
            item = (item + 1) % 30 if rng.random() < 0.7 else int(rng.integers(30))
            seconds = start + 7_213 * step
            moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC).replace(tzinfo=None) if dates else seconds
            time = "" if rng.random() < 0.05 else str(moment)
            lines.append(f"{user:03},i{item},{time},{'ab'[user % 2]},{'xyz'[item % 3]}")
    rng.shuffle(lines)
    path.write_text("\n".join(["user,item,time,club,kind", *lines]) + "\n", encoding="utf-8")
    return path


def run_events(folder, path):
    done = subprocess.run([sys.executable, "-E", str(folder / "run.py"), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, dates",
    [
        ("hstu-test", True),
        *(
            pytest.param(name, dates, marks=pytest.mark.slow)
            for name, dates in [
                ("hstu-test", False),
                ("two-tower-test", False),
                ("bert4rec-test", True),
                ("sasrec-test", False),
                ("item-neighbors", False),
            ]
        ),
    ],
)
def test_recommendations_for_raw_events_are_equal(model, dates, tmp_path):
    events = write_events(tmp_path / "events.csv", dates)
    run = fieldguide.fit(events, task="recommendation", model=model, out=tmp_path / "run", settings=SETTINGS)
    done = run.export(out=tmp_path / "export")
    assert done.passed and done.verification.rows == 60, done.verification.problems
    assert len((done.path / "run.py").read_text().splitlines()) < 150
    check_new_events(run, done.path, dates, tmp_path)
    check_mistakes(run, done.path, str(events), not model.startswith(("two-tower", "item")))


def check_new_events(run, folder, dates, tmp_path):
    """Compare new users, items that are not known, items met again, events without a time, and lists of items."""
    rows = ["user,item,time,club,kind", "new,i3,,a,x", "new, i4 ,,a,x", "new,none,,a,x", "other,strange,,b,y", "001,i9,,b,z"]
    times = ["2005-05-01 10:00:00", "2005-05-01", "2005-04-30T23:59:59"] if dates else ["1114941600", "1114905600", "1.5e9"]
    rows += [f"{user},{item},{time},b,z" for user in ("002", "third") for item, time in zip(("i1", "i2", "i1"), times)]
    path = tmp_path / "new.csv"
    path.write_text("\n".join(rows) + "\n")
    found, notes = run_events(folder, path)
    want = run.predict(str(path))
    assert (
        [record["user"] for record in found] == [record["user"] for record in want] == ["001", "002", "new", "other", "third"]
    )
    assert Comparison(1e-4).compare(list(want), found)[1] == ""
    assert "1 events have items that are not in the training data" in notes and "1 events without a user" in notes
    many = f"import sys; sys.path.insert(0, {str(folder)!r}); import run; run.Model().predict([], count=200)"
    done = subprocess.run([sys.executable, "-E", "-c", many], capture_output=True, text=True)
    assert done.returncode == 1 and "count=200: this model recommends at most 30 items" in done.stderr
    named = run.predict(["i3,i4"])
    assert Comparison(1e-4).compare(list(named), run_events(folder, "i3,i4")[0])[1] == ""


def check_mistakes(run, folder, source, is_ordered):
    """Check that shifted names and another order of time are found."""
    model, program = onnx.load(folder / "model.onnx"), (folder / "run.py").read_text()
    names = next(
        a for n in model.graph.node if n.output[0] == "items" for a in n.attribute if a.name == "values_strings"
    ).strings
    names.append(names.pop(0))
    onnx.save(model, folder / "model.onnx")
    assert not verify(run, folder, source).passed
    names.insert(0, names.pop())
    onnx.save(model, folder / "model.onnx")
    assert verify(run, folder, source).passed
    changes = {"list(items)": "[*items[:-1], items[0]]"}
    changes |= {"key=lambda event: event[0])": "key=lambda event: event[1])"} if is_ordered else {}
    for old, new in changes.items():
        assert old in program
        (folder / "run.py").write_text(program.replace(old, new))
        assert not verify(run, folder, source).passed


def test_items_of_equal_score_may_change_places():
    want = {"user": "u", "recommended": "a, b, c", "items": ["a", "b", "c"], "scores": [2.0, 1.0, 1.00001]}
    find = lambda items, scores: Comparison(1e-4).compare(want, {"user": "u", "items": items, "scores": scores})[1]
    assert find(["a", "c", "b"], [2.0, 1.0, 1.0]) == "" == find(["a", "b", "d"], [2.0, 1.0, 1.0])  # d has the score of the last
    assert find(["b", "a", "c"], [2.0, 1.0, 1.0]) and find(["a", "b"], [2.0, 1.0])
    assert find(["a", "b", "c"], [2.1, 1.0, 1.0]) and find(["d", "b", "c"], [2.0, 1.0, 1.0])
    low = {"items": ["a", "b"], "scores": [-1.0, -2.0]}
    assert Comparison(1e-4).compare(low, {"items": ["c", "b"], "scores": [-1.0, -2.0]})[1]


def test_every_task_has_a_graph_or_a_reason():
    names = set(tasks())
    assert names <= BUILDERS.keys() | REASONS.keys() and not BUILDERS.keys() & REASONS.keys()
    run = fieldguide.open_run(Path(__file__).parent / "golden" / "v1-fill-mask")
    with pytest.raises(ExportError, match=r"fill-mask cannot be exported to a graph yet: run.py does not fill gaps in texts"):
        run.export(out="never-written")

"""The saved preprocessing of a run: every value is checked before it is used, and a wrong one is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

import fieldguide
from fieldguide.core.errors import FieldguideError
from fieldguide.core.structure import Limits, check_value
from fieldguide.tasks import Task, task

GOLDEN = sorted(p for p in (Path(__file__).parents[1] / "golden").iterdir() if (p / "preprocess" / "task.json").exists())
WRONG: list[Any] = [None, "x", -1, 10**18, float("nan"), True, [], {}, [[]], ["x"], {"a": 1}]


@dataclass
class Point:
    x: int
    y: Annotated[float, Limits(0, 1)] = 0.5


VALUES = [  # type, value, problem
    (int, 3, None),
    (int, True, "v must be"),
    (int, 3.0, "v must be"),
    (int, 10**18, "v must be"),
    (float, 3, None),
    (float, float("nan"), "v must be"),
    (str | None, None, None),
    (str | None, 1, "v must be"),
    (Literal["a", "b"], "b", None),
    (Literal["a", "b"], "c", "must be one of 'a', 'b'"),
    (list[int], [1, 2], None),
    (list[int], [1, "2"], r"v\[1\]"),
    (tuple[int, str], [1, "a"], None),
    (tuple[int, str], [1], "2 items"),
    (dict[str, list[str]], {"a": ["b"]}, None),
    (dict[str, list[str]], {"a": [1]}, r"v\.a\[0\]"),
    ({"a": int, "b?": str}, {"a": 1, "other": None}, None),
    ({"a": int, "b?": str}, {"b": "x"}, "lacks 'a'"),
    ({"a": int, "b?": str}, {"a": 1, "b": 2}, r"v\.b must be"),
    (Point, {"x": 1}, None),
    (Point, {"x": 1, "y": 2}, "between 0 and 1"),
    (Point, {"x": 1, "z": 2}, "unknown key 'z'"),
    (Point, [1], "v must be"),
]


@pytest.mark.parametrize("kind, value, problem", VALUES, ids=[f"{k} {v}"[:60] for k, v, _ in VALUES])
def test_values_are_checked_by_type(kind, value, problem):
    if problem is None:
        check_value(value, kind, "v")
    else:
        with pytest.raises(ValueError, match=problem):
            check_value(value, kind, "v")


@pytest.mark.parametrize("run", GOLDEN, ids=lambda p: p.name)
def test_every_key_of_a_state_has_a_type(run):
    record = json.loads((run / "preprocess" / "task.json").read_text(encoding="utf-8"))
    kind = task(record["task"])
    written = Task.load(run / "preprocess").state()
    known = {key.removesuffix("?") for key in kind.state_types()}
    assert written.keys() <= known, f"{kind.name}: add {sorted(written.keys() - known)} to STATE"


@pytest.mark.parametrize("run", GOLDEN, ids=lambda p: p.name)
def test_a_wrong_value_is_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "preprocess" / "task.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    rejected = 0
    for key in record["state"]:
        for wrong in WRONG:
            file.write_text(json.dumps({**record, "state": {**record["state"], key: wrong}}), encoding="utf-8")
            try:
                _ = fieldguide.open_run(tmp_path / "run").task
            except FieldguideError as error:
                rejected += 1
                assert str(tmp_path / "run") in str(error) and len(str(error)) < 600
    assert rejected >= len(WRONG) // 2 * len(record["state"])


DAMAGED_FEATURES = {  # what is changed in the state of a table -> words of the error
    "an unknown part": (lambda s: s["preparer"]["numbers"][0].update(part="year-cos"), "part 'year-cos'"),
    "an unknown column": (lambda s: s["preparer"]["numbers"][0].update(column="no such"), "'no such'"),
    "a feature less": (lambda s: s["preparer"]["numbers"].pop(), "do not belong together"),
}


@pytest.mark.parametrize("name", DAMAGED_FEATURES)
def test_features_fit_the_columns_and_the_network(tmp_path, name):
    change, words = DAMAGED_FEATURES[name]
    run = next(p for p in GOLDEN if p.name == "v1-tabular-classification")
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "preprocess" / "task.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    change(record["state"])
    file.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(FieldguideError, match=words):
        _ = fieldguide.open_run(tmp_path / "run").objective


@pytest.mark.parametrize(
    ("key", "value"), [("batch_size", 16.5), ("steps", "many"), ("precision", 3), ("minutes", None), ("refit", "yes")]
)
def test_settings_of_another_type_are_named(key, value, iris_run, tmp_path):
    import shutil

    import fieldguide
    from fieldguide.core.errors import RunError

    shutil.copytree(iris_run.path, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    record["settings"][key] = value
    (tmp_path / "run" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(RunError, match=rf"run\.json is damaged: .*{key}"):
        fieldguide.open_run(tmp_path / "run").predict("iris")

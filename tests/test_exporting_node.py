"""ONNX exports in other runtimes: onnxruntime for Node.js, and its WebAssembly build, in Node.js and in a browser.

Needs `npm install --ignore-scripts onnxruntime-node onnxruntime-web` in the folder that NODE_ONNXRUNTIME names; for the browser
also playwright-core there, and Chromium (/usr/bin/chromium, or what CHROMIUM names).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from fieldguide.exporting.comparison import Comparison
from fieldguide.exporting.requests import choose_rows

SCRIPT = Path(__file__).with_name("onnxruntime.mjs")
BROWSER_SCRIPT = Path(__file__).with_name("browser.mjs")
ROWS = 24


def skip_without(package: str) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    folder = os.environ.get("NODE_ONNXRUNTIME")
    if not folder or not (Path(folder) / "node_modules" / package).exists():
        pytest.skip(f"NODE_ONNXRUNTIME names no folder with {package}")


class NodeSession:
    """The session of run.py, with JavaScript in place of Python."""

    package = ""

    def __init__(self, folder, name="model"):
        self.path, self.home = Path(folder) / f"{name}.onnx", Path(folder)
        self.outputs = [output.name for output in onnxruntime.InferenceSession(str(self.path)).get_outputs()]

    def run(self, batch):
        spell = lambda array: "string" if array.dtype.kind in "OU" else str(array.dtype)
        sent = {name: {"type": spell(a), "dims": a.shape, "data": a.ravel().tolist()} for name, a in batch.items()}
        paths = [self.home / name for name in ("batch.json", "outputs.json")]
        paths[0].write_text(json.dumps(sent))
        done = subprocess.run(["node", SCRIPT, self.package, self.path, *paths], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = json.loads(paths[1].read_text())
        return [np.array(found[name]["data"]).reshape(found[name]["dims"]) for name in self.outputs]


@pytest.mark.slow
@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
@pytest.mark.parametrize("name", ["messy_table_run", "digits_run", "text_run"])
def test_records_of_javascript_are_those_of_the_run(name, package, request, tmp_path, monkeypatch):
    skip_without(package)
    run = request.getfixturevalue(name)
    done = run.export(out=tmp_path / "export")
    spec = importlib.util.spec_from_file_location("exported_run", done.path / "run.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    monkeypatch.setattr(NodeSession, "package", package)
    program.Session = NodeSession
    table = choose_rows(run, run.record["data"]["source"])[0].head(ROWS)
    table.write_csv(tmp_path / "rows.csv")
    want = run.predict(str(tmp_path / "rows.csv"))
    got = program.Model(done.path).predict(program.read(tmp_path / "rows.csv"))
    compare = Comparison(json.loads((done.path / "verify.json").read_text())["tolerance"]).compare
    problems = [problem for a, b in zip(want, got, strict=True) if (problem := compare(a, b)[1])]
    assert len(want) >= 8 and not problems, problems[:3]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_run", "tint_run"])
def test_a_browser_gives_the_answers_of_the_run(name, request, tmp_path):
    """Chromium decodes PNG files, gray and in color and of several sizes, and onnxruntime-web predicts."""
    skip_without("onnxruntime-web")
    skip_without("playwright-core")
    if not Path(os.environ.get("CHROMIUM", "/usr/bin/chromium")).exists():
        pytest.skip("chromium is not installed")
    run = request.getfixturevalue(name)
    done = run.export(out=tmp_path / "export")
    rows = choose_rows(run, run.record["data"]["source"])[0].head(ROWS)
    (tmp_path / "images").mkdir()
    for number, path in enumerate(rows[rows.columns[0]]):
        shutil.copy(path, tmp_path / "images" / f"{number:03}.png")
    answers = tmp_path / "answers.json"
    command = ["node", BROWSER_SCRIPT, done.path, tmp_path / "images", answers]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    told = json.loads(answers.read_text())
    assert "Chrome/" in told["agent"] and len(told["found"]) == len(rows) >= 8
    want, answer = run.predict(str(tmp_path / "images")), json.loads((done.path / "export.json").read_text())["answer"]
    for record, got in zip(want, told["found"], strict=True):
        assert got["label"] == record[answer]
        assert dict(zip(told["labels"], got["probabilities"])) == pytest.approx(record["probabilities"], abs=1e-5)
    print(told["agent"], len(want), "answers equal")


@pytest.fixture(scope="module")
def tint_run(tmp_path_factory):
    """A network for photos in color, whose classes are more red or more blue."""
    import fieldguide

    folder, rng = tmp_path_factory.mktemp("tints"), np.random.default_rng(0)
    for i in range(80):
        home = folder / "photos" / ("warm" if i % 2 else "cold")
        home.mkdir(parents=True, exist_ok=True)
        low = rng.integers(0, 200, (5, 6, 3), dtype=np.uint8)
        low[..., 0 if i % 2 else 2] += 55
        Image.fromarray(low).resize(tuple(rng.integers(20, 60, 2)), Image.Resampling.BICUBIC).save(home / f"{i:03}.png")
    settings = {"steps": 40, "precision": "float32", "task.side": 16}
    return fieldguide.fit(folder / "photos", model="simplecnn", out=folder / "run", settings=settings)


@pytest.fixture(scope="module")
def messy_table_run(tmp_path_factory):
    """A network for numbers and words, with missing cells."""
    import fieldguide

    folder, rng = tmp_path_factory.mktemp("table"), np.random.default_rng(0)
    lines = ["size,color,kind"]
    for i in range(150):
        size, color = rng.normal(), ["red", "green", "deep blue"][rng.integers(3)]
        lines.append(f"{'' if i % 11 == 0 else f'{size:.3f}'},{color},{'ab'[int(size > 0)]}")
    (folder / "table.csv").write_text("\n".join(lines))
    settings = {"steps": 20, "precision": "float32"}
    return fieldguide.fit(folder / "table.csv", target="kind", model="mlp-s", out=folder / "run", settings=settings)

"""ONNX exports in other runtimes: onnxruntime for Node.js, and its WebAssembly build.

Needs `npm install --ignore-scripts onnxruntime-node onnxruntime-web` in the folder that NODE_ONNXRUNTIME names.
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

from fieldguide.exporting.comparison import Comparison
from fieldguide.exporting.requests import choose_rows

SCRIPT = Path(__file__).with_name("onnxruntime.mjs")
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

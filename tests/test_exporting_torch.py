"""Exports as programs of `torch.export`, compared with the run in a process without fieldguide."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import fieldguide
from fieldguide.cli import commands
from fieldguide.core.errors import SettingsError
from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.exporting.export import export
from fieldguide.exporting.graph import BATCH, ExportError, Graph
from fieldguide.exporting.torch_file import TorchFormat, trace
from fieldguide.exporting.tracing import compare_sizes
from fieldguide.exporting.verify import Comparison, verify

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = {"steps": 4, "precision": "float32"}
RECURRENT = (torch.ops.aten.lstm.input, torch.ops.aten.gru.input, torch.ops.aten.rnn_tanh.input)
FLOAT = lambda name, *axes: TensorSpec(name, "float32", (BATCH, *axes))


@pytest.fixture(scope="module")
def mixed_run(tmp_path_factory):
    """A network for numbers, words, some of them rare, truth values and missing cells."""
    folder, rng = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    lines = ["label,size,color,member,bought"]
    for i in range(120):
        cells = [f"{rng.normal():.3f}", ["red", "green", "deep blue"][rng.integers(3)], ["yes", "no"][rng.integers(2)]]
        if i % 9 == 0:
            cells[i % 3] = "n/a"
        lines.append(",".join([["a", "b"][rng.integers(2)], *cells, "1" if rng.random() < 0.5 else "0"]))
    (folder / "mixed.csv").write_text("\n".join(lines))
    return fieldguide.fit(folder / "mixed.csv", target="bought", model="mlp-s", out=folder / "run", settings=SETTINGS)


@pytest.fixture(scope="module")
def mixed_export(mixed_run, tmp_path_factory):
    return mixed_run.export("torch", out=tmp_path_factory.mktemp("export") / "export")


def test_a_program_equals_the_run_on_raw_rows(mixed_run, mixed_export):
    found = json.loads((mixed_export.path / "verify.json").read_text())
    assert mixed_export.passed and found["agreement"] == 1 and found["largest"] < 1e-5 and found["rows"] >= 8
    assert "torch" in found["versions"] and "onnxruntime" not in found["versions"]
    names = {path.name for path in mixed_export.path.iterdir()}
    assert {"model.pt2", "run.py", "signature.json", "export.json", "README.md", "requirements.txt"} < names
    assert len((mixed_export.path / "run.py").read_text().splitlines()) < 150


@pytest.mark.slow
def test_the_program_runs_alone_with_unknown_and_missing_values(mixed_run, mixed_export, tmp_path):
    rows = [
        {"label": "a", "size": 0.5, "color": "red", "member": "yes"},
        {"label": "z", "size": None, "color": "", "member": "no"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-E", str(mixed_export.path / "run.py"), str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    got = [json.loads(line) for line in done.stdout.splitlines()]
    want = [{k: v for k, v in one.items() if k != "input"} for one in mixed_run.predict(rows)]
    assert len(got) == 2 and Comparison(1e-5).compare(want, got)[1] == "", done.stderr


def test_the_file_has_no_pickle_and_no_path(mixed_export):
    with zipfile.ZipFile(mixed_export.path / "model.pt2") as file:
        content = {name: file.read(name) for name in file.namelist()}
    assert not any(data[:1] == b"\x80" or data[:2] == b"PK" for data in content.values())
    assert not any(
        b'"use_pickle": true' in data or str(Path(fieldguide.__file__).parent).encode() in data for data in content.values()
    )


@pytest.mark.slow
def test_other_codes_of_words_are_found(mixed_run, mixed_export):
    path = mixed_export.path / "export.json"
    before, about = path.read_text(), json.loads(path.read_text())
    known = next(one["codes"] for one in about["graphs"]["model"]["inputs"] if one["codes"])["color"]["known"]
    known.update({word: 1 + code % len(known) for word, code in known.items()})
    try:
        path.write_text(json.dumps(about))
        found = verify(mixed_run, mixed_export.path, mixed_run.record["data"]["source"], form=TorchFormat())
    finally:
        path.write_text(before)
    assert not found.passed and found.problems


@pytest.mark.slow
def test_a_failed_export_is_renamed_and_exits_with_3(mixed_run, tmp_path, monkeypatch, capsys):
    whole = TorchFormat.write

    def write_wrong(self, graph, path, precision):
        about = whole(self, graph, path, precision)
        about["outputs"][-1]["names"].reverse()
        return about

    monkeypatch.setattr(TorchFormat, "write", write_wrong)
    argv = ["fieldguide", "export", str(mixed_run.path), "--to", "torch", "--out", str(tmp_path / "e")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 3 and (tmp_path / "e.unverified" / "verify.json").exists()
    assert "must not be used" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_run", "text_run"])
def test_other_programs_equal_the_run(name, request, tmp_path):
    done = request.getfixturevalue(name).export("torch", out=tmp_path / "export")
    assert done.passed and done.verification.largest < 1e-4, done.verification.problems


@pytest.mark.slow
def test_answers_of_a_loop_are_those_of_the_run(tmp_path):
    rows = "\n".join(
        json.dumps({"text": f"the {word} of the function number {i} is"}) for i, word in enumerate("name sum value".split())
    )
    (tmp_path / "rows.jsonl").write_text(rows)
    done = export(GOLDEN / "v1-text-generation", "torch", data=str(tmp_path / "rows.jsonl"), out=tmp_path / "export")
    assert done.passed and (done.path / "loop.json").exists(), done.verification.problems


def test_programs_keep_float32(mixed_run, tmp_path):
    with pytest.raises(SettingsError, match="format torch have the precision float32, not int8"):
        mixed_run.export("torch", out=tmp_path / "export", precision="int8")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ axes


@pytest.mark.parametrize("cell", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
@pytest.mark.parametrize("bidirectional, batch_first", [(False, True), (True, True), (True, False)])
def test_recurrent_networks_have_dynamic_lengths(cell, bidirectional, batch_first):
    class Recurrent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = cell(4, 5, num_layers=2, bidirectional=bidirectional, batch_first=batch_first)

        def forward(self, *tensors):
            x = tensors[0] if batch_first else tensors[0].transpose(0, 1)
            out, state = self.layers(x)
            hidden, memory = state if isinstance(state, tuple) else (state, state)
            return (out if batch_first else out.transpose(0, 1)).contiguous(), hidden.transpose(0, 1), memory.transpose(0, 1)

    torch.manual_seed(0)
    kernels = [dict(operator.py_kernels) for operator in RECURRENT]
    graph = Graph(Recurrent().eval(), (FLOAT("x", Axis("steps"), Axis("width", 4)),), ("out", "hidden", "memory"), ())
    call = trace(graph).module()
    compare_sizes(graph, lambda batch: [tensor.detach().numpy() for tensor in call(*batch.values())])
    assert [dict(operator.py_kernels) for operator in RECURRENT] == kernels  # torch is as before


def test_a_frozen_axis_is_an_error(tmp_path):
    class Frozen(torch.nn.Module):
        def forward(self, *tensors):
            return (tensors[0].reshape(3, 4) * 2,)

    with pytest.raises(ExportError, match="fails for x 1x4, so a dynamic axis became fixed"):
        graph = Graph(Frozen(), (FLOAT("x", Axis("width", 4)),), ("y",), ())
        TorchFormat().write(graph, tmp_path / "model.pt2", "float32")


def test_a_shorter_axis_than_allowed_is_an_error():
    class Short(torch.nn.Module):
        def forward(self, *tensors):
            return (tensors[0] * 2 if tensors[0].shape[1] < 30 else tensors[0],)

    with pytest.raises(ExportError, match="the axis 'steps' of 'x' is at most 29 in the graph"):
        trace(Graph(Short(), (FLOAT("x", Axis("steps", most=40)),), ("y",), ()))
    trace(Graph(Short(), (FLOAT("x", Axis("steps", most=29)),), ("y",), ()))


# ------------------------------------------------------------------------------------------------ texts


def test_columns_of_texts_and_of_lists_become_codes():
    names = {"np": np}
    exec((Path(fieldguide.__file__).parent / "exporting/runners/columns.py").read_text(), names)
    known = {"known": {"a": 1, "b": 2, "": 9}, "unknown": 0}
    inputs = [
        {"name": "raw", "columns": ["size", "age"], "codes": {}},
        {"name": "codes", "columns": ["x", "y"], "codes": {"x": known, "y": known}},
        {"name": "history", "columns": ["items"], "codes": {"items": known}},
        {"name": "pixels", "columns": [], "codes": {}},
    ]
    batch = {"size": np.array([1.0, 2.0]), "age": np.array([3.0, 4.0]), "pixels": np.zeros((2, 3, 3))}
    batch |= {"x": np.array(["a", "z"]), "y": np.array(["b", ""]), "items": np.array([["a", "b", ""], ["q", "a", "a"]], object)}
    raw, codes, history, pixels = names["join_columns"](batch, inputs)
    assert raw.tolist() == [[1, 3], [2, 4]] and codes.tolist() == [[1, 2], [0, 9]] and pixels.shape == (2, 3, 3)
    assert history.tolist() == [[1, 2, 9], [0, 1, 1]] and history.dtype == codes.dtype == np.int64


@pytest.mark.slow
def test_recommendations_of_a_program_are_those_of_the_run(tmp_path):
    rng, lines = np.random.default_rng(0), ["user,item,time"]
    for user in range(40):
        lines += [f"u{user},i{rng.integers(20)},{1_000 * user + step}" for step in range(int(rng.integers(3, 9)))]
    (tmp_path / "events.csv").write_text("\n".join(lines) + "\n")
    settings = {**SETTINGS, "task.length": 6}
    run = fieldguide.fit(
        tmp_path / "events.csv", task="recommendation", model="sasrec-test", out=tmp_path / "run", settings=settings
    )
    done = run.export("torch", out=tmp_path / "export")
    assert done.passed and done.verification.rows >= 30, done.verification.problems

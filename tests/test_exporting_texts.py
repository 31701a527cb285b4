"""Exports of embeddings, reranking and recurrent networks, compared with the run in a process without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch

import fieldguide
from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.exporting import onnx_file
from fieldguide.exporting.graph import BATCH, Graph
from fieldguide.exporting.verify import verify

SETTINGS = {"steps": 2, "evaluate": 2, "precision": "float32", "task.vocab_size": 300}


def run_rows(folder, rows, tmp_path):
    """Return the records that the program of an export prints for rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    done = subprocess.run([sys.executable, "-E", str(folder / "run.py"), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_folder(done):
    assert done.passed, done.verification.problems
    assert done.verification.largest < 1e-5 and done.verification.rows >= 8
    assert len((done.path / "run.py").read_text().splitlines()) < 150


def change_values(folder, **values):
    path = folder / "export.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.slow
def test_vectors_are_equal_after_their_prompts(tmp_path):
    settings = SETTINGS | {"batch": 32, "task.query_prompt": "query: ", "task.passage_prompt": "passage: "}
    run = fieldguide.fit("helpdesk", model="bert-test", out=tmp_path / "run", settings=settings)
    done = run.export(out=tmp_path / "export")
    check_folder(done)
    text, anchor = "the printer is jammed", run.task.options.anchor
    ours = [run.predict(text, query=query)[0]["vector"] for query in (True, False)]
    rows = [{anchor: text}, {"text": text}, {run.task.options.positive: text}]
    theirs = [record["vector"] for record in run_rows(done.path, rows, tmp_path)]
    np.testing.assert_allclose(theirs, [ours[0], ours[1], ours[1]], atol=1e-6)
    assert np.abs(np.subtract(*ours)).max() > 1e-3
    change_values(done.path, prompts=dict.fromkeys(run.task.prompts, ""))
    assert verify(run, done.path, "helpdesk").problems


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["pointwise", "listwise"])
def test_ranks_are_equal(loss, tmp_path):
    run = fieldguide.fit(
        "shortlist", model="bert-test", out=tmp_path / "run", settings=SETTINGS | {"batch": 8, "task.loss": loss}
    )
    done = run.export(out=tmp_path / "export")
    check_folder(done)
    query, passage = run.task.column, run.task.second
    rows = [{query: q, passage: p} for q in ("how long is it", "How  long is it") for p in ("ten days", "a red door", "ten")]
    ours, theirs = run.predict(pl.DataFrame(rows)), run_rows(done.path, rows, tmp_path)
    assert [record["rank"] for record in theirs] == [record["rank"] for record in ours]
    assert sorted(record["rank"] for record in theirs) == [1, 2, 3, 4, 5, 6]  # both are the same query
    assert [record["score"] for record in theirs] == pytest.approx([record["score"] for record in ours], abs=1e-5)
    frame = json.loads((done.path / "export.json").read_text())["frame"]
    change_values(done.path, frame=frame | {"between": []})
    assert verify(run, done.path, "shortlist").problems


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bidirectional", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_networks_without_gates_have_dynamic_lengths(bidirectional, bias):
    """`check_sizes` compares the graph with the network for other lengths than the traced one."""

    class Tanh(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.RNN(4, 5, num_layers=2, bidirectional=bidirectional, bias=bias, batch_first=True)

        def forward(self, *tensors):
            out, state = self.layers(tensors[0])
            return out, state.transpose(0, 1)

    torch.manual_seed(0)
    steps = TensorSpec("x", "float32", (BATCH, Axis("steps", least=1), Axis("width", 4)))
    graph = Graph(Tanh().eval().requires_grad_(False), (steps,), ("out", "state"), ("tables",))
    model = onnx_file.trace(graph)
    onnx_file.check_sizes(graph, model)
    assert [node.op_type for node in model.graph.node].count("RNN") == 2

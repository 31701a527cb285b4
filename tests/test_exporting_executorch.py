"""Exports as programs of ExecuTorch. What runs them needs `pip install executorch`, and is skipped without it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from fieldguide.core.errors import SettingsError
from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.exporting import executorch_file
from fieldguide.exporting.executorch_file import ExecutorchFormat, limit_axes, lower, read_limits, write_program
from fieldguide.exporting.executorch_operators import keep_float64, mean_float64, sort_all, sum_float64
from fieldguide.exporting.export import export
from fieldguide.exporting.graph import BATCH, ExportError, Graph
from fieldguide.exporting.torch_file import trace
from fieldguide.exporting.verify import verify

GOLDEN = Path(__file__).parent / "golden" / "v2-tabular-classification"
needs_executorch = pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="executorch is not installed")
FLOAT = lambda name, *axes: TensorSpec(name, "float32", (BATCH, *axes))


class Call(torch.nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return (self.function(tensors[0]),)


class Recurrent(torch.nn.Module):
    """All outputs and the last state of two layers."""

    def __init__(self, cell, bidirectional=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = cell(4, 5, num_layers=2, bidirectional=bidirectional, batch_first=True)

    def forward(self, *tensors):
        out, state = self.layers(tensors[0])
        parts = state if isinstance(state, tuple) else (state,)
        return out.contiguous(), *(part.transpose(0, 1).contiguous() for part in parts)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(SettingsError, match=r"needs executorch.*: pip install 'fieldguide\[executorch\]'"):
        export(GOLDEN, "executorch", out=tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_other_formats_are_named(tmp_path):
    with pytest.raises(SettingsError, match="Formats are onnx, torch, executorch, huggingface, gguf"):
        export(GOLDEN, "executorsh", out=tmp_path / "export")
    with pytest.raises(SettingsError, match="format executorch have the precision float32, not int8"):
        export(GOLDEN, "executorch", out=tmp_path / "export", precision="int8")


def test_all_axes_have_limits():
    axes = (BATCH, Axis("height", least=2), Axis("samples", multiple=300), Axis("tokens", most=5), Axis("width", 3))
    graph = Graph(torch.nn.Identity(), (TensorSpec("x", "float32", axes),), ("y",), ())
    limits = lambda rows: [axis.size or axis.most for axis in limit_axes(graph, rows).inputs[0].axes]
    assert limits(64) == [64, 2048, 1800, 5, 3] and limits(1) == [1, 2048, 1800, 5, 3]
    assert limit_axes(graph, 1).inputs[0].axes[0].size == 1


@pytest.mark.parametrize("dims", [[1], [-1, 0], [0, 1, 2], None])
@pytest.mark.parametrize("keepdim", [False, True])
def test_sums_in_float64_are_products_with_ones(dims, keepdim):
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for ours, theirs in ((sum_float64, torch.sum), (mean_float64, torch.mean)):
        torch.testing.assert_close(ours(x, dims, keepdim), theirs(x, dims, keepdim), rtol=1e-14, atol=1e-14)
    assert sum_float64(x.float(), dims) is NotImplemented and mean_float64(x, dims, dtype=torch.float32) is NotImplemented


def test_numbers_become_tensors_of_float64_where_float32_rounds_them():
    graph = Graph(Call(lambda x: (x.double() * 0.1 + 0.5) / 3.0 - 0.7), (FLOAT("x", Axis("width", 4)),), ("y",), ())
    program = trace(graph)
    keep_float64(program.graph_module)
    filled = [node.args[1] for node in program.graph.nodes if node.target is torch.ops.aten.full.default]
    assert filled == [0.1, 0.7]
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(program.module()(x)[0], graph.module(x)[0], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ with executorch


@needs_executorch
@pytest.mark.slow
@pytest.mark.parametrize("name", ["iris_run", "digits_run", "text_run"])
def test_programs_equal_the_run_on_raw_rows(name, request, tmp_path):
    """The text classifier is recurrent: it takes one text at once, and session.py splits batches."""
    done = request.getfixturevalue(name).export("executorch", out=tmp_path / "export")
    found = done.verification
    assert done.passed and found.agreement == 1 and found.largest < 1e-5 and found.batches == [1, 7, 64], found.problems
    assert {"torch", "executorch"} < set(found.versions)
    names = {path.name for path in done.path.iterdir()}
    assert {"model.pte", "run.py", "session.py", "signature.json", "export.json", "README.md", "requirements.txt"} < names
    assert b"site-packages" not in (done.path / "model.pte").read_bytes()
    about = json.loads((done.path / "export.json").read_text())["graphs"]["model"]
    assert about["backend"] == "XNNPACK"
    assert about["inputs"][0]["axes"][0] == ["batch", 1, 1 if name == "text_run" else about["inputs"][0]["axes"][0][2]]


@needs_executorch
@pytest.mark.slow
def test_other_classes_and_longer_texts_are_found(text_run, tmp_path):
    done = text_run.export("executorch", out=tmp_path / "export")
    path = done.path / "export.json"
    about = json.loads(path.read_text())
    named = next(one for one in about["graphs"]["model"]["outputs"] if "names" in one)
    named["names"] = named["names"][1:] + named["names"][:1]
    path.write_text(json.dumps(about))
    found = verify(text_run, done.path, text_run.record["data"]["source"], form=ExecutorchFormat())
    assert not found.passed and found.problems
    named["names"] = named["names"][-1:] + named["names"][:-1]
    for one in about["graphs"]["model"]["inputs"]:
        one["axes"][1][2] = 3
    path.write_text(json.dumps(about))
    with pytest.raises(ExportError, match=r"tokens: the axis tokens is .*, but this program takes 1 to 3"):
        verify(text_run, done.path, text_run.record["data"]["source"], form=ExecutorchFormat())


@needs_executorch
@pytest.mark.slow
@pytest.mark.parametrize("cell", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_operators_become_loops_over_any_length(cell, bidirectional, tmp_path):
    outputs = ("out", "state", "memory")[: 3 if cell is torch.nn.LSTM else 2]
    axes = (Axis("steps", most=20), Axis("width", 4))
    graph = Graph(Recurrent(cell, bidirectional).eval(), (FLOAT("x", *axes),), outputs, ())
    limited = write_program(graph, tmp_path / "model.pte", "portable")
    assert list(map(str, limited.inputs[0].axes)) == ["batch=1", "steps<=20", "width=4"]
    program = executorch_file.load_program(tmp_path / "model.pte")
    for steps in (1, 20, 12):
        x = torch.randn(1, steps, 4, generator=torch.Generator().manual_seed(steps))
        for found, want in zip(executorch_file.execute(program, [x]), graph.module(x)):
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


@needs_executorch
@pytest.mark.slow
@pytest.mark.parametrize("backend", executorch_file.BACKENDS)
def test_sums_and_numbers_keep_float64(backend, tmp_path):
    """A difference of two sums that float32 does not hold."""
    function = lambda x: (x.double() * 0.1 + 1e6).sum(1) - (x.double() * 0.1).sum(1) - 9e6
    graph = Graph(Call(function), (FLOAT("x", Axis("width", 9)),), ("y",), ())
    limited = write_program(graph, tmp_path / "model.pte", backend)
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    program = executorch_file.load_program(tmp_path / "model.pte")
    (found,) = executorch_file.execute(program, [x])
    assert str(limited.inputs[0].axes[0]) == "batch<=64" and (found - function(x)).abs().max() < 1e-8


@needs_executorch
@pytest.mark.slow
def test_large_inputs_enter_in_smaller_batches(monkeypatch, tmp_path):
    monkeypatch.setattr(executorch_file, "MAX_PLANNED_BYTES", 40_000)
    graph = Graph(Call(lambda x: x.double().cumsum(1).float()), (FLOAT("x", Axis("steps", most=100)),), ("y",), ())
    limited = write_program(graph, tmp_path / "model.pte", "portable")
    rows = limited.inputs[0].axes[0].most
    assert 1 < rows < 64 and lower(trace(limited, is_limited=True), "portable")[1] <= 40_000
    inputs, outputs = ExecutorchFormat().describe(graph, tmp_path / "model.pte")
    assert inputs[0].axes == (f"batch<={rows}", "steps<=100") and outputs[0].axes == ("batch", "dynamic")


def test_the_limits_of_a_program_are_read():
    class Method:
        def input_tensor_meta(self, number):
            return self

        def sizes(self):
            return [15, 9, 4]

    build = lambda most: Graph(torch.nn.Identity(), (FLOAT("x", Axis("steps", most=most), Axis("width", 4)),), ("y",), ())
    limited = read_limits(limit_axes(build(9), 64), Method())
    assert [str(axis) for axis in limited.inputs[0].axes] == ["batch<=15", "steps<=9", "width=4"]
    assert len(limited.build_example(0, 20)["x"]) == 15
    with pytest.raises(ExportError, match="the axis 'steps' of 'x' is at most 9 in the program"):
        read_limits(limit_axes(build(10), 64), Method())


@pytest.mark.parametrize("descending", [False, True])
def test_sorting_is_choosing_all_values(descending):
    x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(sort_all(x, 1, descending, stable=True), x.sort(1, descending)):
        assert torch.equal(ours, theirs)


@needs_executorch
@pytest.mark.slow
def test_values_are_sorted_along_an_axis_of_any_size(tmp_path):
    graph = Graph(Call(lambda x: x.sort(1, descending=True).values), (FLOAT("x", Axis("a", most=20)),), ("y",), ())
    write_program(graph, tmp_path / "model.pte", "portable")


@needs_executorch
@pytest.mark.slow
def test_missing_kernels_are_named():
    executorch_file.check_kernels({"aten::add.out", "aten::topk.values"})
    with pytest.raises(ExportError, match=r"ExecuTorch has no kernel for aten::cummin\.out, aten::sort\.values\."):
        executorch_file.check_kernels({"aten::add.out", "aten::sort.values", "aten::cummin.out"})


@needs_executorch
@pytest.mark.slow
def test_an_operator_without_a_kernel_is_an_error(tmp_path):
    with pytest.raises(ExportError, match="ExecuTorch cannot"):
        graph = Graph(Call(lambda x: torch.linalg.inv(x)), (FLOAT("x", Axis("a", 3), Axis("b", 3)),), ("y",), ())
        ExecutorchFormat().write(graph, tmp_path / "model.pte", "float32")
    assert not list(tmp_path.iterdir())

"""Static int8 of image networks: weights and activations in 8 bits, calibrated with images of the training part."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from fieldguide.cli.print_export import print_export
from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.exporting.builders import build_graph
from fieldguide.exporting.calibration import choose_images, quantize_graph
from fieldguide.exporting.export import Export
from fieldguide.exporting.graph import BATCH, Graph
from fieldguide.exporting.onnx_file import write_onnx
from fieldguide.exporting.requests import choose_rows
from fieldguide.exporting.verify import Verification

SIZES = (Axis("height", 12), Axis("width", 12), Axis("channels", 3))


class Small(torch.nn.Module):
    """Standardize pixels in float64, then a convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 5)

    def forward(self, *tensors):
        x = ((tensors[0].double() @ torch.eye(3, dtype=torch.float64)) / 255).float().permute(0, 3, 1, 2)
        return (self.linear(self.conv(x).relu().mean((2, 3))),)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a float32 graph, the same in int8, and pixels that were not used to calibrate it."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    graph = Graph(Small().eval().requires_grad_(False), (TensorSpec("pixels", "uint8", (BATCH, *SIZES), high=255),), ("y",), ())
    write_onnx(graph, folder / "float.onnx")
    rng = np.random.default_rng(0)
    for i in range(16):
        np.savez(folder / f"{i:02}.npz", pixels=rng.integers(0, 256, (1, 12, 12, 3), dtype=np.uint8))
    quantize_graph(folder / "float.onnx", folder / "int8.onnx", sorted(folder.glob("*.npz")))
    return folder / "float.onnx", folder / "int8.onnx", rng.integers(0, 256, (9, 12, 12, 3), dtype=np.uint8)


def test_outputs_are_close_to_those_in_float32(small):
    whole, quantized, pixels = small
    one, other = (onnxruntime.InferenceSession(str(path)).run(None, {"pixels": pixels})[0] for path in (whole, quantized))
    assert 0 < np.abs(one - other).max() < 0.03 * np.ptp(one, axis=1).max()


def test_layers_have_integer_weights_and_activations(small):
    """Weights are 7-bit multiples of a scale for each output channel; steps in float64 stay as they are."""
    whole, model = onnx.load(small[0]), onnx.load(small[1])
    floats = {tensor.name: numpy_helper.to_array(tensor) for tensor in whole.graph.initializer}
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    codes = [name for name in stored if name.endswith("_quantized") and stored[name].dtype == np.int8]
    assert len(codes) == 2 and not len(model.metadata_props)
    for name in codes:
        values, scale = stored[name].astype(float), stored[name.replace("_quantized", "_scale")]
        original = floats[name.removesuffix("_quantized")]
        axis = next(i for i, size in enumerate(original.shape) if size == len(scale))
        shape = [-1 if i == axis else 1 for i in range(original.ndim)]
        assert np.abs(values).max() <= 64 and len(scale) == original.shape[axis]
        assert (np.abs(values * scale.reshape(shape) - original) <= 0.51 * scale.reshape(shape)).all()
    made_by = {node.output[0]: node.op_type for node in model.graph.node}
    used = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(used) == 2 and all(made_by[name] == "DequantizeLinear" for node in used for name in node.input[:2])
    assert all(made_by.get(name) != "DequantizeLinear" for n in model.graph.node if n.op_type == "MatMul" for name in n.input)


def test_images_for_calibration_are_none_of_those_it_is_verified_with(digits_run):
    images, held_out = choose_images(digits_run, build_graph(digits_run)), choose_rows(digits_run, "digits")[0]
    assert len(images) == 128 and images.columns == held_out.columns
    column = images.columns[0]
    assert not set(images[column]) & set(held_out[column])


def test_other_networks_keep_their_activations(iris_run):
    assert choose_images(iris_run, build_graph(iris_run)) is None


@pytest.mark.slow
def test_an_image_classifier_in_int8_is_smaller_and_tells_its_loss(digits_run, tmp_path, capsys):
    done = digits_run.export(out=tmp_path / "export", precision="int8")
    found = json.loads((done.path / "verify.json").read_text())
    assert done.passed and found["quantized"] == "weights and activations in int8, calibrated with 128 images"
    before, after = found["scores"]["accuracy"]
    assert abs(before - after) < 0.02
    print_export(done, False)
    assert f"accuracy: {before:.4g} before, {after:.4g} as exported" in capsys.readouterr().out


def test_linear_models_of_images_keep_their_activations(digits_run, monkeypatch):
    """Histograms of gradients and distances to a memory need their precision."""
    graph = build_graph(digits_run)
    assert choose_images(digits_run, graph) is not None
    monkeypatch.setattr(digits_run, "card", replace(digits_run.card, solver="linear"))
    assert choose_images(digits_run, graph) is None


def test_what_to_do_if_answers_change_in_int8(tmp_path, capsys):
    found = Verification(
        False, 8, 0.1, 0.5, 0.01, [1], "digits", 1.0, ["row 1: label: '0' against '2'"], quantized="weights in int8"
    )
    print_export(Export(tmp_path, "onnx", False, found), False)
    said = capsys.readouterr().err
    assert "must not be used" in said and "weights in int8" in said and "--precision float32" in said

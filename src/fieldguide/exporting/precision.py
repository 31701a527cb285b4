"""Weights of ONNX graphs in fewer bits: stored in float16 or int8, computed with in float32.

Steps before and after the network, which need the range of float32 (logarithms of small powers, positions in large images), keep it.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Precision = Literal["float32", "float16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")
MIN_VALUES = 1024  # of tensors that are compressed; the rest is small
MAX_FLOAT16 = 65504.0
LEVELS = 127  # of int8, on each side of 0
LAST_AXIS = ("MatMul",)  # operators whose weights have output channels on the last axis


def compress_weights(onnx: Any, model: Any, precision: Precision) -> None:
    """Store the large weights of a model in fewer bits: int8 with one scale for each output channel."""
    users: dict[str, Any] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, node)
    nodes, stored = [], []
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        is_large = values.dtype == np.float32 and values.size >= MIN_VALUES and values.ndim > 1
        if not is_large or tensor.name not in users or np.abs(values).max() > MAX_FLOAT16:
            stored.append(tensor)
            continue
        name = f"{tensor.name}_{precision}"
        if precision == "float16":
            stored.append(onnx.numpy_helper.from_array(values.astype(np.float16), name))
            nodes.append(onnx.helper.make_node("Cast", [name], [tensor.name], to=onnx.TensorProto.FLOAT))
        else:
            axis = values.ndim - 1 if users[tensor.name].op_type in LAST_AXIS else 0
            codes, scale = quantize(values, axis)
            stored += [onnx.numpy_helper.from_array(codes, name), onnx.numpy_helper.from_array(scale, f"{name}_scale")]
            nodes.append(onnx.helper.make_node("DequantizeLinear", [name, f"{name}_scale"], [tensor.name], axis=axis))
    del model.graph.initializer[:]
    model.graph.initializer.extend(stored)
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


def quantize(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 codes and the float32 scale of each channel: values are about codes * scale."""
    others = tuple(i for i in range(values.ndim) if i != axis)
    scale = np.abs(values).max(others) / LEVELS
    scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    return np.rint(values / scale.reshape(shape)).astype(np.int8), scale

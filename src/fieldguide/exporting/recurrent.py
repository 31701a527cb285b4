"""The recurrent operator that torch's exporter lacks: tanh networks without gates (Elman 1990) as ONNX `RNN`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def build_translations() -> dict[Any, Callable[..., Any]]:
    """Return operators of torch and the functions that add those of ONNX to a graph. Imports onnxscript."""
    import onnxscript

    op: Any = onnxscript.opset20  # its types exclude the constants that it accepts

    def translate_rnn(
        values: Any,
        state: Any,
        params: Sequence[Any],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Any, Any]:
        """Add one `RNN` per layer. Shapes: values T B I (B T I if `batch_first`), state L*D B H; L layers, D directions."""
        directions, size = 2 if bidirectional else 1, 4 if has_biases else 2
        values = op.Transpose(values, perm=[1, 0, 2]) if batch_first else values
        last = []
        for layer in range(num_layers):
            own = [params[(layer * directions + i) * size :][:size] for i in range(directions)]
            stack = lambda tensors: op.Concat(*(op.Unsqueeze(tensor, [0]) for tensor in tensors), axis=0)
            biases = stack([op.Concat(p[2], p[3], axis=0) for p in own]) if has_biases else None
            first = op.Slice(state, [layer * directions], [(layer + 1) * directions], axes=[0])
            out, final = op.RNN(
                values,
                stack([p[0] for p in own]),
                stack([p[1] for p in own]),
                biases,
                None,
                first,
                activations=["Tanh"] * directions,
                direction="bidirectional" if bidirectional else "forward",
                hidden_size=int(own[0][1].shape[1]),
            )
            values = op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), [0, 0, -1])  # T D B H -> T B D*H
            last.append(final)
        state = op.Concat(*last, axis=0) if num_layers > 1 else last[0]
        return (op.Transpose(values, perm=[1, 0, 2]) if batch_first else values), state

    return {torch.ops.aten.rnn_tanh.input: translate_rnn}

"""Operators that ExecuTorch computes otherwise than torch, in terms of those that it computes alike.

- Its sums of float64 are added in float32, and numbers in float64 expressions become float32. Steps before the network need float64:
  resized images differ by gray levels otherwise.
- It has no recurrent operators: they become a `scan`, a loop over the steps of any length.
- It has no sort: all values are the largest, or the smallest, in order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

ATEN = torch.ops.aten
SCALAR_OPERATORS = (ATEN.add.Tensor, ATEN.sub.Tensor, ATEN.mul.Tensor, ATEN.div.Tensor)


def keep_float64(module: torch.fx.GraphModule) -> None:
    """Turn numbers in expressions of float64 into tensors of float64, unless float32 holds them exactly."""
    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in list(part.graph.nodes):
                if node.target in SCALAR_OPERATORS and node.meta["val"].dtype == torch.float64:
                    replace_scalar(part.graph, node)
            part.recompile()


def replace_scalar(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Replace the number in an expression by a tensor."""
    first, second, *rest = node.args
    if not isinstance(second, float) or struct.unpack("f", struct.pack("f", second))[0] == second:
        return
    with graph.inserting_before(node):
        value = graph.call_function(ATEN.full.default, ([], second), {"dtype": torch.float64})
    value.meta["val"] = node.meta["val"].new_empty(())
    node.args = (first, value, *rest)


def sum_float64(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """Add values of float64 by a matrix product with ones, whose sums are in float64."""
    if x.dtype != torch.float64 or dtype not in (None, torch.float64) or not x.dim():
        return NotImplemented
    places = sorted(place % x.dim() for place in dims or range(x.dim()))
    for place in places:
        moved = x.movedim(place, -1)  # ... n
        x = (moved @ torch.ones(moved.shape[-1], 1, dtype=x.dtype)).movedim(-1, place)
    return x if keepdim else x.squeeze(places)


def mean_float64(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """Average values of float64."""
    total = sum_float64(x, dims, keepdim, dtype=dtype)
    if total is NotImplemented:
        return total
    count: Any = 1
    for place in dims or range(x.dim()):
        count = count * x.shape[place]
    return total / count


def sort_all(x: Tensor, dim: int = -1, descending: bool = False, *, stable: bool | None = None) -> tuple[Tensor, Tensor]:
    """Sort as `topk` of all values; those that are equal may be in another order."""
    del stable
    values, index = x.topk(x.shape[dim], dim, largest=descending, sorted=True)
    return values, index


def scan_gru(values: Tensor, state: Tensor, params: list[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    """Compute a GRU (Cho et al. 2014, arXiv:1406.1078) as torch does: the reset gate acts on the product, not on the state."""

    def step(carry: tuple[Tensor], gates: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[tuple[Tensor], Tensor]:
        (hidden,) = carry  # B H
        reset, update, new = gates.chunk(3, 1)
        old_reset, old_update, old_new = linear(hidden, weight, bias).chunk(3, 1)
        new = (new + (reset + old_reset).sigmoid() * old_new).tanh()
        hidden = (hidden - new) * (update + old_update).sigmoid() + new
        return (hidden,), hidden

    out, (last,) = scan_layers(step, values, (state,), params, *options)
    return out, last


def scan_rnn(values: Tensor, state: Tensor, params: list[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    """Compute a network without gates (Elman 1990)."""

    def step(carry: tuple[Tensor], given: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[tuple[Tensor], Tensor]:
        hidden = (given + linear(carry[0], weight, bias)).tanh()  # B H
        return (hidden,), hidden

    out, (last,) = scan_layers(step, values, (state,), params, *options)
    return out, last


def scan_lstm(values: Tensor, state: list[Tensor], params: list[Tensor], *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute an LSTM (Hochreiter and Schmidhuber 1997) with forget gates."""

    def step(
        carry: tuple[Tensor, Tensor], gates: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        hidden, cell = carry  # B H
        enter, forget, new, leave = (gates + linear(hidden, weight, bias)).chunk(4, 1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        hidden = leave.sigmoid() * cell.tanh()
        return (hidden, cell), hidden

    out, (hidden, cell) = scan_layers(step, values, (state[0], state[1]), params, *options)
    return out, hidden, cell


def scan_layers(
    step: Callable[..., Any],
    values: Tensor,
    states: tuple[Tensor, ...],
    params: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a step over all times, layers and directions; return all outputs and the last states, as torch's operators do.

    Shapes: values T B I (B T I if `batch_first`), states L*D B H; L layers, D directions.
    """
    del dropout, train  # of training only
    values = values.transpose(0, 1) if batch_first else values
    directions, size = 2 if bidirectional else 1, 4 if has_biases else 2
    last: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            weight, recurrent, *biases = params[place * size :][:size]
            bias, recurrent_bias = biases or (None, None)
            given = linear(values.flip(0) if direction else values, weight, bias)  # T B G*H
            first = tuple(state[place] for state in states)
            final, out = scan_steps(step, first, given, recurrent, recurrent_bias)
            last.append(final)
            outputs.append(out.flip(0) if direction else out)
        values = torch.cat(outputs, 2)
    return (values.transpose(0, 1) if batch_first else values), tuple(torch.stack(parts) for parts in zip(*last))


def scan_steps(step: Callable[..., Any], first: tuple[Tensor, ...], given: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """Run a step over times, and return the last carry and all outputs."""
    from torch._higher_order_ops.scan import scan

    def run(carry: tuple[Tensor, ...], one: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        after, out = step(carry, one, weight, bias)
        return after, out.clone()  # an output may not be a carry

    return scan(run, first, given)


RECURRENT: dict[Any, Callable[..., Any]] = {
    ATEN.lstm.input: scan_lstm,
    ATEN.gru.input: scan_gru,
    ATEN.rnn_tanh.input: scan_rnn,
}


def list_decompositions() -> dict[Any, Callable[..., Any]]:
    """Return operators and the functions that replace them."""
    return {
        **RECURRENT,
        ATEN.sum.dim_IntList: sum_float64,
        ATEN.mean.dim: mean_float64,
        ATEN.sort.default: sort_all,
        ATEN.sort.stable: sort_all,
    }

"""What torch's kernels do that shapes do not show: buffers inside of a kernel, floating-point operations, bytes.

The buffers are those of the CPU kernels of oneDNN and of fused recurrent layers, found by measuring resident memory around
single operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from fieldguide.planning.records import Work

aten = torch.ops.aten
BLOCK = 16  # channels per block of oneDNN's layouts with 512-bit vectors
MOST_COLORS = 4  # channels of an input that the backward pass reads as it is
CPU_ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)
RECURRENT = (aten.mkldnn_rnn_layer.default, aten.mkldnn_rnn_layer_backward.default)
WHOLE: set[Any] = set()  # operations that are recorded as one although torch could decompose them
KINDS: dict[Any, str] = {
    aten.convolution: "conv",
    aten.convolution_backward: "conv",
    aten.mm: "matmul",
    aten.addmm: "matmul",
    aten.bmm: "matmul",
    aten.baddbmm: "matmul",
    aten.mkldnn_rnn_layer: "recurrent",
    aten.mkldnn_rnn_layer_backward: "recurrent",
}
Buffer = tuple[str, str, int]  # "allocate" | "release" | "output", name or number of the output, bytes


def nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def blocked(x: Tensor, axis: int = 1) -> int:
    """Return the bytes of a tensor in oneDNN's layout, which pads channels to whole blocks."""
    channels = x.shape[axis]
    return nbytes(x) // max(channels, 1) * (-(-channels // BLOCK) * BLOCK)


def buffers(func: Any, args: tuple, outputs: list[Tensor]) -> Iterator[Buffer]:
    """Yield the buffers inside of an operation in order of allocation and release, between its outputs."""
    if func is aten.convolution.default:
        yield from convolution_buffers(args, outputs)
    elif func is aten.convolution_backward.default:
        yield from convolution_backward_buffers(args, outputs)
    elif func is RECURRENT[1]:
        yield from recurrent_backward_buffers(args, outputs)


def convolution_buffers(args: tuple, outputs: list[Tensor]) -> Iterator[Buffer]:
    x, weight, transposed = args[0], args[1], args[6]
    plain = not (is_channels_last(x) or is_channels_last(weight))
    if x.ndim != 4 and not plain:
        return
    yield "allocate", "weight", blocked(weight, 1 if transposed else 0)
    if plain:
        if x.shape[1] >= BLOCK // 2:
            yield "allocate", "input", blocked(x)
        yield "allocate", "result", blocked(outputs[0])
        if x.shape[1] >= BLOCK // 2:
            yield "release", "input", 0
    yield "release", "weight", 0
    yield "output", "0", 0


def convolution_backward_buffers(args: tuple, outputs: list[Tensor]) -> Iterator[Buffer]:
    grad, x, weight, mask = args[0], args[1], args[2], args[-1]
    plain = not (is_channels_last(x) or is_channels_last(weight))
    if mask[0]:
        if plain:
            yield "allocate", "grad", blocked(grad)
        yield "allocate", "weight", blocked(weight, 0)
        if plain:
            yield "allocate", "result", blocked(x)
            yield "release", "grad", 0
        yield "release", "weight", 0
        yield "output", "0", 0
        if plain:
            yield "release", "result", 0
    if mask[1]:
        copied = plain and x.shape[1] > MOST_COLORS
        if copied:
            yield "allocate", "input", blocked(x)
        if plain:
            yield "allocate", "grad", blocked(grad)
        yield "allocate", "update", blocked(weight, 0)
        if copied:
            yield "release", "input", 0
        if plain:
            yield "release", "grad", 0
        yield "output", str(int(bool(mask[0]))), 0


# Fused recurrent layers

WRITTEN_SHARE = 0.75  # of the workspace; the rest is never written, so it takes no memory


def recurrent_workspace(rows: int, steps: int, width: int, hidden: int, size: int) -> int:
    """Return the bytes that oneDNN keeps of an LSTM layer for its backward pass.

    `width` is that of the input, `size` the bytes of a number. A state has the larger of the two widths, rounded to lines of the
    cache; six states are kept for each step and the one before the first, and gates and cell states in float32.
    """
    line = 64 // size
    state = -(-max(width, hidden) // line) * line
    state += line if state % 256 == 0 else 0  # so that rows do not compete for the same part of the cache
    inner = -(-hidden // line) * line
    if size < 4:
        return int(WRITTEN_SHARE * rows * ((steps + 1) * 20 * state + steps * 22 * inner))
    return int(WRITTEN_SHARE * 4 * rows * ((steps + 1) * (6 * state + 2 * (inner + line) + 2 * inner) + steps * 5 * inner))


def shape_recurrent_layer(
    x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, hx: Tensor, cx: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """Return the outputs of one fused layer of oneDNN with their true sizes (torch's fake kernel has no workspace)."""
    _reverse, _sizes, _mode, hidden, _layers, _bias, _both, _first, train = args
    steps, rows = x.shape[:2]
    output = x.new_empty(steps, rows, hidden)
    workspace = recurrent_workspace(rows, steps, x.shape[2], hidden, x.element_size()) if train else 0
    return output, hx.new_empty(hx.shape), cx.new_empty(cx.shape), x.new_empty(workspace, dtype=torch.uint8)


def shape_recurrent_layer_backward(
    x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, hx: Tensor, cx: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """Return the gradients of a fused layer; both biases have the same one. (For want of a fake kernel, torch would run it.)"""
    grads = [y.new_empty(y.shape) for y in (x, w0, w1, w2, hx, cx)]
    return (*grads[:4], grads[3], *grads[4:])


def recurrent_backward_buffers(args: tuple, outputs: list[Tensor]) -> Iterator[Buffer]:
    for number, _ in enumerate(outputs):
        yield "output", str(number), 0


# Operations whose output size depends on values


def shape_ctc(log_probabilities: Tensor, targets: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return the loss of each row and the forward variables, B T 2L+1."""
    steps, rows = log_probabilities.shape[:2]
    return log_probabilities.new_empty(rows), log_probabilities.new_empty(rows, steps, 2 * targets.shape[-1] + 1)


def shape_unique(x: Tensor, return_inverse: bool = False, return_counts: bool = False, *_: Any) -> tuple[Tensor, ...]:
    """Return as many values as the input has: the most there can be."""
    sizes = [x.numel(), x.numel() if return_inverse else 0, x.numel() if return_counts else 0]
    return x.new_empty(sizes[0]), x.new_empty(sizes[1], dtype=torch.int64), x.new_empty(sizes[2], dtype=torch.int64)


def shape_bincount(x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return x.new_empty(max(minlength, 1), dtype=torch.int64)


SHAPES: dict[Any, Callable[..., Any]] = {
    aten.mkldnn_rnn_layer.default: shape_recurrent_layer,
    aten.mkldnn_rnn_layer_backward.default: shape_recurrent_layer_backward,
    aten._ctc_loss.Tensor: shape_ctc,
    aten._ctc_loss.default: shape_ctc,
    aten.unique_consecutive.default: shape_unique,
    aten.bincount.default: shape_bincount,
}


# Work


def count_attention(args: tuple, backward: bool) -> float:
    q, k = (args[1], args[2]) if backward else (args[0], args[1])
    v = args[3] if backward else args[2]
    pairs = math.prod(q.shape[:-1]) * k.shape[-2]
    return 2.0 * pairs * (q.shape[-1] + v.shape[-1]) * (2.5 if backward else 1)


def count_flops(func: Any, args: tuple, kwargs: Mapping[str, Any], out: Any) -> float:
    if func in CPU_ATTENTION:
        return count_attention(args, func is CPU_ATTENTION[1])
    if func in RECURRENT:
        x, w0, w1 = args[0], args[1], args[2]
        return 2.0 * x.shape[0] * x.shape[1] * (w0.numel() + w1.numel()) * (1 if func is RECURRENT[0] else 2)
    counter = flop_registry.get(func._overloadpacket)
    return float(counter(*args, **kwargs, out_val=out)) if counter else 0.0


def measure_work(
    func: Any, args: tuple, kwargs: Mapping[str, Any], inputs: list[Tensor], outputs: list[Tensor], out: Any, phase: str
) -> Work:
    """Return the floating-point operations and the bytes that an operation reads and writes."""
    packet = func._overloadpacket
    kind = KINDS.get(packet) or ("attention" if "attention" in packet.__name__ else "other")
    schema = func._schema
    if kind == "other" and outputs and all(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
        return Work(packet.__name__, "view", "", 0.0, 0.0, phase)
    dtype = str(outputs[0].dtype if outputs else inputs[0].dtype if inputs else torch.float32).removeprefix("torch.")
    moved = sum(min(nbytes(x), x.untyped_storage().nbytes()) for x in inputs) + sum(nbytes(x) for x in outputs)
    return Work(packet.__name__, kind, dtype, count_flops(func, args, kwargs, out), float(moved), phase)

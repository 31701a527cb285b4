"""Programs of `torch.export`: the traced network as a file that torch runs without the code it was written in.

Texts are no tensors, so the lookups before the network and the names of classes after it are tables in `export.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fieldguide.core.signature import TensorSpec
from fieldguide.exporting.graph import ExportError, Graph
from fieldguide.exporting.graph_format import GraphFormat, Port
from fieldguide.exporting.precision import Precision
from fieldguide.exporting.tracing import check_axis, compare_sizes, list_dynamic_axes, quiet_tracing

LARGE_SIZE = 1 << 20  # of axes without a limit


class TorchFormat(GraphFormat):
    """Files that `torch.export.load` reads."""

    name = "torch"
    suffix = ".pt2"
    session = ("columns", "session_torch")
    packages = ("torch",)
    about = 'a program of torch.export: `torch.export.load("model.pt2").module()` is a function of its tensors'

    def check_packages(self) -> None:
        """Do nothing: torch is there."""

    def write(self, graph: Graph, path: Path, precision: Precision) -> dict[str, Any]:
        program = trace(graph)
        program.example_inputs = None  # torch would store them as a pickle
        for tensors in (program.constants, program.state_dict):
            tensors.update({name: tensor.clone() for name, tensor in tensors.items() if is_slice(tensor)})
        torch.export.save(program, path)
        call = torch.export.load(path).module()
        compare_sizes(graph, lambda batch: [tensor.numpy() for tensor in call(*batch.values())])
        return describe_texts(graph)

    def describe(self, graph: Graph, path: Path) -> tuple[list[Port], list[Port]]:
        spell = lambda dtype: str(dtype).removeprefix("torch.")
        inputs = [Port(spec.name, spec.dtype, tuple(map(str, spec.axes))) for spec in graph.inputs]
        found = torch.export.load(path).graph.output_node().args[0]
        outputs = []
        for name, node in zip(graph.outputs, found):
            value = node.meta["val"]
            axes = ("batch", *(str(size) if isinstance(size, int) else "dynamic" for size in value.shape[1:]))
            outputs.append(Port(name, spell(value.dtype), axes))
        return inputs, outputs


def trace(graph: Graph, is_limited: bool = False) -> torch.export.ExportedProgram:
    """Return the program of a graph's module, with the limits of its axes if `is_limited`.

    Raises `ExportError` if torch cannot trace it or an axis became fixed.
    """
    example = tuple(graph.build_example().values())
    with quiet_tracing(), dynamic_recurrence():
        program = torch.export.export(
            graph.module, example, dynamic_shapes=(list_dynamic_axes(graph, is_limited),), strict=False
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of our code
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    for place, node in enumerate(inputs):
        for number, size in enumerate(node.meta["val"].shape):
            check_axis(graph, place, number, size if isinstance(size, int) else None)
            check_limit(graph.inputs[place], number, size, program.range_constraints)
    return program


def check_limit(spec: TensorSpec, number: int, size: Any, ranges: Mapping[Any, Any]) -> None:
    """Raise `ExportError` if torch found that an axis must be shorter than the signature allows."""
    axis = spec.axes[number]
    found = None if isinstance(size, int) else ranges.get(size.node.expr)
    if axis.size is None and found is not None and found.upper < (axis.most or LARGE_SIZE):
        raise ExportError(f"the axis {axis.name!r} of {spec.name!r} is at most {found.upper} in the graph.")


def is_slice(tensor: Any) -> bool:
    """Return whether a tensor is a part of a larger storage, which torch may fail to save."""
    return isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() > tensor.nbytes


def describe_texts(graph: Graph) -> dict[str, Any]:
    """Return the arrays of a graph with the columns that they are joined from, and the names in its outputs, for `run.py`."""
    lookups = {lookup.name: lookup for lookup in graph.lookups}
    inputs = []
    for spec in graph.inputs:
        columns = list(graph.columns.get(spec.name, ()))
        codes = {
            column: {"known": lookups[column].list_codes(), "unknown": lookups[column].unknown}
            for column in columns
            if spec.dtype == "int64"
        }
        inputs.append({"name": spec.name, "columns": columns, "codes": codes})
    named = {names.of: {"name": names.name, "names": list(names.values)} for names in graph.names}
    outputs = [named.get(name, {"name": name}) for name in graph.outputs]
    return {"inputs": inputs, "outputs": outputs}


@contextmanager
def dynamic_recurrence() -> Iterator[None]:
    """Let recurrent operators keep a dynamic number of steps while torch traces.

    torch finds the shapes of their outputs by running one step after the other, which fixes the number of steps. They are known without.
    """
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    operators: dict[Any, Callable[..., Any]] = {
        torch.ops.aten.lstm.input: shape_lstm,
        torch.ops.aten.gru.input: shape_rnn,
        torch.ops.aten.rnn_tanh.input: shape_rnn,
    }
    before = {operator: operator.py_kernels.get(key) for operator in operators}
    try:
        for operator, shape in operators.items():
            operator.py_kernels[key] = shape
            operator._dispatch_cache.clear()
        yield
    finally:
        for operator, kernel in before.items():
            if kernel is None:
                operator.py_kernels.pop(key)
            else:
                operator.py_kernels[key] = kernel
            operator._dispatch_cache.clear()


def shape_rnn(values: Tensor, state: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # B T I or T B I; L*D B H
    """Return tensors of the shapes that a recurrent operator returns: all steps, B T D*H or T B D*H, and the last state."""
    *_, bidirectional, batch_first = rest
    del batch_first  # the order of the first two axes stays
    width = state.shape[2] * (2 if bidirectional else 1)
    return values.new_empty((*values.shape[:2], width)), torch.empty_like(state)


def shape_lstm(values: Tensor, state: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors of the shapes that an LSTM returns: all steps, the last output, and the last cell state."""
    hidden, cell = state
    return *shape_rnn(values, hidden, *rest), torch.empty_like(cell)

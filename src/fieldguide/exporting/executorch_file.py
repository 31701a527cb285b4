"""Programs of ExecuTorch: the traced network for PyTorch's runtime on phones and small devices, with XNNPACK for CPUs.

ExecuTorch plans memory before a program runs, for the largest size of every axis. Axes without a limit therefore get one, and a
program takes as many rows at once as `MAX_PLANNED_BYTES` allow; `session.py` splits larger batches. Networks with recurrent layers take one
row, because the runtime cannot resize the state of a loop.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.exporting.executorch_operators import RECURRENT, keep_float64, list_decompositions
from fieldguide.exporting.graph import ExportError, Graph
from fieldguide.exporting.graph_format import GraphFormat, Port
from fieldguide.exporting.precision import Precision
from fieldguide.exporting.torch_file import describe_texts, dynamic_recurrence, trace
from fieldguide.exporting.tracing import compare_sizes, quiet_tracing

MAX_ROWS = 64  # at once
MAX_SIZE = 2048  # of axes without a limit, such as the height of an image
MAX_PLANNED_BYTES = 256 << 20  # of memory for values between operators, unless one row needs more
BACKENDS = ("XNNPACK", "portable")  # tried in order
SIZES = ((2, 7), (3, 7), (3, 9))  # rows and size of other axes, with which the axes of outputs are found


def import_executorch() -> tuple[Any, Any, Any]:
    """Return the lowering and runtime modules of executorch, and the partitioner of XNNPACK.

    Raises `SettingsError` if executorch is not installed.
    """
    try:
        with quiet_tracing():
            import executorch.exir
            import executorch.runtime
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    except ExportError as error:
        missing = error.__cause__
        if isinstance(missing, ImportError):
            raise SettingsError(
                f"export to ExecuTorch needs {missing.name or missing}: pip install 'fieldguide[executorch]'"
            ) from None
        raise
    return executorch.exir, executorch.runtime, XnnpackPartitioner


class ExecutorchFormat(GraphFormat):
    """Files that the runtime of ExecuTorch reads."""

    name = "executorch"
    suffix = ".pte"
    session = ("columns", "session_executorch")
    packages = ("torch", "executorch")
    about = (
        "a program for ExecuTorch, PyTorch's runtime on phones and small devices. Its C++ runtime needs no torch; that for Python, "
        "which `run.py` uses, does"
    )

    def check_packages(self) -> None:
        import_executorch()

    def write(self, graph: Graph, path: Path, precision: Precision) -> dict[str, Any]:
        problems = []
        for backend in BACKENDS:
            try:
                limited = write_program(graph, path, backend)
            except ExportError as error:
                problems.append(error)
                continue
            about = describe_texts(graph)
            for one, spec in zip(about["inputs"], limited.inputs):
                one["axes"] = [[axis.name, axis.least, axis.size or axis.most] for axis in spec.axes]
                one["batch"] = find_batch(spec)
            for one, axes in zip(about["outputs"], (axes for _, axes in describe_outputs(graph))):
                one["batch"] = axes.index("batch") if "batch" in axes else None
            return {**about, "backend": backend}
        path.unlink(missing_ok=True)
        raise ExportError(f"{problems[-1]}\nUse --to onnx or --to torch.") from problems[-1]

    def describe(self, graph: Graph, path: Path) -> tuple[list[Port], list[Port]]:
        method = load_program(path).metadata("forward")
        inputs = []
        for number, spec in enumerate(graph.inputs):
            sizes = method.input_tensor_meta(number).sizes()
            axes = tuple(str(axis if axis.size else replace(axis, most=size)) for axis, size in zip(spec.axes, sizes))
            inputs.append(Port(spec.name, spec.dtype, axes))
        outputs = [Port(name, dtype, axes) for name, (dtype, axes) in zip(graph.outputs, describe_outputs(graph))]
        return inputs, outputs


def keep_buffers(module: nn.Module) -> nn.Module:
    """Return a copy whose buffers are all persistent: ExecuTorch refuses others after its own passes."""
    module = copy.deepcopy(module)
    for part in module.modules():
        part._non_persistent_buffers_set.clear()
    return module


def load_program(path: Path) -> Any:
    """Return a program with its function `forward`. The function must not outlive it."""
    _, runtime, _ = import_executorch()
    with quiet_tracing("ExecuTorch cannot load the program"):
        program = runtime.Runtime.get().load_program(path.read_bytes())
        program.load_method("forward")
    return program


def find_batch(spec: TensorSpec) -> int | None:
    """Return the place of the axis of rows."""
    return next((place for place, axis in enumerate(spec.axes) if axis.name == "batch"), None)


def write_program(graph: Graph, path: Path, backend: str) -> Graph:
    """Write the program, and return the graph with the limits of its axes.

    Raises `ExportError` if an operator is missing or the program differs from the module.
    """
    graph = replace(graph, module=keep_buffers(graph.module))
    limited = limit_axes(graph, MAX_ROWS)
    program = trace(limited, is_limited=True)
    if any(node.target in RECURRENT for node in program.graph.nodes):
        limited = limit_axes(graph, 1)
        program = trace(limited, is_limited=True)
    content, planned = lower(program, backend)
    rows = MAX_ROWS * MAX_PLANNED_BYTES // max(planned, 1)
    if rows < MAX_ROWS and limited.inputs[0].axes[find_batch(limited.inputs[0]) or 0].size != 1:
        limited = limit_axes(graph, max(rows, 1))
        content, planned = lower(trace(limited, is_limited=True), backend)
    path.write_bytes(content)
    call = load_program(path)
    limited = read_limits(limited, call.metadata("forward"))
    compare_sizes(limited, lambda batch: [tensor.numpy() for tensor in execute(call, list(batch.values()))])
    return limited


def read_limits(graph: Graph, method: Any) -> Graph:
    """Return a graph with the number of rows that a program takes, which torch may have lowered; other axes must keep their limits."""
    inputs = []
    for number, spec in enumerate(graph.inputs):
        axes = []
        for axis, size in zip(spec.axes, method.input_tensor_meta(number).sizes()):
            if axis.name != "batch" and axis.size is None and size < (axis.most or 0):
                raise ExportError(f"the axis {axis.name!r} of {spec.name!r} is at most {size} in the program.")
            axes.append(replace(axis, most=size) if axis.name == "batch" and axis.size is None else axis)
        inputs.append(replace(spec, axes=tuple(axes)))
    return replace(graph, inputs=tuple(inputs))


def execute(program: Any, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the outputs of a program."""
    return program.load_method("forward").execute([tensor.contiguous() for tensor in tensors])


def limit_axes(graph: Graph, rows: int) -> Graph:
    """Return a graph whose axes all have a limit."""
    inputs = tuple(replace(spec, axes=tuple(limit_axis(axis, rows) for axis in spec.axes)) for spec in graph.inputs)
    return replace(graph, inputs=inputs)


def limit_axis(axis: Axis, rows: int) -> Axis:
    """Return an axis with a limit; that of rows is fixed if there is only one."""
    if axis.size is not None:
        return axis
    if axis.name == "batch":
        return replace(axis, size=1) if rows == 1 else replace(axis, most=rows)
    return axis if axis.most is not None else replace(axis, most=MAX_SIZE // axis.multiple * axis.multiple)


def lower(program: torch.export.ExportedProgram, backend: str) -> tuple[bytes, int]:
    """Return the file of a program for a backend, and the bytes of memory that it plans."""
    exir, _, partitioner = import_executorch()
    with quiet_tracing("ExecuTorch cannot lower this network"):
        torch._dynamo.reset()  # loops of other networks would make sizes of this one dynamic
        with dynamic_recurrence(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            program = program.run_decompositions(list_decompositions())
        keep_float64(program.graph_module)
        edge = exir.to_edge_transform_and_lower(
            program,
            partitioner=[partitioner()] if backend == "XNNPACK" else [],
            compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
        )
        made = edge.to_executorch()
    plan = made.executorch_program.execution_plan[0]
    check_kernels({f"{operator.name}.{operator.overload}".rstrip(".") for operator in plan.operators})
    return made.buffer, sum(plan.non_const_buffer_sizes)


def check_kernels(operators: Iterable[str]) -> None:
    """Raise `ExportError` if the runtime lacks an operator of a program."""
    _, runtime, _ = import_executorch()
    known = runtime.Runtime.get().operator_registry.operator_names
    if missing := sorted(set(operators) - set(known)):
        raise ExportError(f"ExecuTorch has no kernel for {', '.join(missing)}.")


def describe_outputs(graph: Graph) -> list[tuple[str, tuple[str, ...]]]:
    """Return the type and the axes of each output, found by running the module with other sizes of inputs."""
    with torch.no_grad():
        runs = [graph.module(*graph.build_example(0, rows, size).values()) for rows, size in SIZES]
    found = []
    for fewer, more, larger in zip(*runs):
        axes = [
            "batch" if a != b else "dynamic" if b != c else str(c) for a, b, c in zip(fewer.shape, more.shape, larger.shape)
        ]
        found.append((str(more.dtype).removeprefix("torch."), tuple(axes)))
    return found

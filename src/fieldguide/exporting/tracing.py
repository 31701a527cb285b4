"""What all formats share when they trace a graph: dynamic axes, silence, and the comparison with other sizes than the traced ones."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fieldguide.exporting.graph import ExportError, Graph

OTHER_SIZES = ((1, 7), (5, 14))  # rows, and size of other dynamic axes, with which a written graph is compared
UNSUPPORTED_LINES = 3  # of torch's message that are shown


def list_dynamic_axes(graph: Graph, is_limited: bool = False) -> tuple[dict[int, Any], ...]:
    """Return the dynamic axes of each input, as `torch.export` takes them, with their limits if `is_limited`."""
    choose: Any = lambda axis: torch.export.Dim.AUTO(min=axis.least, max=axis.most) if is_limited else torch.export.Dim.AUTO
    return tuple({i: choose(axis) for i, axis in enumerate(spec.axes) if axis.size is None} for spec in graph.inputs)


@contextmanager
def quiet_tracing(problem: str = "torch cannot trace this network") -> Iterator[None]:
    """Keep libraries from printing. Raises `ExportError` with the problem and its cause if the block fails."""
    quiet, level = io.StringIO(), logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(), redirect_stdout(quiet), redirect_stderr(quiet), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # torch and onnxruntime raise many types; all of them mean that this network is not supported
        cause = str(error.__cause__ or error).strip().splitlines()
        raise ExportError(f"{problem}: " + " ".join(cause[:UNSUPPORTED_LINES])) from error
    finally:
        logging.disable(level)


def check_axis(graph: Graph, place: int, number: int, size: int | None) -> None:
    """Raise `ExportError` if axis `number` of an input has a fixed size in the graph, but is dynamic."""
    spec = graph.inputs[place]
    if spec.axes[number].size is None and size is not None:
        raise ExportError(f"the axis {spec.axes[number].name!r} of {spec.name!r} became fixed at {size} in the graph.")


def compare_sizes(graph: Graph, run: Callable[[dict[str, Tensor]], Sequence[np.ndarray]]) -> None:
    """Raise `ExportError` if a written graph differs from the module for other sizes of dynamic axes than those of the traced batch.

    torch may fix an axis without an error, even where the graph declares it as dynamic. `run` returns the graph's outputs for a batch.
    """
    for rows, size in OTHER_SIZES:
        batch = graph.build_example(rows, rows, size)
        try:
            found = run(batch)
        except Exception as error:  # types of the runtime's own, without a common base
            shapes = ", ".join(f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in batch.items())
            raise ExportError(f"the graph fails for {shapes}, so a dynamic axis became fixed: {error}") from error
        with torch.no_grad():
            want = graph.module(*batch.values())
        for name, one, other in zip(graph.outputs, want, found):
            close = one.shape == other.shape and np.isclose(one.double().numpy(), other, rtol=1e-3, atol=1e-3, equal_nan=True)
            if np.mean(close) < graph.min_close:
                raise ExportError(
                    f"the output {name!r} of the graph differs from the network's for {rows} rows of size {size}."
                )

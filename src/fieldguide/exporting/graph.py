"""What is exported: a module from raw tensors to outputs, with the data that the program around it needs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.core.example_batch import place_tokens
from fieldguide.core.signature import Axis, TensorSpec

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

BATCH = Axis("batch")
EXAMPLE_ROWS = 3  # of the batch that is traced: a size of 1 or 2 may become part of the graph
EXAMPLE_SIZE = 9  # of dynamic axes in that batch


class ExportError(SettingsError):
    """A model cannot be exported in this format. The message says why."""


@dataclass(frozen=True)
class Lookup:
    """A graph input of texts, each of which becomes an integer: `values` in order are `first`, `first` + 1, ..."""

    name: str
    values: tuple[str, ...]
    first: int
    unknown: int
    missing: int | None = None  # the code of the empty text; `unknown` if None
    spellings: Mapping[str, int] = field(default_factory=dict)  # other texts and their integers

    def list_codes(self) -> dict[str, int]:
        """Return all known texts and their integers."""
        codes = {value: self.first + i for i, value in enumerate(self.values)} | dict(self.spellings)
        return codes if self.missing is None else {**codes, "": codes.get("", self.missing)}


@dataclass(frozen=True)
class Names:
    """A graph output of texts: the names of the integers in another output."""

    name: str
    of: str
    values: tuple[str, ...]


@dataclass
class Graph:
    """A network with the steps around it that can be part of a graph.

    Attributes:
        module: takes the tensors of `inputs` in order, and returns those of `outputs` in order.
        inputs: the module's arguments. Those named in `columns` are joined from one graph input for each column.
        columns: module argument -> names of the graph inputs that are its columns: texts with a `Lookup`, else numbers. An argument
            whose second axis is dynamic has one column, of lists of texts.
        parts: the parts of `run.py` that turn raw inputs into graph inputs, and outputs into records (runners/).
        modules: modules that `run.py` imports, and their parts: `images`, if it has more to do than to decode images.
        values: what that part needs, written to `export.json`.
        requires: packages that it imports in addition to numpy and those of the format.
        further: other graphs that the program calls, by the names of their files, such as an encoder that is called once before this one.
        loop: how the graph is called several times for one prediction, written to `loop.json`; empty if it is called once.
        test_options: options of the predictions that are compared.
    """

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    parts: tuple[str, ...]
    values: dict[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    lookups: tuple[Lookup, ...] = ()
    names: tuple[Names, ...] = ()
    requires: tuple[str, ...] = ()
    modules: Mapping[str, Sequence[str]] = field(default_factory=dict)
    files: tuple[str, ...] = ()  # of the run's preprocess/ folder that the program reads
    further: Mapping[str, Graph] = field(default_factory=dict)
    loop: Mapping[str, Any] = field(default_factory=dict)
    test_options: Mapping[str, Any] = field(default_factory=dict)
    min_close: float = 1.0  # fraction of values that must be close for random inputs: lower if outputs are ranked or chosen
    example: Callable[[int, int, int], dict[str, Tensor]] | None = (
        None  # makes inputs from a seed, rows and a size; None: random
    )

    def build_example(self, seed: int = 0, rows: int = EXAMPLE_ROWS, size: int = EXAMPLE_SIZE) -> dict[str, Tensor]:
        """Return inputs with a number of rows; other dynamic axes are near `size`."""
        return (self.example or functools.partial(build_example, self.inputs))(seed, rows, size)


class Pipeline(nn.Module):
    """Raw tensors -> `front` -> a batch by name -> `step` -> outputs by name -> `back` -> the graph's outputs by name."""

    def __init__(
        self,
        front: nn.Module,
        step: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        back: nn.Module,
        network: nn.Module,
        outputs: Sequence[str],
    ):
        super().__init__()
        self.front, self.step, self.back, self.network, self.names = front, step, back, network, tuple(outputs)

    def forward(self, *raw: Tensor) -> tuple[Tensor, ...]:
        outputs = self.back(self.step(self.front(*raw)))
        return tuple(outputs[name] for name in self.names)


class PassTensors(nn.Module):
    """Pass tensors on by their names."""

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names = tuple(names)

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, tensors))


def build_pipeline(
    predictor: TaskPredictor,
    front: nn.Module,
    back: nn.Module,
    outputs: Sequence[str],
    choose_step: Callable[[Any], Callable[[dict[str, Tensor]], dict[str, Tensor]]] | None = None,
) -> Pipeline:
    """Return the module of a predictor with the steps before and after its network, in evaluation mode.

    The step from a batch to outputs is `choose_step` of the objective, by default the task's `predict_step`.
    """
    objective = copy.deepcopy(predictor.objective).eval().cpu()
    task = predictor.task.for_request(predictor.task.PredictOptions())
    step = (choose_step or task.predict_step)(objective)
    return Pipeline(front, step, back, objective, outputs).eval().requires_grad_(False)


def build_example(specs: Sequence[TensorSpec], seed: int, rows: int, size: int) -> dict[str, Tensor]:
    """Return random tensors of specs with a number of rows; other dynamic axes are about `size` above their least, one for each name."""
    generator = torch.Generator().manual_seed(seed)
    dynamic = {axis.name: axis for spec in specs for axis in spec.axes if axis.size is None}
    others = [name for name in dynamic if name != BATCH.name]
    sizes = {name: choose_size(dynamic[name], size + place) for place, name in enumerate(others)}
    if BATCH.name in dynamic:
        sizes[BATCH.name] = min(rows, dynamic[BATCH.name].most or rows)
    batch = {}
    for spec in specs:
        shape = [sizes[axis.name] if axis.size is None else axis.size for axis in spec.axes]
        if spec.dtype == "bool":
            batch[spec.name] = torch.ones(shape, dtype=torch.bool)
        elif spec.counts:  # numbers of real entries; the last row has no others
            counts = torch.randint(dynamic[spec.counts].least, sizes[spec.counts] + 1, shape, generator=generator)
            counts[-1] = sizes[spec.counts]
            batch[spec.name] = counts
        elif spec.dtype in ("int64", "uint8"):
            low, high = int(spec.low or 0), int(spec.high if spec.high is not None else 1)
            values = torch.randint(low, high + 1, shape, generator=generator, dtype=getattr(torch, spec.dtype))
            batch[spec.name] = place_tokens(spec, values)
        else:
            batch[spec.name] = torch.randn(shape, generator=generator, dtype=getattr(torch, spec.dtype))
    return batch


def choose_size(axis: Axis, size: int) -> int:
    """Return a size of an axis, `size` - 1 above its least if possible. Axes of one batch differ, so that no graph takes them as equal."""
    size = min(axis.least + size - 1, axis.most or axis.least + size)
    return -(-size // axis.multiple) * axis.multiple

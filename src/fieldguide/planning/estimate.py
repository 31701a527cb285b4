"""Plan a run: peak memory by part, time per step, the largest batch and sequence that fit, on this machine or another.

`estimate` traces one step (see `fieldguide.planning.trace`), models the allocator and corrects the result by the measured errors
of plans for the family (see `fieldguide.planning.errors`). Nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fieldguide.core.card import Card
from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.models import registry
from fieldguide.planning import errors
from fieldguide.planning.allocator import CudaCache, Glibc, replay
from fieldguide.planning.distribution import Sharing, share_parts
from fieldguide.planning.machines import GPU_LIBRARY_BYTES, Machine, get_machine
from fieldguide.planning.stepping import trace_prediction, trace_training
from fieldguide.planning.timing import plan_seconds
from fieldguide.planning.trace import Trace
from fieldguide.planning.workload import Shape, Workload, build_network, build_workload

MODES = ("train", "predict")
MEMORY_SHARE = 0.95  # of a machine's memory that a run may take
LARGEST_BATCH, LARGEST_LENGTH = 1 << 20, 1 << 20
MAX_TRIALS = 6  # traces in the search of the largest batch or length
MOST_GROWTH = 64  # of the batch or length from one trial to the next
CLOSE_ENOUGH = 0.97  # of the limit, at which the search ends
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Estimate:
    """The plan of training or prediction. All sizes are bytes on one device; times are seconds.

    Attributes:
        parts: tensors at the moment of the peak, by part: weights, gradients, optimizer, average (EMA), best (kept best
            weights), activations, temporary, kernel (buffers inside of operations), data, cache (keys and values of a
            generator), communication (buffers of several devices), allocator (rounding and fragmentation), process.
        allocated: tensors at the peak. `peak` also has what the allocator takes and the process itself.
        upper: upper bound of `peak`.
        fits: whether `upper` is within the machine's memory.
        step_seconds: of one step; `seconds` of all `steps`.
        largest_batch: largest batch per device for which `upper` fits; None if it was not searched, 0 if none fits.
        error: medians and 95th percentiles of the relative errors that were measured for this family, and the number of cells.
    """

    network: str
    family: str
    mode: str
    batch: int
    length: int
    precision: str
    optimizer: str
    machine: str
    devices: int
    strategy: str
    parts: dict[str, int]
    allocated: int
    peak: int
    upper: int
    memory: int
    fits: bool
    step_seconds: float
    steps: int
    seconds: float
    flops: float
    largest_batch: int | None
    largest_length: int | None
    error: dict[str, float]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Make = Callable[[Shape], Workload]


def from_card(name: str, config: Any = None, dtype: str = "float32", **overrides: Any) -> tuple[Make, Card, Any]:
    """Return a function that builds the steps of a published size, or of a config of its architecture; its card and config.

    `dtype` is that of the stored weights. Raises `SettingsError` for an unknown name, field or dtype.
    """
    if dtype not in DTYPE_BYTES:
        raise SettingsError(f"dtype={dtype!r} is none of {', '.join(DTYPE_BYTES)}.")
    card, size = registry.find(name)
    try:
        config = card.resolve_config(size, **overrides) if config is None else config
    except TypeError as error:
        raise SettingsError(str(error)) from None

    def make(shape: Shape) -> Workload:
        network = build_network(card, config, shape.device).to(getattr(torch, dtype))
        return build_workload(card, config, shape, network)

    return make, card, config


def from_example(
    objective: Any, batch: dict[str, Tensor], predict: Callable[[Any, dict[str, Tensor]], Any] | None = None
) -> Make:
    """Return a function that builds the steps of an existing objective from one of its batches, with any number of rows."""
    rows = max((len(t) for t in batch.values() if t.ndim), default=1)

    def make(shape: Shape) -> Workload:
        resized = {name: resize(tensor, rows, shape.batch) for name, tensor in batch.items()}
        return Workload(objective, resized, predict) if predict else Workload(objective, resized)

    return make


def resize(tensor: Tensor, rows: int, wanted: int) -> Tensor:
    """Return a tensor with another number of rows: repeated integers, and no values for floating-point numbers."""
    if not tensor.ndim or len(tensor) != rows:
        return tensor
    if tensor.is_floating_point():
        return torch.empty(wanted, *tensor.shape[1:], dtype=tensor.dtype, device="meta")
    return tensor[torch.arange(wanted) % rows]


def estimate(
    source: str | Make,
    *,
    mode: str = "train",
    settings: Settings | None = None,
    batch: int | None = None,
    length: int = 128,
    side: int = 224,
    machine: str | Path | Machine = "cpu",
    devices: int = 1,
    strategy: str = "ddp",
    steps: int | None = None,
    dtype: str = "float32",
    new_tokens: int = 0,
    keeps_best: bool = False,
    search: bool = True,
    family: str = "",
    name: str = "",
    **overrides: Any,
) -> Estimate:
    """Plan training or prediction without allocating anything.

    Args:
        source: name of a network, or a function from a `Shape` to a `Workload`, such as of `from_example`.
        mode: "train" or "predict".
        settings: settings of the run: precision, optimizer, ema, grad_accum_steps, grad_clip and others that decide its memory.
        batch: rows per device and step; by default that of the settings, or 32.
        length: tokens per row, and `side` pixels, where the network leaves them open.
        machine: name of a machine, `cpu` for this one, or the JSON file of a probe.
        devices: number of devices; `batch` is for each of them. `strategy` is "ddp" or "fsdp".
        steps: number of steps for the total time; by default that of the settings, or 1.
        dtype: of the stored weights of a network that is named.
        new_tokens: tokens that a generator writes for each row; its cache has `length + new_tokens` positions.
        keeps_best: whether the best weights so far are kept, as in a run that evaluates.
        search: find the largest batch, and length if the network has one, that fit.
        family: family of the network for the corrections; that of its card by default.
        overrides: fields of the config, by the common vocabulary.

    Raises:
        SettingsError: for an unknown network, machine, mode or strategy.
    """
    if mode not in MODES:
        raise SettingsError(f"mode={mode!r} is none of {', '.join(MODES)}.")
    if devices < 1:
        raise SettingsError(f"devices={devices} must be at least 1.")
    settings = settings or Settings()
    if settings.precision == "auto":
        settings = settings.with_({"precision": "float32"})
    batch = batch or settings.batch_size or 32
    make: Make
    if isinstance(source, str):
        make, card, config = from_card(source, dtype=dtype, **overrides)
        family, name = family or card.family, name or source
        longest = find_longest(card, config)
    else:
        make, longest, name = source, 0, name or "network"
    plan = Planner(make, mode, settings, get_machine(machine), Sharing(devices, strategy), family, new_tokens, keeps_best)
    shape = Shape(batch, length, side)
    step = plan.plan(shape)
    largest_batch = plan.search(lambda n: replace(shape, batch=n), batch, LARGEST_BATCH) if search else None
    largest_length = None
    if search and longest:
        largest_length = plan.search(lambda n: replace(shape, length=n), min(length, longest), longest)
    steps = steps or (settings.steps if mode == "train" else None) or 1
    return Estimate(
        network=name,
        family=family,
        mode=mode,
        batch=batch,
        length=length,
        precision=settings.precision,
        optimizer=settings.optimizer if mode == "train" else "",
        machine=plan.machine.name,
        devices=devices,
        strategy=strategy if devices > 1 else "",
        parts=step.parts,
        allocated=step.allocated,
        peak=step.peak,
        upper=step.upper,
        memory=plan.machine.memory,
        fits=step.upper <= plan.limit,
        step_seconds=step.seconds,
        steps=steps,
        seconds=steps * step.seconds,
        flops=step.flops,
        largest_batch=largest_batch,
        largest_length=largest_length,
        error=plan.error,
        notes=plan.notes,
    )


def find_longest(card: Card, config: Any) -> int:
    """Return the longest sequence that a network takes; 0 if it takes none."""
    if card.input_type not in ("tokens", "pair", "speech", "sequence"):
        return 0
    length = getattr(config, card.names.get("length", "length"), None)
    return LARGEST_LENGTH if card.endless or not length else int(length)


@dataclass(frozen=True)
class Step:
    """What one step takes on one device."""

    parts: dict[str, int]
    allocated: int
    peak: int
    upper: int
    seconds: float
    flops: float


class Planner:
    """Plans steps of different sizes for the same network, settings and machine."""

    def __init__(
        self,
        make: Make,
        mode: str,
        settings: Settings,
        machine: Machine,
        sharing: Sharing,
        family: str,
        new_tokens: int,
        keeps_best: bool,
    ):
        self.make, self.mode, self.settings, self.machine, self.sharing = make, mode, settings, machine, sharing
        self.new_tokens, self.keeps_best = new_tokens, keeps_best and mode == "train"
        self.correction = errors.get_correction(family, mode)
        self.limit = int(MEMORY_SHARE * machine.memory)

    @property
    def on_cpu(self) -> bool:
        return self.machine.kind == "cpu"

    @property
    def notes(self) -> tuple[str, ...]:
        notes = list(self.machine.notes)
        if not self.correction.cells:
            notes.append("errors were not measured for this family: the upper bound is a guess")
        elif self.correction.seconds_median != self.correction.seconds_median:  # not a number
            notes.append("the time of steps of this family was not measured on an idle machine")
        elif not self.on_cpu:
            notes.append("the measured errors are those of this library on a CPU")
        return tuple(notes)

    @property
    def error(self) -> dict[str, float]:
        c = self.correction
        values = {"peak_median": c.memory_median, "peak_p95": c.memory_p95}
        values |= {"seconds_median": c.seconds_median, "seconds_p95": c.seconds_p95}
        return {"cells": c.cells, **values}

    def trace(self, shape: Shape) -> tuple[Trace, Workload]:
        workload = self.make(shape)
        if self.mode == "train":
            parts = self.settings.grad_accum_steps  # a step has several batches; the memory is that of `shape` each
            settings = self.settings.with_({"batch_size": parts * shape.batch})
            return trace_training(workload, settings), workload
        return trace_prediction(workload, self.settings.precision), workload

    def plan(self, shape: Shape) -> Step:
        """Plan a step of this shape."""
        trace, workload = self.trace(shape)
        first, later = trace.find_peak(), trace.later_steps().find_peak()
        _, parts = max(first, later, key=lambda peak: peak[0])
        if not self.on_cpu:
            parts["kernel"] = 0
        parts["best"] = parts["weights"] if self.keeps_best else 0
        parts["cache"] = self.count_cache_bytes(workload, shape)
        parts = share_parts(parts, self.sharing)
        allocated = sum(parts.values())
        taken = self.take(trace) + parts["best"] + parts["cache"]
        taken = int(taken * allocated / max(allocated_alone(trace, parts), 1)) if self.sharing.devices > 1 else taken
        if self.on_cpu:
            taken, process = self.correction.correct(taken), errors.get_process_bytes(self.mode)
        else:
            process = self.machine.process_bytes + GPU_LIBRARY_BYTES
        taken = max(taken, allocated)
        upper = int(self.correction.upper * taken) + process
        parts |= {"allocator": taken - allocated, "process": process}
        seconds = plan_seconds(trace.work, self.machine) * workload.calls
        if self.on_cpu:
            seconds *= self.correction.seconds
        weights = sum(trace.initial.values())
        seconds += self.sharing.count_seconds(weights) if self.mode == "train" else 0.0
        flops = sum(work.flops for work in trace.work)
        return Step(parts, allocated, taken + process, upper, seconds, flops)

    def take(self, trace: Trace) -> int:
        """Return the bytes that the machine's allocator takes from the system."""
        if self.on_cpu:
            return sum(trace.initial.values()) + replay(trace, Glibc(keep=self.mode == "train"))
        return replay(trace.without("kernel"), CudaCache(), initial=True)

    def count_cache_bytes(self, workload: Workload, shape: Shape) -> int:
        """Return the bytes of keys and values of a generator for all rows: it is made on fake tensors and measured."""
        network = workload.objective.model
        if self.mode != "predict" or not self.new_tokens or not hasattr(network, "new_cache"):
            return 0
        with FakeTensorMode(allow_non_fake_inputs=True):
            cache = network.new_cache(shape.batch, shape.length + self.new_tokens)
        tensors = [*cache.keys, *cache.values]
        return sum(t.nbytes for t in tensors)  # in the dtype of the weights

    def search(self, change: Callable[[int], Shape], start: int, most: int) -> int | None:
        """Return the largest number for which the upper bound fits; None if a network takes no other numbers.

        Two sizes give a line through their upper bounds; the number where it meets the limit is checked, and the line is drawn
        anew through the closest sizes below and above.
        """
        tried: dict[int, int] = {}

        def upper(number: int) -> int:
            if number not in tried:
                tried[number] = self.plan(change(number)).upper
            return tried[number]

        try:
            low = max(1, start // 2)
            if upper(low) > self.limit:
                low = 1
                if upper(1) > self.limit:
                    return 0
            upper(min(2 * low, most))
            for _ in range(MAX_TRIALS):
                below = max((n for n in tried if tried[n] <= self.limit), default=0)
                if tried.get(below, 0) >= CLOSE_ENOUGH * self.limit:
                    break
                above = min((n for n in tried if tried[n] > self.limit), default=None)
                if below >= most or (above is not None and above - below <= max(1, below // 50)):
                    break
                points = sorted(tried.items())
                (a, at_a), (b, at_b) = points[-2:] if above is None else ((below, tried[below]), (above, tried[above]))
                slope = max((at_b - at_a) / (b - a), 1.0)
                guess = int(below + 0.99 * (self.limit - tried[below]) / slope)
                guess = min(max(guess, below + 1), most, above - 1 if above else MOST_GROWTH * below)
                if guess in tried:
                    break
                upper(guess)
            return max(n for n in tried if tried[n] <= self.limit)
        except (SettingsError, RuntimeError, ValueError):
            return None


def allocated_alone(trace: Trace, parts: dict[str, int]) -> int:
    """Return the tensors at the peak of one device that shares nothing."""
    alone = max(trace.find_peak()[0], trace.later_steps().find_peak()[0])
    return alone + parts.get("best", 0) + parts.get("cache", 0)

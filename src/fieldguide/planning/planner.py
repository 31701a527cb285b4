"""Plans of steps of different sizes for the same network, settings and machine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

from torch._subclasses.fake_tensor import FakeTensorMode

from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.models.layers.dot_product_attention import use_fused_kernels
from fieldguide.planning import errors
from fieldguide.planning.allocator import CudaCache, Glibc, replay
from fieldguide.planning.distribution import Sharing, share_parts
from fieldguide.planning.machines import GPU_LIBRARY_BYTES, Machine
from fieldguide.planning.records import Trace
from fieldguide.planning.scaling import order_releases
from fieldguide.planning.search import search
from fieldguide.planning.serving import count_windowed_bytes, generates, plan_serving, trace_serving
from fieldguide.planning.sources import Make
from fieldguide.planning.stepping import trace_prediction, trace_training
from fieldguide.planning.timing import plan_seconds
from fieldguide.planning.trace import MAX_KNOWN_VALUES
from fieldguide.planning.workload import Shape, Workload

FIXED_PARTS = ("weights", "optimizer", "average", "best", "cache")  # they exist all the time, and their size is exact
GPU_UPPER = 1.1  # least factor of the bound for all other parts on a GPU, where nothing was measured
MEMORY_SHARE = 0.95  # of a machine's memory that a run may take


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
    """Plans training steps or predictions."""

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
        self.measured_mode = "train" if mode == "train" else "predict"
        self.correction = errors.get_correction(family, self.measured_mode)
        self.limit = int(MEMORY_SHARE * machine.memory)
        self.traces: dict[Shape, tuple[Trace, Workload]] = {}

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
        if shape not in self.traces:
            workload = self.make(shape)
            kernels = use_fused_kernels() if self.machine.kind == "cuda" else nullcontext()
            with kernels:
                trace = self.trace_workload(workload, shape)
            self.traces[shape] = (order_releases(trace), workload)
        return self.traces[shape]

    def trace_workload(self, workload: Workload, shape: Shape) -> Trace:
        if self.mode == "train":
            parts = self.settings.grad_accum_steps  # a step has several batches; the memory is that of `shape` each
            return trace_training(workload, self.settings.with_({"batch_size": parts * shape.batch}))
        if self.mode == "serve" and generates(workload):
            return trace_serving(workload, shape, self.new_tokens, self.settings.precision)
        return trace_prediction(workload, self.settings.precision)

    def plan(self, shape: Shape) -> Step:
        """Plan a step of this shape."""
        trace, workload = self.trace(shape)
        return self.plan_trace(trace, workload, shape)

    def plan_trace(self, trace: Trace, workload: Workload, shape: Shape) -> Step:
        first, later = trace.find_peak(), trace.later_steps().find_peak()
        alone, parts = max(first, later, key=lambda peak: peak[0])
        if not self.on_cpu:
            alone -= parts["kernel"]
            parts["kernel"] = 0
        parts["best"] = parts["weights"] if self.keeps_best else 0
        cache = self.count_cache_bytes(workload, shape)  # which the trace does not have
        parts["cache"] += cache
        alone += parts["best"] + cache
        depth = getattr(getattr(workload.objective.model, "config", None), "depth", None)
        parts = share_parts(parts, replace(self.sharing, units=depth) if isinstance(depth, int) and depth > 0 else self.sharing)
        allocated = sum(parts.values())
        taken = self.take(trace) + parts["best"] + cache
        taken = int(taken * allocated / max(alone, 1)) if self.sharing.devices > 1 else taken
        fixed = sum(parts[name] for name in FIXED_PARTS)
        if self.on_cpu:
            bound = self.correction.bound(taken, fixed)
            taken, process = self.correction.correct(taken, fixed), errors.get_process_bytes(self.measured_mode)
        else:
            bound = int(fixed + max(self.correction.upper, GPU_UPPER) * (taken - fixed))
            process = self.machine.process_bytes + GPU_LIBRARY_BYTES
        taken = max(taken, allocated)
        upper = max(bound, taken) + process
        parts |= {"allocator": taken - allocated, "process": process}
        factors = self.correction.factors if self.on_cpu else None
        seconds = plan_seconds(trace.work, self.machine, factors) * workload.calls
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
        tensors = cache.tensors
        return sum(t.nbytes for t in tensors)  # in the dtype of the weights

    def plan_serving(self, shape: Shape, step: Step) -> dict[str, float]:
        """Return latency and rates: of tokens for a network that generates, else of batches. DDP multiplies the rates."""
        trace, workload = self.trace(shape)
        copies, devices = self.sharing.devices, 1
        if self.sharing.strategy == "tensor":
            copies, devices = 1, self.sharing.devices
        if not generates(workload):
            return {"latency_seconds": step.seconds, "rows_per_second": copies * shape.batch / step.seconds}
        factors = self.correction.factors if self.on_cpu else None
        found = plan_serving(trace, workload, shape, self.machine, devices, factors)
        for name in ("tokens_per_second", "decode_bound", "prefill_tokens_per_second", "prefill_bound"):
            found[name] *= copies
        context = shape.length + max(self.new_tokens, 1)
        found["windowed_cache_per_sequence"] = count_windowed_bytes(
            workload.objective.model.config, int(found["cache_per_sequence"]), context
        )
        return found

    def search_batch(self, shape: Shape, most: int) -> int | None:
        width = max(
            (t[:1].numel() for t in self.trace(shape)[1].batch.values() if t.ndim and not t.is_floating_point()), default=1
        )
        return self.search(lambda n: replace(shape, batch=n), shape.batch, most, 1, max(2, MAX_KNOWN_VALUES // max(width, 1)))

    def search_length(self, shape: Shape, most: int) -> int | None:
        return self.search(
            lambda n: replace(shape, length=n), min(shape.length, most), most, 2, MAX_KNOWN_VALUES // shape.batch
        )

    def search(self, change: Callable[[int], Shape], start: int, most: int, degree: int, checkable: int) -> int | None:
        """Return the largest number for which the upper bound fits; None if a network takes no other numbers.

        Above `checkable`, tokens are too many to keep their values.
        """
        bound = lambda trace, n: self.plan_trace(trace, self.trace(change(start))[1], change(n)).upper
        try:
            return search(lambda n: self.trace(change(n))[0], bound, self.limit, start, most, degree, checkable)
        except (SettingsError, RuntimeError, ValueError):
            return None

"""Plan a run: peak memory by part, time per step, the largest batch and sequence that fit, on this machine or another.

`estimate` traces one step (see `fieldguide.planning.trace`), models the allocator and corrects the result by the measured errors
of plans for the family (see `fieldguide.planning.errors`). Nothing is allocated.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.planning.distribution import Sharing
from fieldguide.planning.machines import Machine, get_machine
from fieldguide.planning.planner import Planner
from fieldguide.planning.sources import Make, find_longest, from_card, from_example
from fieldguide.planning.workload import Shape

__all__ = ["Estimate", "estimate", "from_card", "from_example"]

logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs errors that it also raises

MODES = ("train", "predict", "serve")
LARGEST_BATCH = 1 << 20


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
        serving: of the mode "serve": seconds of reading a prompt (prefill) and of a token of all sequences (decode), tokens per
            second, their bounds by bandwidth and by computing, and the cache of a sequence; for a network that does not
            generate, the latency and the rows per second.
        error: medians and 95th percentiles of the relative errors that were measured for this family, and the number of cells.
    """

    network: str
    family: str
    mode: str
    batch: int
    length: int
    precision: str
    dtype: str
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
    serving: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    fields: Mapping[str, Any] | None = None,
) -> Estimate:
    """Plan training or prediction without allocating anything.

    Args:
        source: name of a network, or a function from a `Shape` to a `Workload`, such as of `from_example`.
        mode: "train", "predict" or "serve". A server has `batch` sequences at a time, each of `length + new_tokens` positions.
        settings: settings of the run: precision, optimizer, ema, grad_accum_steps, grad_clip and others that decide its memory.
        batch: rows per device and step; by default that of the settings, or 32.
        length: tokens per row, and `side` pixels, where the network leaves them open.
        machine: name of a machine, `cpu` for this one, or the JSON file of a probe.
        devices: number of devices; `batch` is for each of them. `strategy` is "ddp", "fsdp", or "tensor"
            for serving, which splits each layer.
        steps: number of steps for the total time; by default that of the settings, or 1.
        dtype: of the stored weights of a network that is named.
        new_tokens: tokens that a generator writes for each row; its cache has `length + new_tokens` positions.
        keeps_best: whether the best weights so far are kept, as in a run that evaluates.
        search: find the largest batch, and length if the network has one, that fit.
        family: family of the network for the corrections; that of its card by default.
        fields: fields of the config of a network that is named, by the common vocabulary.

    Raises:
        SettingsError: for an unknown network, machine, mode or strategy.
    """
    if mode not in MODES:
        raise SettingsError(f"mode={mode!r} is none of {', '.join(MODES)}.")
    if devices < 1:
        raise SettingsError(f"devices={devices} must be at least 1.")
    if (strategy == "tensor" and mode != "serve") or (strategy == "fsdp" and mode == "serve"):
        raise SettingsError(f"strategy={strategy!r} is not for mode={mode!r}: fsdp is for training, tensor for serving.")
    settings = settings or Settings()
    if settings.precision == "auto":
        settings = settings.with_({"precision": "float32"})
    batch = batch or settings.batch_size or 32
    make: Make
    if isinstance(source, str):
        make, card, config = from_card(source, None, dtype, settings if mode == "train" else None, **(fields or {}))
        family, name = family or card.family, name or source
        longest = find_longest(card, config)
    else:
        make, longest, name = source, 0, name or "network"
    planner = Planner(make, mode, settings, get_machine(machine), Sharing(devices, strategy), family, new_tokens, keeps_best)
    shape = Shape(batch, length, side)
    try:
        step = planner.plan(shape)
    except RuntimeError as error:
        if dtype == "float32" or "scalar type" not in str(error):
            raise
        raise SettingsError(f"{name} cannot compute with {dtype} weights ({error}). Plan it with dtype=float32.") from None
    largest_batch = planner.search_batch(shape, LARGEST_BATCH) if search else None
    largest_length = planner.search_length(shape, longest) if search and longest else None
    steps = steps or (settings.steps if mode == "train" else None) or 1
    return Estimate(
        network=name,
        family=family,
        mode=mode,
        batch=batch,
        length=length,
        precision=settings.precision,
        dtype=dtype,
        optimizer=settings.optimizer if mode == "train" else "",
        machine=planner.machine.name,
        devices=devices,
        strategy=strategy if devices > 1 else "",
        parts=step.parts,
        allocated=step.allocated,
        peak=step.peak,
        upper=step.upper,
        memory=planner.machine.memory,
        fits=step.upper <= planner.limit,
        step_seconds=step.seconds,
        steps=steps,
        seconds=steps * step.seconds,
        flops=step.flops,
        largest_batch=largest_batch,
        largest_length=largest_length,
        error=planner.error,
        notes=planner.notes,
        serving=planner.plan_serving(shape, step) if mode == "serve" else None,
    )

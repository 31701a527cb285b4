"""Choice of precision, memory layout and threads by timing training steps on this machine."""

from __future__ import annotations

import copy
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from fieldguide.objectives.base import Objective

MIN_SPEEDUP = 1.1  # factor by which a choice must be faster than float32
MIN_THREAD_SPEEDUP = 1.15  # factor by which twice as many threads must be faster
MAX_THREAD_TIMING = 0.25  # fraction of the budget for timing one number of threads


@functools.cache
def multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions that multiply bfloat16; others do it by conversion, slower than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # false on other processors


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the autocast context of a precision."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def move_batch(batch: dict[str, Tensor], device: torch.device, channels_last: bool = False) -> dict[str, Tensor]:
    """Move a batch to the device; with `channels_last`, store images (B C H W) in that layout."""

    def move(t: Tensor) -> Tensor:
        t = t.to(device, non_blocking=True)
        return t.contiguous(memory_format=torch.channels_last) if channels_last and t.ndim == 4 else t

    return {name: move(t) for name, t in batch.items()}


def to_channels_last(objective: Objective) -> Objective:
    """Store the kernels of an objective in the channels-last layout."""
    return objective.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations


@contextmanager
def deterministic_kernels(strict: bool = False) -> Iterator[None]:
    """Use deterministic cuDNN algorithms inside, so that a resumed run uses the same ones.

    With `strict`, all operations are deterministic, and those that cannot be raise a `RuntimeError`.
    """
    cudnn, memory = torch.backends.cudnn, cast(Any, torch.utils.deterministic)  # the latter has no annotations
    before = cudnn.benchmark, cudnn.deterministic
    strict_before, fill_before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    cudnn.benchmark, cudnn.deterministic = False, True
    if strict:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it; read when its first handle is made
        memory.fill_uninitialized_memory = False  # only for code that reads memory it has not written
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
        if strict:
            torch.use_deterministic_algorithms(strict_before)
            memory.fill_uninitialized_memory = fill_before


@contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Use this number of CPU threads inside; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def measure_step_seconds(
    objective: Objective,
    batch: dict[str, Tensor],
    precision: str,
    channels_last: bool,
    device: torch.device,
    limit: float = float("inf"),
    repeats: int = 3,
    enough: float = 0.05,
    budget: float = float("inf"),
) -> float:
    """Return the seconds of the fastest of several forward and backward passes through all phases, on a copy.

    At least `repeats` passes are timed, and more until `enough` seconds are reached, to reduce the effect of other load.
    Timing stops early if a pass takes more than `limit` seconds, or if all passes together take more than `budget` seconds.
    """
    trial = copy.deepcopy(objective).to(device).train()
    if channels_last:
        trial = to_channels_last(trial)
    batch, best, total, turn = move_batch(batch, device, channels_last), float("inf"), 0.0, 0
    end = time.perf_counter() + budget
    while turn <= repeats or (total < enough and turn < 20):  # the first pass is a warm-up
        started = time.perf_counter()
        for phase in trial.phases:
            with autocast(device, precision):
                loss = trial(batch, phase.name)["loss"]
            loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - started
        is_over = time.perf_counter() > end
        if taken > 20 or is_over or (turn and taken > limit):  # too slow to time more passes
            return min(best, taken)
        if turn:
            best, total = min(best, taken), total + taken
        turn += 1
    return best


def choose_precision(
    objective: Objective,
    batch: dict[str, Tensor],
    device: torch.device,
    log: Callable[[str], None],
    budget: float = float("inf"),
) -> tuple[str, bool, dict[str, float]]:
    """Return the precision, whether to use channels-last, and the seconds of each choice.

    float32 is returned unless another choice is at least `MIN_SPEEDUP` times as fast. Choices are timed one after another, until
    `budget` seconds have passed. A CPU without instructions for bfloat16 is not timed with it: a step can be a hundred times slower.
    """
    has_images = any(t.ndim == 4 for t in batch.values())
    precisions = ("float32", "bfloat16") if device.type != "cpu" or multiplies_bfloat16() else ("float32",)
    choices = [(precision, layout) for layout in ((False, True) if has_images else (False,)) for precision in precisions]
    timed: dict[tuple[str, bool], float] = {}
    end = time.perf_counter() + budget
    with torch.random.fork_rng():
        for choice in choices:
            if timed and time.perf_counter() > end:
                break
            try:
                timed[choice] = measure_step_seconds(
                    objective, batch, *choice, device, limit=2 * min(timed.values(), default=float("inf")), budget=budget / 2
                )
            except RuntimeError as error:
                if choice == choices[0]:
                    raise
                # A kernel does not support this precision or layout.
                log(f"{choice[0]} is not supported here: {str(error).splitlines()[0]}")
    best = min(timed, key=timed.__getitem__)
    if timed[("float32", False)] < MIN_SPEEDUP * timed[best]:
        best = ("float32", False)
    return *best, {f"{p}{' channels-last' if c else ''}": t for (p, c), t in timed.items()}


def choose_threads(
    objective: Objective, batch: dict[str, Tensor], budget: float = float("inf")
) -> tuple[int, dict[int, float]]:
    """Return the number of CPU threads for training, and the seconds of a step in float32 for each number that was timed.

    Twice as many threads are chosen as long as they are clearly faster. Small networks are slower with several threads, which wait
    for each other after every operation; and on a busy machine, they wait for one that does not run. If a step with one thread takes
    a large part of the budget, all threads are chosen.
    """
    most, threads, timed = torch.get_num_threads(), 1, dict[int, float]()

    def measure(count: int, limit: float) -> float:
        with use_threads(count), torch.random.fork_rng():
            return measure_step_seconds(
                objective, batch, "float32", False, torch.device("cpu"), limit=limit, budget=budget * MAX_THREAD_TIMING
            )

    timed[1] = measure(1, float("inf"))
    if timed[1] > budget * MAX_THREAD_TIMING:
        return most, timed
    while threads < most:
        more = min(2 * threads, most)
        timed[more] = measure(more, timed[threads])
        if MIN_THREAD_SPEEDUP * timed[more] > timed[threads]:
            break
        threads = more
    return threads, timed

"""Precision and memory layout, chosen by timing real steps on this machine."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from fieldguide.objectives.base import Objective

MIN_SPEEDUP = 1.1  # a choice must be this much faster than plain float32 to be taken


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def move_batch(batch: dict[str, Tensor], device: torch.device, channels_last: bool = False) -> dict[str, Tensor]:
    """A batch on the device; pictures (B C H W) in channels-last order where asked."""

    def move(t: Tensor) -> Tensor:
        t = t.to(device, non_blocking=True)
        return t.contiguous(memory_format=torch.channels_last) if channels_last and t.ndim == 4 else t

    return {name: move(t) for name, t in batch.items()}


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """cuDNN tries no algorithms while inside, so a resumed run takes the same ones."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before


def measure_step_seconds(
    objective: Objective,
    batch: dict[str, Tensor],
    precision: str,
    channels_last: bool,
    device: torch.device,
    limit: float = float("inf"),
    repeats: int = 3,
    enough: float = 0.05,
) -> float:
    """Fastest of a few forward and backward passes, through every phase, on a copy: at least `repeats`, and quick ones
    for `enough` seconds, so that a moment's load of other work does not decide. Ends at once beyond `limit` seconds."""
    trial = copy.deepcopy(objective).train()
    if channels_last:
        trial = trial.to(memory_format=torch.channels_last)
    batch, best, total, turn = move_batch(batch, device, channels_last), float("inf"), 0.0, 0
    while turn <= repeats or (total < enough and turn < 20):  # the first one warms up
        started = time.perf_counter()
        for phase in trial.phases:
            with autocast(device, precision):
                loss = trial(batch, phase.name)["loss"]
            loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - started
        if taken > 20 or (turn and taken > limit):  # nobody waits for more of these
            return min(best, taken)
        if turn:
            best, total = min(best, taken), total + taken
        turn += 1
    return best


def choose_precision(
    objective: Objective, batch: dict[str, Tensor], device: torch.device, say: Callable[[str], None]
) -> tuple[str, bool, dict[str, float]]:
    """(precision, channels_last, seconds of each choice). float32 unless another choice is clearly faster."""
    pictures = any(t.ndim == 4 for t in batch.values())
    choices = [("float32", False), ("bfloat16", False)]
    if pictures:
        choices += [("float32", True), ("bfloat16", True)]
    timed: dict[tuple[str, bool], float] = {}
    with torch.random.fork_rng():
        for choice in choices:
            try:
                timed[choice] = measure_step_seconds(
                    objective, batch, *choice, device, limit=2 * min(timed.values(), default=float("inf"))
                )
            except RuntimeError as error:
                if choice == choices[0]:
                    raise
                # A kernel that lacks this precision or layout rules the choice out.
                say(f"{choice[0]} cannot be used here: {str(error).splitlines()[0]}")
    best = min(timed, key=timed.get)
    if timed[("float32", False)] < MIN_SPEEDUP * timed[best]:
        best = ("float32", False)
    return *best, {f"{p}{' channels-last' if c else ''}": t for (p, c), t in timed.items()}

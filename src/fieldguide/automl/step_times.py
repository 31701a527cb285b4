"""Measure how long a network trains on this machine, before it is chosen.

Multiply-adds alone mislead: depthwise convolutions, recurrence and small batches reach a fraction of the speed of a matrix product,
a different one on every machine. So a few steps of the best options are timed, with random weights and inputs: forward pass,
backward pass, and the update.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fieldguide.automl import profile
from fieldguide.automl.advisor import BYTES_PER_PARAMETER, Option, Variant, build_config
from fieldguide.core import distributed
from fieldguide.models import registry
from fieldguide.training.precision import autocast, use_threads

MIN_SECONDS, TIME_FRACTION = (
    1.0,
    0.015,
)  # for timing all options: at least these seconds, or this fraction of the time of training
MAX_MEMORY_FRACTION = 0.2  # of the machine's memory, for the weights and optimizer states of an option that is timed
STEPS = 4  # timed for each option; the fastest counts, since other programs only make steps slower
MAX_STEP_SECONDS = 0.3  # batches are chosen so that a step is estimated to take at most this long
MIN_BATCH, MAX_BATCH = 4, 32


class StepTimer:
    """Measures the seconds of training with one example, for several options within a limit of time.

    `speed` is the machine's estimated number of floating-point operations per second in training.
    """

    def __init__(self, machine: dict[str, Any], speed: float, minutes: float, log: Callable[[str], None] = lambda text: None):
        self.machine, self.speed, self.log = machine, speed, log
        self.left = max(MIN_SECONDS, 60 * minutes * TIME_FRACTION)
        flops = machine["flops"]
        is_faster = flops.get("bfloat16", 0) > 2 * flops["float32"]
        self.precision = "bfloat16" if is_faster else "float32"

    def __call__(self, option: Option, variant: Variant) -> float | None:
        """Return the seconds of one example; None if the network is too large, if the time is used up, or if it cannot be timed with
        random inputs: then its cost stays an estimate, which is logged.
        """
        if self.left <= 0 or option.parameters * BYTES_PER_PARAMETER > MAX_MEMORY_FRACTION * self.machine["memory"]:
            return None
        started = time.monotonic()
        limit = self.left / 3
        try:
            return self.time_steps(option, variant, limit)
        except (RuntimeError, MemoryError) as error:
            self.log(f"note: the time of {option.name} is estimated, since timing it failed: {str(error).splitlines()[0]}")
            return None
        finally:
            self.left -= time.monotonic() - started

    def time_steps(self, option: Option, variant: Variant, limit: float) -> float:
        """Return the seconds of one example with all threads, or with one thread if that is faster."""
        threads = sorted({1, torch.get_num_threads()}) if distributed.device().type == "cpu" else [torch.get_num_threads()]
        seconds = []
        for count in threads:
            with use_threads(count):
                seconds.append(self.time_with(option, variant, limit / len(threads)))
        return min(seconds)

    def time_with(self, option: Option, variant: Variant, limit: float) -> float:
        card, size = registry.find(option.name)
        facts, device = variant.facts, distributed.device()
        batch = int(MAX_STEP_SECONDS * self.speed / (6 * option.multiply_adds))
        batch = max(MIN_BATCH, min(MAX_BATCH, batch))
        best, end = float("inf"), time.monotonic() + limit
        with torch.random.fork_rng():
            config = build_config(card, size, variant.needs)
            network = card.make(config).to(device).train()
            inputs = profile.build_example_inputs(
                card, config, batch, length=facts.get("tokens", 64), side=facts.get("side", 224), device=str(device)
            )
            inputs = tuple(torch.randn_like(t) if t.is_floating_point() else t for t in inputs)
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6)
            for number in range(1 + STEPS):
                started = time.monotonic()
                with autocast(device, self.precision):
                    loss = sum_outputs(network(*inputs))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                now = time.monotonic()
                if number:  # the first step also prepares kernels
                    best = min(best, now - started)
                if now > end and (number or now - end > limit):  # one step alone may take too long
                    best = min(best, now - started)
                    break
        return best / batch


def sum_outputs(outputs: Any) -> Tensor:
    """Return a scalar that depends on every output of a network."""
    if isinstance(outputs, Tensor):
        return outputs.float().mean() if outputs.is_floating_point() else torch.zeros(())
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, list | tuple):
        return torch.stack([sum_outputs(each) for each in outputs]).sum()
    return torch.zeros(())

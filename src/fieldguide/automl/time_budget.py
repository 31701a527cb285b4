"""The time budget of a run: precision, threads, batch size and number of steps, from timing real batches.

With `deterministic=true` nothing is timed: steps take the time that they would take at a nominal speed.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from fieldguide.core import distributed
from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data.loader import Batches, representative_rows, steps_per_epoch
from fieldguide.objectives import Objective
from fieldguide.training.optim import measure_orthogonalization_seconds
from fieldguide.training.precision import choose_precision, choose_threads, measure_step_seconds, use_threads

PLANNED_TIME_FRACTION = 0.9  # fraction of the minutes that steps and evaluations are planned for
MAX_EVALUATIONS = 40  # evaluations during a run
MAX_EVALUATION_TIME_FRACTION = 0.2  # fraction of the planned time spent on evaluations
MIN_MEASURING_SECONDS, MAX_MEASURING_FRACTION = 2.0, 0.03  # of the limit, for timing steps before training
NOMINAL_STEP_SECONDS = 0.005  # of a deterministic run: the part of a step that does not depend on its examples
MAX_UPDATE_FRACTION = 1.0  # time of an update of Muon, relative to the passes, that it earns (benchmarks/defaults.py)
ENOUGH_STEPS = 1000  # below this number of steps, batches are made smaller to fit more steps into the minutes


def choose_batch_size(settings: Settings, rows: int, min_batch_size: int, max_batch_size: int) -> Settings:
    """Return the settings with a batch size.

    If the user sets none: a power of two that gives about forty steps per epoch, between `min_batch_size` and
    `max_batch_size`, at most the number of training rows. Raises `SettingsError` if there are fewer rows than micro-batches.
    """
    parts = settings.grad_accum_steps * distributed.get_world_size()
    batch = settings.batch_size or int(2 ** round(np.log2(np.clip(rows / 40, min_batch_size, max_batch_size))))
    batch = max(min(batch, rows) // parts, 1) * parts
    if batch > rows:
        raise SettingsError(
            f"{rows} training rows are fewer than the {parts} micro-batches of a step (grad_accum_steps x processes). "
            "Reduce grad_accum_steps or the number of processes."
        )
    return settings.with_({"batch_size": batch})


def resolve_settings(
    settings: Settings,
    objective: Objective,
    batches: Batches,
    validation_examples: int,
    callback: Any,
    min_batch_size: int,
    enough_steps: int = ENOUGH_STEPS,
    nominal_seconds: float = 0.0,
    time_limit: float | None = None,
    keep_optimizer: bool = True,
) -> tuple[Settings, float, int]:
    """Return the settings with precision, memory layout, steps and evaluation interval, from timing real batches.

    In a deterministic run, precision is float32 unless it is set, an example takes `nominal_seconds`, and the minutes only
    determine the number of steps: they do not limit the time. If fewer than `enough_steps` steps fit into the minutes, the
    batch is halved down to `min_batch_size`, unless the optimizer update takes most of the time. `time_limit` is the seconds of
    training; None for the minutes of the settings. Unless `keep_optimizer`, AdamW replaces Muon where that does not earn its time.

    Returns:
        The settings, the seconds per step, and the maximum number of steps if the minutes determine the number (the steps
        that would be enough on a faster machine), else 0.
    """
    nominal = settings.deterministic
    if nominal:
        precision = "float32" if settings.precision == "auto" else settings.precision
        settings = settings.with_({"precision": precision, "channels_last": bool(settings.channels_last)})
    epoch = steps_per_epoch(len(batches), settings.resolved_batch_size)
    if settings.steps and settings.precision != "auto":  # nothing to measure
        interval = settings.eval_steps or max(1, min(settings.steps, max(epoch, -(-settings.steps // MAX_EVALUATIONS))))
        return (
            settings.with_({"channels_last": bool(settings.channels_last), "eval_steps": interval}),
            float("nan"),
            0,
        )
    parts = settings.grad_accum_steps * distributed.get_world_size()
    precision, channels_last = settings.precision, bool(settings.channels_last)
    limit = 60 * settings.minutes if time_limit is None else time_limit
    budget = max(MIN_MEASURING_SECONDS, MAX_MEASURING_FRACTION * limit) if limit else float("inf")
    steps, evaluations, max_steps, update = settings.steps, MAX_EVALUATIONS, 0, 0.0

    def measure(rows: int) -> tuple[float, float]:
        """Return the seconds of a micro-batch of training, and of preparing it."""
        if nominal:
            return NOMINAL_STEP_SECONDS + rows * nominal_seconds, 0.0
        batch, batch_seconds = time_batch(batches, rows)
        with use_threads(settings.threads):
            seconds = measure_step_seconds(objective, batch, precision, channels_last, distributed.device(), budget=budget / 2)
        return seconds, batch_seconds

    if nominal:
        step, batch_seconds = measure(settings.resolved_batch_size // parts)
    else:
        batch, batch_seconds = time_batch(batches, settings.resolved_batch_size // parts)
        has_free_threads = settings.threads is None and distributed.get_world_size() == 1 and torch.get_num_threads() > 1
        if has_free_threads and distributed.device().type == "cpu":
            threads, by_threads = choose_threads(objective, batch, budget)
            if threads != torch.get_num_threads():
                settings = settings.with_({"threads": threads})
                times_text = ", ".join(f"{1000 * t:.1f} ms with {count}" for count, t in by_threads.items())
                callback.log(f"threads: a step takes {times_text}: {threads}")
        with use_threads(settings.threads):
            best, best_channels_last, times = choose_precision(objective, batch, distributed.device(), callback.log, budget)
        if precision == "auto":
            precision = best
            channels_last = best_channels_last if settings.channels_last is None else channels_last
        step = times.get(f"{precision}{' channels-last' if channels_last else ''}", min(times.values()))
        callback.log(
            "a step in "
            + ", ".join(f"{name} {1000 * t:.1f} ms" for name, t in times.items())
            + f": {precision}{', channels-last' if channels_last else ''}"
        )
        if settings.optimizer == "muon":
            update = measure_orthogonalization_seconds(objective, distributed.device())
            if not keep_optimizer and is_update_too_slow(update, step * settings.grad_accum_steps):
                callback.log(
                    f"optimizer: adamw, since an update of muon would take {update:.2g} s of a step, and the passes only "
                    f"{step * settings.grad_accum_steps:.2g} s (change this with --set optimizer=muon)"
                )
                settings, update = settings.override({"optimizer": "adamw"}), 0.0

    def seconds_per_step() -> float:
        return (step + (0 if settings.num_workers else batch_seconds)) * settings.grad_accum_steps * 1.1 + update

    if steps is None:
        epochs = settings.epochs or float(np.clip(30 * (50_000 / len(batches)) ** 0.35, 10, 200))
        while True:
            epoch = steps_per_epoch(len(batches), settings.resolved_batch_size)
            steps = max_steps = max(1, round(epoch * epochs))
            if not settings.minutes or (nominal and settings.epochs):
                max_steps = 0
                break
            planned = PLANNED_TIME_FRACTION * limit
            evaluation = validation_examples / settings.resolved_batch_size * step / 3  # a forward pass: a third of a step
            evaluations = int(np.clip(MAX_EVALUATION_TIME_FRACTION * planned / evaluation, 1, MAX_EVALUATIONS))
            steps = max(1, min(steps, int(max(planned - evaluations * evaluation, planned / 2) / seconds_per_step())))
            half = settings.resolved_batch_size // parts // 2
            update_dominates = step * settings.grad_accum_steps / 2 < update
            if steps >= min(enough_steps, max_steps) or half * parts < min_batch_size or update_dominates:
                break
            settings = settings.with_({"batch_size": half * parts})
            step, batch_seconds = measure(half)
    interval = settings.eval_steps or max(1, min(steps, max(epoch, -(-steps // evaluations))))
    if nominal:
        settings, max_steps = settings.with_({"minutes": 0}), 0
    changes = {"precision": precision, "channels_last": channels_last, "steps": steps, "eval_steps": interval}
    return settings.with_(changes), seconds_per_step(), max_steps


def is_update_too_slow(update: float, passes: float) -> bool:
    """Return whether Muon's update takes more of a step, relative to the passes, than it saves in steps."""
    return update > MAX_UPDATE_FRACTION * passes


def time_batch(batches: Batches, rows: int) -> tuple[dict[str, torch.Tensor], float]:
    """Return a typical training batch and the seconds that preparing it took."""
    index, started = representative_rows(batches, rows), time.perf_counter()
    batch = batches.make(index, torch.Generator().manual_seed(0))
    return batch, time.perf_counter() - started

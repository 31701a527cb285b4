"""How many steps the minutes hold, of how many examples, in which precision: found by timing real batches."""

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
from fieldguide.training.precision import choose_precision, measure_step_seconds

BUDGET = 0.9  # part of the minutes that the planned steps take; the rest is for evaluations and surprises
CHECKS = 40  # evaluations in a whole run, at most
ENOUGH = 1000  # steps that a run should have: where time allows fewer, batches are made smaller
CHECKED = 0.2  # part of the time that they may take


def with_batch(settings: Settings, rows: int, fewest: int, most: int) -> Settings:
    """A batch size: about forty steps an epoch, a power of two from `fewest` to `most`, never more than there are rows."""
    parts = settings.grad_accum_steps * distributed.world()
    batch = settings.batch_size or 2 ** round(np.log2(np.clip(rows / 40, fewest, most)))
    batch = max(min(batch, rows) // parts, 1) * parts
    if batch > rows:
        raise SettingsError(f"{rows} training rows are too few for {parts} parts a step.")
    return settings.with_({"batch_size": batch})


def resolve(
    settings: Settings, objective: Objective, batches: Batches, evaluated: int, callback: Any, fewest: int, enough: int = ENOUGH
) -> tuple[Settings, float, int]:
    """Fills in precision, layout, steps and evaluations by timing real batches; makes the batch smaller, down to `fewest`
    examples, where the minutes would hold fewer steps than `enough`, unless it is the optimiser that takes the time.

    Returns seconds a step too and, where the minutes decide on the steps, the count that is enough however quick they
    are; else 0.
    """
    each = steps_per_epoch(len(batches), settings.batch_size)
    if settings.steps and settings.precision != "auto":  # nothing is left to decide
        return (
            settings.with_(
                {
                    "channels_last": bool(settings.channels_last),
                    "eval_steps": settings.eval_steps or max(1, min(settings.steps, max(each, -(-settings.steps // CHECKS)))),
                }
            ),
            float("nan"),
            0,
        )
    parts = settings.grad_accum_steps * distributed.world()
    batch, making = timed_batch(batches, settings.batch_size // parts)
    precision, last, times = settings.precision, bool(settings.channels_last), {}
    chosen, chosen_last, times = choose_precision(objective, batch, distributed.device(), callback.log)
    if precision == "auto":
        precision = chosen
        last = chosen_last if settings.channels_last is None else last
    step = times.get(f"{precision}{' channels-last' if last else ''}", min(times.values()))
    callback.log(
        "a step in "
        + ", ".join(f"{name} {1000 * t:.1f} ms" for name, t in times.items())
        + f": {precision}{', channels-last' if last else ''}"
    )
    steps, checks, most = settings.steps, CHECKS, 0
    update = measure_orthogonalization_seconds(objective, distributed.device()) if settings.optimizer == "muon" else 0.0
    cost = lambda: (step + (making if not settings.num_workers else 0)) * settings.grad_accum_steps * 1.1 + update
    if steps is None:
        epochs = settings.epochs or float(np.clip(30 * (50_000 / len(batches)) ** 0.35, 10, 200))
        while True:
            each = steps_per_epoch(len(batches), settings.batch_size)
            steps = most = max(1, round(each * epochs))
            if not settings.minutes:
                most = 0
                break
            limit = 60 * settings.minutes * BUDGET
            check = evaluated / settings.batch_size * step / 3  # an evaluation costs a third of a step an example
            checks = int(np.clip(CHECKED * limit / check, 1, CHECKS))
            steps = max(1, min(steps, int(max(limit - checks * check, limit / 2) / cost())))
            half = settings.batch_size // parts // 2
            if steps >= min(enough, most) or half * parts < fewest or step * settings.grad_accum_steps / 2 < update:
                break
            settings = settings.with_({"batch_size": half * parts})
            batch, making = timed_batch(batches, half)
            step = measure_step_seconds(objective, batch, precision, last, distributed.device())
    evaluate = settings.eval_steps or max(1, min(steps, max(each, -(-steps // checks))))
    return settings.with_({"precision": precision, "channels_last": last, "steps": steps, "eval_steps": evaluate}), cost(), most


def timed_batch(batches: Batches, rows: int) -> tuple[dict[str, torch.Tensor], float]:
    """A typical batch for training, and the seconds that making it took."""
    index, started = representative_rows(batches, rows), time.perf_counter()
    batch = batches.make(index, torch.Generator().manual_seed(0))
    return batch, time.perf_counter() - started

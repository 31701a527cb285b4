"""Other networks in the time that is left where training ends early: on small data, or because its score no longer improves.

They are those that race if there is time for it (`race.choose_options`), and also those that lost, since a race is short. Each is
trained to its end, if there is time for it, and the one with the best score on the same validation rows becomes the model of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fieldguide.automl.baselines import Baseline
from fieldguide.automl.build_plan import Plan
from fieldguide.automl.callbacks import NullCallback
from fieldguide.automl.race import choose_options
from fieldguide.core.errors import FieldguideError
from fieldguide.training.state import Interrupted
from fieldguide.training.trainer import Trainer

MIN_SECONDS = 20.0  # of training in all, below which nothing else is tried
MIN_TIMES = 1.5  # the time that is left, relative to the longest training so far


def train_further(plan: Plan, loop: Trainer, build: Callable[..., Any], callback: Any) -> list[tuple[Plan, Trainer, float]]:
    """Return trained plans of other networks, their loops, and the seconds that each took.

    `loop` has trained `plan`; `build` returns the training loop of a plan. Raises `Interrupted` after a signal.
    """
    found: list[tuple[Plan, Trainer, float]] = []
    total = plan.training_seconds or 0.0
    longest, left = loop.state.seconds, total - loop.state.seconds
    for option in [plan.advice.best, *choose_options(plan.advice)]:
        if option.name == plan.size:
            continue
        if total < MIN_SECONDS or left < MIN_TIMES * longest:
            break
        started = time.monotonic()
        callback.on_phase(f"training {option.name} in the time that is left")
        try:
            other = plan.build_contender(option, NullCallback())
            other.training_seconds = left - (time.monotonic() - started)
            trainer = build(other, NullCallback())
            trainer.train()
            found.append((other, trainer, time.monotonic() - started))
        except Interrupted:
            raise
        except FieldguideError as error:
            callback.log(f"{option.name} is not compared: {str(error).splitlines()[0]}")
        longest, left = max(longest, time.monotonic() - started), left - (time.monotonic() - started)
    return found


def describe(plan: Plan, loop: Trainer, seconds: float) -> Baseline:
    """Return a trained network as a model that the run is compared with."""
    score = float("nan") if loop.state.best is None else loop.state.best
    chosen = f"trained for {loop.state.step:,} steps"
    return Baseline(plan.card, plan.config, plan.objective, score, chosen, seconds, plan.task, size=plan.size)

"""Training the chosen model again on training and validation rows together (`--refit`).

The number of steps, the penalty or the number of trees stay as chosen on the validation rows, in proportion to the rows, and so
do temperature and threshold.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from fieldguide.automl import baselines
from fieldguide.automl.build_plan import Plan
from fieldguide.checkpoints import load
from fieldguide.core import distributed
from fieldguide.core.settings import Settings
from fieldguide.data.splits import Splits
from fieldguide.training import peft
from fieldguide.training.state import State
from fieldguide.training.trainer import Trainer

TIME_FRACTION = 0.45  # of the training time that is kept for training again


def refit(plan: Plan, settings: Settings, state: State, weights: str | None, callback: Any) -> dict[str, Any]:
    """Put a model into the plan that is trained on all rows outside of the test; return what run.json says about it.

    `settings` are those that training ended with, since steps and batches may have been replanned. `weights` is the checkpoint that
    the run started from, if any.
    """
    splits = plan.splits
    rows = np.concatenate([splits.train, splits.validation])
    factor = len(rows) / len(splits.train)
    callback.on_phase(f"training again on {len(rows):,} training and validation rows")
    whole = replace(plan, splits=Splits(rows, splits.validation, splits.test, splits.description), settings=plan.settings)
    whole.validation, whole.validation_rows = plan.validation, plan.validation_rows
    if plan.card.solver:
        plain = plan.settings.with_({"augmentation": "none", "mixup": 0})
        whole.train_batches = plan.task.train_batches(plan.source.take(rows), plan.card, plain)
        fixed = dict(plan.parameters)
        if "rounds" in fixed:
            fixed["rounds"] = max(1, round(fixed["rounds"] * factor))
        network = plan.objective.model if plan.card.fits_network else None
        fitted = baselines.solve(whole, plan.card, plan.config, math.inf, callback, fixed=fixed, network=network)
        plan.config, plan.objective = fitted.config, fitted.objective
        return {"rows": len(rows), "chosen": fitted.chosen}
    steps = max(1, round(state.best_step * factor))
    settings = settings.with_({"steps": steps, "eval_steps": steps, "patience": 0})
    whole.settings = settings
    whole.train_batches = plan.task.train_batches(plan.source.take(rows), plan.card, settings)
    checkpoint = None
    if plan.fresh is not None and weights is not None:
        checkpoint = load.inspect_checkpoint(weights, None, callback.log, download=False)
    whole.build_objective(callback, checkpoint, {"finetune": settings.finetune})
    loop = Trainer(
        whole.objective, whole.train_batches, settings, device=distributed.device(), callback=callback, time_limit=0.0
    )
    callback.on_train_start(settings, 0)
    loop.train()
    plan.updates = peft.merge(whole.objective.model)
    plan.objective = whole.objective
    return {"rows": len(rows), "steps": steps}

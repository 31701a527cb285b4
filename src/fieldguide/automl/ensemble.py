"""An ensemble of the trained network and one baseline, if that is better than both beyond noise.

Trees and networks err on different rows, so their mean is often better than the better one of them. Its weight is one of
`WEIGHTS`, by the validation score. The ensemble becomes the model of the run if, over bootstrap samples of the validation rows, it is
better than the better of the two with a probability of at least `MIN_PROBABILITY`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fieldguide.automl.baselines import Baseline, share_batches
from fieldguide.automl.race import compute_win_probability
from fieldguide.core import distributed
from fieldguide.objectives.supervised import Supervised
from fieldguide.tasks.evaluator import Arrays
from fieldguide.training.inference_loop import collect

if TYPE_CHECKING:
    from fieldguide.automl.build_plan import Plan

WEIGHTS = (0.25, 0.5, 0.75)  # of the baseline
MIN_PROBABILITY = 0.95


def find_ensemble(plan: Plan, rivals: list[Baseline], own: float | None) -> tuple[Baseline, float, float] | None:
    """Return the baseline, its weight and the validation score of the best ensemble; None if none is clearly better than its members.

    `own` is the network's validation score.
    """
    task, metric = plan.task, plan.task.monitored_metric()
    able = [r for r in rivals if type(r.objective) is Supervised and r.task is task and share_batches(r.card, plan.card)]
    if (
        own is None
        or type(plan.objective) is not Supervised
        or not able
        or plan.settings.refit
        or distributed.get_world_size() > 1
    ):
        return None
    sign = 1 if metric.better == "max" else -1
    targets = task.targets(plan.source.take(plan.validation_rows))
    outputs = predict(plan, plan.objective)
    found: list[tuple[float, Baseline, float, Arrays, Arrays]] = []
    for rival in able:
        others = predict(plan, rival.objective)
        single = outputs if sign * own >= sign * rival.score else others
        for weight in WEIGHTS:
            mixed = {name: (1 - weight) * values + weight * others[name] for name, values in outputs.items()}
            found.append((sign * task.score(mixed, targets)[metric.name], rival, weight, mixed, single))
    score, rival, weight, mixed, single = max(found, key=lambda entry: entry[0])
    if score <= max(sign * own, *(sign * each.score for each in rivals)):
        return None
    if compute_win_probability(task, mixed, single, targets, metric.name, sign) < MIN_PROBABILITY:
        return None
    return rival, weight, sign * score


def predict(plan: Plan, objective: Any) -> Arrays:
    """Return the outputs of an objective on the validation rows."""
    return collect(objective, plan.validation, batch=256, device=distributed.device(), shared=False)

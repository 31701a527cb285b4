"""Frozen features: the head of a pretrained network as a linear model, fitted in seconds before fine-tuning begins.

The network computes the inputs of its last layer once for each training row, without augmentation, and a logistic or ridge
regression on them becomes the layer, with the penalty that scores best on the validation rows. With little data that is often as
good as fine-tuning, which starts from there (Kumar et al. 2022, arXiv:2202.10054); the better of the two by validation score is
kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fieldguide.core import distributed
from fieldguide.core.errors import TrainingError
from fieldguide.data.loader import Batches, iterate_in_order
from fieldguide.objectives import Supervised
from fieldguide.training import solvers
from fieldguide.training.precision import autocast, move_batch

if TYPE_CHECKING:
    from fieldguide.automl.build_plan import Plan
    from fieldguide.training.state import State

HEAD = "head"
BATCH = 64
BLOCK = 1024  # rows that are sorted by length together; the blocks are in random order, so any number of them is a sample
MAX_TIME_FRACTION = 0.3  # of the minutes, for features and fits; more training rows are left out
VALIDATION_FRACTION, FEATURES_FRACTION = 0.4, 0.7  # of that time, after which the features of validation and training rows end
MIN_ROWS_PER_CLASS = 2
NO_LIMIT_PASSES = 3  # without a time limit: a forward pass costs a third of a step, so no more than training itself


@dataclass
class FrozenFit:
    """The score of frozen features on the validation rows, and how it came about."""

    score: float
    chosen: str  # such as the penalty
    rows: int  # training rows that were used
    seconds: float

    def describe(self) -> dict[str, Any]:
        """Return the entry of run.json."""
        return {"validation": self.score, "chosen": self.chosen, "rows": self.rows, "seconds": round(self.seconds, 2)}


def is_possible(plan: Plan) -> bool:
    """Return whether the network has a new linear head, and the loss is that of plain classification or regression.

    Not if the user asks for `finetune=whole` or `lora`: then that is what is trained.
    """
    head = getattr(plan.objective.model, HEAD, None)
    return (
        type(plan.objective) is Supervised
        and isinstance(head, nn.Linear)
        and head.bias is not None
        and f"{HEAD}.weight" in (plan.fresh or ())
        and not plan.settings.class_weights
        and plan.requested.get("finetune", "frozen") == "frozen"
    )


def fit_frozen(plan: Plan, callback: Any) -> FrozenFit | None:
    """Fit the head of the plan's network in place; return None if it cannot be fitted, and leave it as it is."""
    callback.on_phase("training a linear head on frozen features")
    started = time.monotonic()
    head: Any = plan.objective.model.head
    found: Any = None
    if distributed.rank() == 0:
        before = {name: t.clone() for name, t in head.state_dict().items()}
        try:
            found = solve(plan, head, started)
        except TrainingError as error:
            callback.log(f"note: no linear head on frozen features: {error}")
            head.load_state_dict(before)
        found = found and (*found, {name: t.cpu() for name, t in head.state_dict().items()})
    found = distributed.broadcast(found)
    if found is None:
        return None
    score, chosen, rows, weights = found
    head.load_state_dict(weights)
    metric, seconds = plan.task.monitored_metric(), time.monotonic() - started
    total = len(plan.train_batches)
    sampled = "" if rows == total else f" of {rows:,} of {total:,} training rows"
    callback.log(
        f"frozen features{sampled} with a linear head: {metric.heading} {metric.text(score)} on validation rows in "
        f"{seconds:.1f} s ({chosen})"
    )
    return FrozenFit(score, chosen, rows, seconds)


def solve(plan: Plan, head: nn.Linear, started: float) -> tuple[float, str, int]:
    """Fit the head; return its score, what was chosen, and the number of training rows."""
    minutes, total = plan.settings.minutes, len(plan.train_batches)
    is_limited = bool(minutes) and not plan.settings.deterministic
    limit = MAX_TIME_FRACTION * 60 * minutes if is_limited else math.inf
    most = min(total, solvers.MAX_VALUES // head.in_features)
    if not is_limited:
        most = min(most, NO_LIMIT_PASSES * plan.settings.resolved_steps * plan.settings.resolved_batch_size)
    rows = iterate_blocks(np.arange(len(plan.validation)))
    held, _ = collect_inputs(plan, head, plan.validation, rows, started + VALIDATION_FRACTION * limit)
    if len(held) < len(plan.validation):
        raise TrainingError(f"scoring {len(plan.validation):,} validation rows takes too long for the given minutes.")
    order = np.random.default_rng(plan.settings.seed).permutation(total)[:most]
    x, y = collect_inputs(plan, head, plan.train_batches, iterate_blocks(order), started + FEATURES_FRACTION * limit)
    if len(x) < total and len(x) < MIN_ROWS_PER_CLASS * head.out_features:
        raise TrainingError(f"only {len(x):,} of {total:,} training rows could be read in the time for it.")
    targets = plan.task.targets(plan.source.take(plan.validation_rows))
    metric = plan.task.monitored_metric()
    sign = 1 if metric.better == "max" else -1
    features = torch.from_numpy(held).to(head.weight.device)

    @torch.inference_mode()
    def score(layer: nn.Module) -> float:
        outputs = plan.objective.loss.outputs(layer(features))  # type: ignore[union-attr, operator]  # `is_possible` checked it
        return sign * plan.task.score({name: t.float().cpu().numpy() for name, t in outputs.items()}, targets)[metric.name]

    problem = solvers.Problem(
        card=plan.card,
        config=plan.config,
        train=plan.train_batches,
        validation=plan.validation,
        score=score,
        deadline=started + limit,
        seed=plan.settings.seed,
    )
    best, weights = solvers.keep_best(
        problem, ((chosen, head, {}) for chosen, _ in solvers.iterate_heads(head, x, y, deadline=problem.deadline))
    )
    if not math.isfinite(best.score):
        raise TrainingError("the validation score is not finite.")
    head.load_state_dict(weights)
    return sign * best.score, best.chosen, len(x)


def iterate_blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield consecutive blocks of rows."""
    return (rows[first : first + BLOCK] for first in range(0, len(rows), BLOCK))


@torch.inference_mode()
def collect_inputs(
    plan: Plan, head: nn.Linear, batches: Batches, blocks: Iterator[np.ndarray], deadline: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs of the head (N x F) and the targets, of all rows of the blocks that are done before the deadline.

    If all blocks are, the rows are in the order of their numbers. Raises `TrainingError` if the head reads more than vectors.
    """
    objective: Any = plan.objective.to(distributed.device())
    captured: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: captured.append(args[0].float().cpu()))
    numbers: list[np.ndarray] = []
    features: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    objective.eval()
    try:
        for index, batch in (each for block in blocks for each in iterate_in_order(batches, BATCH, block)):
            if features and time.monotonic() > deadline:
                break
            with autocast(distributed.device(), plan.settings.precision):
                objective.compute_predictions(move_batch(batch, distributed.device()))
            if len(captured) != 1 or captured[0].ndim != 2:
                raise TrainingError("the last layer of this network does not read one vector for each example.")
            numbers.append(index)
            features.append(captured.pop().numpy())
            if "target" in batch:
                targets.append(batch["target"].numpy())
    finally:
        handle.remove()
    order = np.argsort(np.concatenate(numbers), kind="stable")
    return np.concatenate(features)[order], np.concatenate(targets)[order] if targets else np.empty(0)


def describe_outcome(plan: Plan, frozen: FrozenFit, state: State) -> str:
    """Return which of frozen features and fine-tuning is kept."""
    metric = plan.task.monitored_metric()
    frozen_text = f"frozen features {metric.text(frozen.score)} in {frozen.seconds:.1f} s"
    if state.best_step == 0:
        return f"{frozen_text}; {state.seconds:.1f} s of fine-tuning gave no better {metric.title}, so they are kept"
    return f"{frozen_text}; fine-tuning {metric.text(state.best)} in {state.seconds:.1f} s more, which is kept"

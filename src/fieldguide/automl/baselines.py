"""Baselines of a run: simple models that are fitted in seconds, and that a network must beat to be worth its cost.

They are cards like all others (`Card.solver`), so the one that scores best on the validation rows can become the run's model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fieldguide.automl.advisor import build_config
from fieldguide.checkpoints import hub, load
from fieldguide.core import distributed
from fieldguide.core.card import Card
from fieldguide.core.errors import FieldguideError
from fieldguide.data.dataset import Data
from fieldguide.data.loader import Batches
from fieldguide.models import registry
from fieldguide.objectives import Objective, Supervised
from fieldguide.tasks import Task, evaluator
from fieldguide.training import solvers
from fieldguide.training.inference_loop import collect
from fieldguide.training.state import State

if TYPE_CHECKING:
    from fieldguide.automl.build_plan import Plan

MAX_TIME_FRACTION = 0.2  # fraction of the minutes that fitting one baseline may take


@dataclass
class Baseline:
    """A fitted baseline: its card and config, the objective around it, and its validation score."""

    card: Card
    config: Any
    objective: Objective
    score: float  # monitored metric on the validation rows
    chosen: str  # what the fit chose, such as the penalty
    seconds: float
    task: Task  # whose preprocessing its inputs need; a network that starts from a checkpoint has its own
    parameters: Mapping[str, Any] = field(default_factory=dict)  # of the fit, to repeat it with other rows
    size: str = ""  # name of a size of the card; the default one if empty
    is_replaced: bool = False  # a network whose place a baseline took

    @property
    def name(self) -> str:
        return self.size or self.card.default

    def describe(self) -> dict[str, Any]:
        """Return the entry of run.json."""
        return {
            "name": self.name,
            "network": self.is_replaced,
            "validation": self.score,
            "chosen": self.chosen,
            "seconds": round(self.seconds, 2),
        }


def share_batches(a: Card, b: Card) -> bool:
    """Return whether two cards take the same batches."""
    same = ("input_type", "number_scale", "has_class_token", "optional_inputs", "reads_whole_rows")
    return all(getattr(a, name) == getattr(b, name) for name in same)


def make_scores(plan: Plan, card: Card, objective: Objective, batches: Batches) -> tuple[Any, Any]:
    """Return the functions from a network, and from its raw outputs, to the validation score, where higher is better."""
    targets, metric = plan.task.targets(plan.source.take(plan.validation_rows)), plan.task.monitored_metric()
    sign = 1 if metric.better == "max" else -1

    def score(network: nn.Module) -> float:
        objective.model = network.to(distributed.device())
        outputs = collect(objective, batches, batch=256, device=distributed.device(), shared=False)
        return sign * plan.task.score(outputs, targets)[metric.name]

    def score_outputs(values: Tensor) -> float:
        outputs = objective.loss.outputs(values)  # type: ignore[union-attr, operator]  # that of a supervised objective
        return sign * plan.task.score({name: t.numpy() for name, t in outputs.items()}, targets)[metric.name]

    return score, score_outputs if isinstance(objective, Supervised) else None


def solve(
    plan: Plan,
    card: Card,
    config: Any,
    deadline: float,
    callback: Any,
    fixed: Mapping[str, Any] | None = None,
    network: nn.Module | None = None,
) -> Baseline:
    """Fit one model without gradient descent, in the first of several processes.

    `fixed` are the parameters of an earlier fit; `network` has the pretrained weights of a card that needs them.
    """
    started, task = time.monotonic(), plan.task
    plain = plan.settings.with_({"augmentation": "none", "mixup": 0})
    if share_batches(card, plan.card):
        train, validation = plan.train_batches, plan.validation
    else:
        train = task.train_batches(plan.source.take(plan.splits.train), card, plain)
        validation = task.batches(plan.source.take(plan.validation_rows), card, plain)
    objective = task.objective(card.make(config), card, plain)
    solution: Any = None
    if distributed.rank() == 0:
        score, score_outputs = make_scores(plan, card, objective, validation)
        problem = solvers.Problem(
            card=card,
            config=config,
            train=train,
            validation=validation,
            score=score,
            score_outputs=score_outputs,
            deadline=deadline,
            seed=plan.settings.seed,
            network=network,
            fixed=fixed,
            log=callback.log,
        )
        try:
            solution = solvers.solve(problem)
        except (FieldguideError, MemoryError) as error:
            solution = error  # for the other processes, which wait for a solution
    solution = distributed.broadcast(solution)
    if isinstance(solution, Exception):
        raise solution
    objective.model = solution.network.to(distributed.device())
    objective.eval()
    sign = 1 if task.monitored_metric().better == "max" else -1
    return Baseline(
        card=card,
        config=solution.network.config,
        objective=objective,
        score=sign * solution.score,
        chosen=solution.chosen,
        parameters=solution.parameters,
        seconds=time.monotonic() - started,
        task=task,
    )


def fit_baselines(plan: Plan, callback: Any) -> list[Baseline]:
    """Fit the baselines that the task names. One that cannot be fitted is left out with a note."""
    found: list[Baseline] = []
    names = [name for name in plan.task.baseline_models if name != plan.card.name]
    minutes = math.inf if plan.settings.deterministic or not plan.settings.minutes else plan.settings.minutes
    for name in names:
        card = registry.card(name)
        callback.on_phase(f"fitting a baseline ({name})")
        deadline = time.monotonic() + MAX_TIME_FRACTION * 60 * minutes
        try:
            config = build_config(card, card.default, {"output_type": plan.task.output_types, **plan.task.model_dims()})
            found.append(solve(plan, card, config, deadline, callback))
        except (FieldguideError, MemoryError) as error:
            plan.task.add_note(f"the baseline {name} could not be fitted: {error}")
    metric = plan.task.monitored_metric()
    if found:
        scores = ", ".join(f"{b.name} {metric.text(b.score)} in {b.seconds:.1f} s" for b in found)
        callback.log(f"baselines, {metric.heading} on validation rows: {scores}")
    return found


def fit_downloaded(plan: Plan, callback: Any) -> Baseline | None:
    """Fit a public network that predicts from labeled rows, if one suits the data and was downloaded before."""
    from fieldguide.automl import pretrained

    facts = pretrained.read_facts(plan.source, plan.task.name, plan.settings)
    row = pretrained.choose(facts, lambda row: pretrained.reads_context(row) and hub.is_downloaded(row.path))
    if row is None:
        return None
    callback.on_phase(f"fitting a baseline ({row.path})")
    minutes = math.inf if plan.settings.deterministic or not plan.settings.minutes else plan.settings.minutes
    try:
        found = load.inspect_checkpoint(row.location, None, callback.log, download=False)
        config = found.build_config({"output_type": plan.task.output_types, **plan.task.model_dims()}, {})
        network = load.build_network(found.card, asdict(config), found.state, found.origin, row.path)
        deadline = time.monotonic() + MAX_TIME_FRACTION * 60 * minutes
        fitted = solve(plan, found.card, config, deadline, callback, network=network)
    except (FieldguideError, MemoryError) as error:
        plan.task.add_note(f"{row.path} could not be used: {error}")
        return None
    fitted.size = found.size
    metric = plan.task.monitored_metric()
    callback.log(
        f"{row.describe()} with {fitted.chosen}: {metric.heading} {metric.text(fitted.score)} on validation rows in "
        f"{fitted.seconds:.1f} s"
    )
    return fitted


def find_better(plan: Plan, baselines: list[Baseline], own: float | None) -> Baseline | None:
    """Return the baseline with the best validation score, if that is better than the network's own."""
    sign = 1 if plan.task.monitored_metric().better == "max" else -1
    best = max(baselines, key=lambda b: sign * b.score, default=None)
    if best is None or (own is not None and math.isfinite(own) and sign * best.score <= sign * own):
        return None
    return best


def predict(plan: Plan, rival: Baseline, test: Data) -> evaluator.Baseline:
    """Return the outputs of a baseline on test rows, as they are scored."""
    task = rival.task.for_request(rival.task.predict_options)  # its notes are not those of the run
    batches = task.batches(test, rival.card)
    outputs = collect(rival.objective, batches, batch=256, device=distributed.device(), shared=False)
    return evaluator.Baseline(rival.name, rival.chosen, outputs)


class SolverLoop:
    """The training of a run whose model is fitted without gradient descent, with the interface of `Trainer`."""

    tracker = None

    def __init__(self, plan: Plan, callback: Any):
        self.plan, self.callback, self.settings, self.state = plan, callback, plan.settings, State()

    def resume(self) -> bool:
        """Return False: there are no checkpoints, since fitting takes seconds."""
        return False

    def train(self) -> State:
        """Fit the model of the plan and put it into the plan."""
        plan, minutes = self.plan, self.settings.minutes
        self.callback.on_phase(f"fitting {plan.card.name}")
        is_limited = bool(minutes) and not self.settings.deterministic
        deadline = time.monotonic() + (plan.training_seconds or 60 * minutes) if is_limited else math.inf
        network = plan.objective.model.cpu() if plan.card.fits_network else None
        fitted = solve(plan, plan.card, plan.config, deadline, self.callback, network=network)
        plan.config, plan.objective, plan.parameters = fitted.config, fitted.objective, fitted.parameters
        self.callback.log(f"{plan.card.name}: {fitted.chosen}")
        self.state = State(step=1, best_step=1, best=fitted.score, seconds=fitted.seconds)
        return self.state

    finish = train

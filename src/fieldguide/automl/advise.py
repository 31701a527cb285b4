"""`advise`: which networks suit some data and this machine, why, what they cost and which score to expect, without training."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fieldguide.automl import evidence, pretrained, race
from fieldguide.automl.advisor import TARGET_EPOCHS, Option
from fieldguide.automl.build_plan import Plan
from fieldguide.automl.callbacks import NullCallback
from fieldguide.automl.choose_network import Choice, choose_network
from fieldguide.automl.clock import Clock
from fieldguide.automl.request import build_request, group_settings, read_for
from fieldguide.core.errors import FieldguideError
from fieldguide.core.settings import Settings
from fieldguide.data.samples import SAMPLES
from fieldguide.tasks.spec import Metric

MAX_CANDIDATES = 6
TRIVIAL_ROWS = 2000  # validation rows that the trivial score is computed from
BASELINE_SECONDS = 5.0  # that fitting one baseline may take
BATCH = 32  # examples per step, for the planned memory


@dataclass(frozen=True)
class Candidate:
    """A network that suits the data, with its cost on this machine.

    Attributes:
        input_size: such as pixels per side, if it is reduced to save time; else 0.
        epoch_seconds: of one pass over the training rows.
        epochs: passes that fit into the time of training; infinite without a limit.
        is_measured: whether the time was measured on this machine, rather than estimated from multiply-adds.
        peak_bytes: planned memory of training at its peak, with batches of 32; None if it cannot be planned.
        expected: low, median and high of the expected score (80 % of the cases); None without evidence.
        evidence: data sets that the expectation comes from, nearest first.
    """

    name: str
    parameters: int
    multiply_adds: int
    input_size: int
    points: float
    epoch_seconds: float
    epochs: float
    is_measured: bool
    peak_bytes: int | None
    expected: tuple[float, float, float] | None
    evidence: tuple[str, ...]
    reasons: tuple[str, ...]
    against: tuple[str, ...]


@dataclass(frozen=True)
class DataAdvice:
    """What `fit` would do with some data.

    Attributes:
        task, why: the task, and how it follows from the data.
        rows: number of training, validation and test rows.
        facts: what the rules know of the data.
        machine: device, cores, memory in bytes, floating-point operations per second by precision.
        minutes: of the whole run; `training_minutes` of it for training.
        metric: the score that selects the model.
        candidates: networks, the first choice first.
        rejected: networks that were ruled out, with the reason.
        baselines: models that are fitted in seconds and compared with the network, with their validation scores; None for those
            that take longer.
        racing: candidates that would train against each other; one if there is no race.
        pretrained: the line about public weights; empty if none suit.
        notes: of the task about the data.
    """

    data: str
    task: str
    why: str
    rows: dict[str, int]
    facts: dict[str, Any]
    machine: dict[str, Any]
    minutes: float
    training_minutes: float
    metric: Metric
    candidates: list[Candidate]
    rejected: list[tuple[str, str]]
    baselines: dict[str, float | None]
    racing: tuple[str, ...]
    pretrained: str
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON."""
        return asdict(self)


def advise(
    data: Any,
    target: str | None = None,
    *,
    task: str | None = None,
    model: str = "auto",
    minutes: float | None = None,
    seed: int = 0,
    group: str | None = None,
    time_column: str | None = None,
    allow_bad: bool = False,
    settings: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    callback: NullCallback | None = None,
    memory: bool = True,
    baselines: bool = True,
) -> DataAdvice:
    """Return which networks suit some data and this machine, and what `fit` would do. No network is trained, and nothing is
    downloaded.

    The parameters are those of `fit`. `memory` plans the memory of each candidate, which takes a second or two for each. `baselines`
    fits those that take seconds: their scores show how hard the data is.

    Raises
    ------
    DataError : the data cannot be used; the message says what to do.
    SettingsError : a setting is unknown or cannot work, or no network suits the data.
    """
    clock = Clock(callback or NullCallback())
    if minutes is None and isinstance(data, str) and data in SAMPLES and "minutes" not in (settings or {}):
        minutes = SAMPLES[data].minutes
    requested, *_ = group_settings(settings or {})
    limits = {"seed": seed} if minutes is None else {"seed": seed, "minutes": minutes}
    chosen = Settings().with_(requested | limits)
    request = build_request(
        data,
        target=target,
        group=group,
        time_column=time_column,
        allow_bad=allow_bad,
        task=task,
        model=model,
        settings=settings,
    )
    clock.on_phase("reading the data")
    source, _, why = read_for(request, data)
    choice = choose_network(
        source,
        task=request["task"],
        why=why,
        model=model,
        minutes=minutes,
        seed=seed,
        settings=settings,
        callback=clock,
        weights=None if weights == pretrained.AUTO else weights,  # which would download
        clock=clock,
    )
    clock.on_phase("planning time and memory")
    trivial, metric = measure_trivial(choice), choice.task.monitored_metric()
    clock.on_phase("fitting baselines")
    fitted: dict[str, float | None] = fit_baselines(choice) if baselines else dict.fromkeys(choice.task.baseline_models)
    sign = 1 if metric.better == "max" else -1
    best = max((s for s in fitted.values() if s is not None and s == s), key=lambda s: sign * s, default=None)
    skill = None
    if best is not None and trivial is not None:  # on few rows, no error may be luck
        skill = min(evidence.to_skill(best, trivial, metric.better), 1 - 1 / len(choice.splits.validation))
    found = choice.advice
    _ = found.best  # raises if there is none
    kind = choice.task
    splits = choice.splits
    return DataAdvice(
        data=str(request["data"]),
        task=kind.name,
        why=choice.why,
        rows={"training": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)},
        facts=dict(kind.data_facts()),
        machine=choice.machine,
        minutes=chosen.minutes,
        training_minutes=choice.minutes,
        metric=metric,
        candidates=[describe_option(o, choice, trivial, skill, memory) for o in found.options[:MAX_CANDIDATES]],
        rejected=[(o.name, o.rejected) for o in {o.architecture: o for o in found.rejected if o.rejected}.values()],
        baselines=fitted,
        racing=tuple(list_racing(choice)),
        pretrained=pretrained.suggest(choice.source, kind.name, chosen, model) if weights is None else f"weights: {weights}",
        notes=list(kind.notes),
    )


def describe_option(option: Option, choice: Choice, trivial: float | None, baseline: float | None, memory: bool) -> Candidate:
    """Return an option with its cost and the score to expect. `baseline` is the skill of the best baseline."""
    rows, metric = len(choice.splits.train), choice.task.monitored_metric()
    epoch = option.seconds / TARGET_EPOCHS
    epochs = 60 * choice.minutes / epoch if epoch > 0 else math.inf
    found = evidence.expect(choice.task.name, option.name, option.architecture, rows, rows * min(epochs, 1e6), baseline)
    expected = None
    if found and trivial is not None:
        low, median, high = (evidence.to_score(s, trivial, metric.better) for s in (found.low, found.median, found.high))
        expected = (min(low, high), median, max(low, high))
    return Candidate(
        name=option.name,
        parameters=option.parameters,
        multiply_adds=option.multiply_adds,
        input_size=option.input_size,
        points=round(option.points, 2),
        epoch_seconds=epoch,
        epochs=epochs,
        is_measured=option.is_measured,
        peak_bytes=plan_memory(option, choice) if memory else None,
        expected=expected,
        evidence=found.data if found else (),
        reasons=tuple(option.reasons),
        against=tuple(option.against),
    )


def plan_memory(option: Option, choice: Choice) -> int | None:
    """Return the planned peak of training with batches of 32; None if the network cannot be traced."""
    from fieldguide.automl.advisor import build_config
    from fieldguide.models import registry
    from fieldguide.planning import estimate as planning

    task = choice.task.with_input_size(option.input_size) if option.input_size else choice.task
    facts = task.data_facts()
    card, size = registry.find(option.name)
    if card.solver:
        return None
    try:
        config = choice.config or build_config(
            card, size, {"output_type": task.output_types, **task.model_dims()}, choice.model_fields
        )
        make, card, _ = planning.from_card(option.name, config)
        settings = Settings().with_(task.recipe).with_(card.recipe).override(choice.requested)
        planned = planning.estimate(
            make,
            mode="train",
            settings=settings,
            batch=min(BATCH, len(choice.splits.train)),
            length=facts.get("tokens", 64),
            side=facts.get("side", 224),
            family=card.family,
            name=option.name,
            keeps_best=True,
            search=False,
        )
    except (FieldguideError, NotImplementedError):
        return None
    return planned.peak


def measure_trivial(choice: Choice) -> float | None:
    """Return the best validation score of the references that are no models; None if they cannot be scored without a network."""
    task, metric = choice.task, choice.task.monitored_metric()
    train, held = choice.source.take(choice.splits.train), choice.source.take(choice.splits.validation[:TRIVIAL_ROWS])
    sign = 1 if metric.better == "max" else -1
    try:
        task.prepare_test(train, held)
        targets = task.targets(held)
        scores = [task.score(b.outputs, targets)[metric.name] for b in task.baselines(train, held) if not b.bound]
    except (FieldguideError, NotImplementedError, KeyError):
        return None
    return max((float(s) for s in scores if s == s), key=lambda s: sign * s, default=None)


def fit_baselines(choice: Choice) -> dict[str, float | None]:
    """Return the validation scores of the baselines of a task, each fitted within `BASELINE_SECONDS`; None if one fails."""
    from fieldguide.automl.advisor import build_config
    from fieldguide.automl.baselines import solve
    from fieldguide.models import registry

    task, found = choice.task, dict[str, float | None]()
    for name in task.baseline_models:
        card = registry.card(name)
        try:
            config = build_config(card, card.default, {"output_type": task.output_types, **task.model_dims()})
            plan = Plan(choice.source, task, choice.why, choice.splits, card, card.default, config, Settings(), choice.advice)
            plan.complete(choice.requested, NullCallback())
            found[name] = solve(plan, card, config, time.monotonic() + BASELINE_SECONDS, NullCallback()).score
        except (FieldguideError, MemoryError):
            found[name] = None
    return found


def list_racing(choice: Choice) -> list[str]:
    """Return the candidates that `fit` would let race."""
    first = choice.advice.best
    if choice.checkpoint is not None or not race.has_time(60 * choice.minutes):
        return [first.name]
    return [first.name, *(o.name for o in race.choose_options(choice.advice, race.choose_rules(60 * choice.minutes)))]

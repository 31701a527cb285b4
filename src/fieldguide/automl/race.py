"""The race: several networks train for equal time on the user's data, and the best one goes on.

Contenders are the first choice of the rules, the next best architectures, and a public checkpoint if one that suits the data was
downloaded before; its linear head on frozen features is fitted first, and fine-tuning goes on from there. Each is planned for the
whole training time, so its learning rate hardly falls during the race; its averaged weights are scored on the same validation rows.
After each round, those that are worse than the leader with high probability (paired bootstrap over rows) are dropped. The winner goes
on from its weights.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fieldguide.automl import frozen_features, pretrained, profile
from fieldguide.automl.advisor import Advice, Option
from fieldguide.automl.build_plan import Plan
from fieldguide.automl.callbacks import NullCallback
from fieldguide.automl.frozen_features import FrozenFit
from fieldguide.checkpoints import hub
from fieldguide.core import distributed
from fieldguide.core.errors import FieldguideError, SettingsError
from fieldguide.core.hardware import ram
from fieldguide.tasks.evaluator import Arrays, Evaluator
from fieldguide.training.inference_loop import collect
from fieldguide.training.state import Interrupted
from fieldguide.training.trainer import Trainer

MIN_SECONDS = 90.0  # of training, from which on there is a race
MIN_SECONDS_OF_LONG_RACE = 240.0  # of training
MAX_POINTS_BETWEEN_SIZES = 1.0  # behind the first choice, for another size of its architecture
MAX_MEMORY_FRACTION = 0.1  # of the machine's memory, for the weights and optimizer states of one contender
BYTES_PER_PARAMETER = 20  # weight, gradient, two moments and an average in float32
MIN_PROBABILITY = 0.05  # contenders that are better than the leader with a lower probability are dropped
LEAST_SCORE = 0.1  # of the leader, below which none is dropped: who begins to learn first is not who learns most
BOOTSTRAP_REPEATS = 100
MAX_BOOTSTRAP_SECONDS = 3.0


@dataclass(frozen=True)
class Rules:
    """Who may race, and for how long.

    Attributes:
        contenders: the most networks that race.
        points: that a network may be behind the first choice of the advisor.
        rounds: fractions of the training time, for each contender in each round.
    """

    contenders: int
    points: float
    rounds: tuple[float, ...]


LONG = Rules(contenders=3, points=6.0, rounds=(0.06, 0.06, 0.08))
# Each network that loses costs the winner a part of its time, which counts more if time is short.
SHORT = Rules(contenders=2, points=1.0, rounds=(0.05, 0.05))


@dataclass
class Contender:
    """A network in the race."""

    plan: Plan
    loop: Trainer
    seconds: float = 0.0
    scores: list[float] = field(default_factory=list)  # monitored metric after each round
    outputs: Arrays | None = None  # on the validation rows
    dropped: str = ""  # why it left the race
    probability: float | None = None  # of being better than the leader, after its last round
    frozen: FrozenFit | None = None  # of a pretrained network: its linear head on frozen features

    def describe(self) -> dict[str, Any]:
        """Return the entry of run.json."""
        return {
            "name": self.plan.size,
            "scores": self.scores,
            "seconds": round(self.seconds, 2),
            "steps": self.loop.state.step,
            "dropped": self.dropped,
            "probability": self.probability,
            **({"weights": self.plan.weights} if self.plan.weights else {}),
            **({"frozen": self.frozen.describe()} if self.frozen else {}),
        }


def is_open(plan: Plan, request: Mapping[str, Any]) -> bool:
    """Return whether other networks may be tried: the user left the choice and the number of steps open."""
    return (
        request["model"] == "auto"
        and request["weights"] is None
        and not any(key.startswith("model.") for key in request["settings"])
        and plan.task.compares_networks
        and not plan.card.solver
        and not plan.objective.starts_from_teacher
        and not plan.settings.deterministic
        and plan.max_steps > 0
        and distributed.get_world_size() == 1
    )


def is_possible(plan: Plan, request: Mapping[str, Any]) -> bool:
    """Return whether networks may race: the choice is open, and there is time for it."""
    return is_open(plan, request) and has_time(plan.training_seconds or 0.0)


def has_time(seconds: float) -> bool:
    """Return whether there is enough time of training for a race."""
    return MIN_SECONDS <= seconds < math.inf


def choose_rules(seconds: float) -> Rules:
    """Return the rules of a race within some seconds of training."""
    return LONG if seconds >= MIN_SECONDS_OF_LONG_RACE else SHORT


def choose_options(advice: Advice, rules: Rules = LONG) -> list[Option]:
    """Return the options that race against the first choice: the best of other architectures that are not far behind, and another
    size of the same architecture if its points are nearly equal.
    """
    first, found = advice.best, {advice.best.architecture}
    chosen: list[Option] = []
    for option in advice.options[1:]:
        is_near = option.points >= first.points - rules.points
        fits = option.parameters * BYTES_PER_PARAMETER < MAX_MEMORY_FRACTION * ram()
        is_twin = option.architecture == first.architecture and option.points >= first.points - MAX_POINTS_BETWEEN_SIZES
        is_twin = is_twin and first.architecture not in (o.architecture for o in chosen)
        if is_near and fits and (is_twin or option.architecture not in found) and len(chosen) < rules.contenders - 1:
            chosen.append(option)
            found.add(option.architecture)
    return chosen


class Race:
    """A race between plans of the same examples. `build` returns the training loop of a plan."""

    def __init__(self, plan: Plan, build: Any, callback: Any):
        self.plan, self.build, self.callback = plan, build, callback
        self.metric = plan.task.monitored_metric()
        self.sign = 1 if self.metric.better == "max" else -1
        self.left = float(plan.training_seconds or 0.0)
        started = time.monotonic()
        self.rules = choose_rules(self.left)
        options = choose_options(plan.advice, self.rules)
        self.contenders: list[Contender] = []
        if options:
            callback.on_phase(f"preparing a race of {1 + len(options)} networks")
            plans = [copy.copy(plan)]  # `plan` becomes the winner
            for option in options:
                try:
                    plans.append(plan.build_contender(option, NullCallback()))
                except FieldguideError as error:
                    callback.log(f"{option.name} does not race: {error}")
            self.contenders = [Contender(each, build(each, NullCallback())) for each in plans]
        if (contender := self.build_pretrained()) is not None:
            first = copy.copy(plan)
            self.contenders = [*(self.contenders or [Contender(first, build(first, NullCallback()))]), contender]
        self.left -= time.monotonic() - started

    def build_pretrained(self) -> Contender | None:
        """Return the contender that starts from a public checkpoint; None if none suits that was downloaded before."""
        plan = self.plan
        facts = pretrained.read_facts(plan.source, plan.task.name, plan.settings)
        if (
            row := pretrained.choose(facts, lambda row: hub.is_downloaded(row.path) and not pretrained.reads_context(row))
        ) is None:
            return None
        self.callback.on_phase(f"preparing {row.path} for the race")
        try:
            tuned = plan.build_pretrained(row.location, NullCallback())
            if not has_same_targets(plan, tuned):
                raise SettingsError("its targets are not comparable with those of the other networks.")
            frozen = frozen_features.fit_frozen(tuned, self.callback) if frozen_features.is_possible(tuned) else None
            loop = self.build(tuned, NullCallback())
            if tuned.task.scores_untrained and tuned.fresh == []:
                loop.objective.to(distributed.device())
                loop.evaluate_and_keep_best()
        except FieldguideError as error:
            self.callback.log(f"{row.path} does not race: {error}")
            return None
        if frozen is not None:
            loop.start_from_scored(frozen.score)
        return Contender(tuned, loop, frozen=frozen)

    def run(self) -> bool:
        """Run the race and put the winner into the plan; return False if there is only one network.

        Raises `Interrupted` after a signal; then the leader so far is the winner.
        """
        if len(self.contenders) < 2:
            return False
        alive = list(self.contenders)
        total = self.left
        try:
            for number, fraction in enumerate(self.rules.rounds):
                names = ", ".join(c.plan.size for c in alive)
                self.callback.on_phase(f"racing (round {number + 1}): {names}")
                for contender in alive:
                    self.train_slice(contender, fraction * total)
                alive = self.drop(alive)
                self.callback.log(f"race, round {number + 1}: " + "; ".join(self.describe(c) for c in self.contenders))
                if len(alive) == 1:
                    break
        finally:
            self.winner = self.find_leader()
            self.plan.become(self.winner.plan)
        self.winner.loop.callback = self.callback
        self.winner.loop.limit_time(self.winner.loop.state.seconds + self.left)
        self.plan.training_seconds = self.winner.loop.time_limit
        for contender in self.contenders:
            if contender is not self.winner and not contender.dropped:
                contender.dropped = "not the best after the last round"
        return True

    def train_slice(self, contender: Contender, seconds: float) -> None:
        """Train a contender for some seconds, and score it."""
        loop, started = contender.loop, time.monotonic()
        try:
            loop.train(pause_at=loop.state.seconds + seconds)
        except Interrupted:
            raise
        except FieldguideError as error:
            contender.dropped, contender.outputs = str(error).splitlines()[0], None
        contender.seconds += time.monotonic() - started
        if not contender.dropped:
            contender.outputs = self.predict(contender)
            score = self.plan.task.score(contender.outputs, self.targets(contender))[self.metric.name]
            contender.scores.append(score)
        self.left -= time.monotonic() - started

    def targets(self, contender: Contender) -> Arrays:
        return self.plan.task.targets(self.plan.source.take(contender.plan.validation_rows))

    def predict(self, contender: Contender) -> Arrays:
        """Return the outputs of the best weights so far on the validation rows."""
        loop = contender.loop
        now = {name: t.detach().clone() for name, t in loop.kept.state_dict().items()}
        if loop.best is not None:
            loop.kept.load_state_dict(loop.best)
        outputs = collect(
            loop.objective, contender.plan.validation, batch=256, device=distributed.device(), precision=loop.settings.precision
        )
        loop.kept.load_state_dict(now)
        return outputs

    def find_leader(self) -> Contender:
        """Return the contender with the best last score; the first choice of the rules if there is none."""
        scored = [c for c in self.contenders if c.outputs is not None and np.isfinite(c.scores[-1])]  # none that failed
        return max(scored, key=lambda c: max(self.sign * s for s in c.scores), default=self.contenders[0])

    def drop(self, alive: list[Contender]) -> list[Contender]:
        """Return the contenders that stay in the race."""
        leader, kept = self.find_leader(), []
        if self.sign > 0 and 0 <= max(leader.scores, default=1.0) < LEAST_SCORE:
            return [contender for contender in alive if not contender.dropped]  # nothing is learnt yet
        for contender in alive:
            if contender.dropped:
                continue
            if contender is not leader:
                contender.probability = better = self.compare(contender, leader)
                if better < MIN_PROBABILITY:
                    contender.dropped = f"better than {leader.plan.size} with a probability of {100 * better:.0f} %"
                    continue
            kept.append(contender)
        return kept

    def compare(self, contender: Contender, leader: Contender) -> float:
        """Return the probability that a contender is better than the leader, by resampling the same rows for both."""
        assert contender.outputs is not None and leader.outputs is not None
        return compute_win_probability(
            self.plan.task, contender.outputs, leader.outputs, self.targets(leader), self.metric.name, self.sign
        )

    def describe(self, contender: Contender) -> str:
        score = self.metric.text(contender.scores[-1]) if contender.scores else "no score"
        return f"{contender.plan.size} {score}{' (out)' if contender.dropped else ''}"

    def to_record(self) -> dict[str, Any]:
        """Return what run.json holds about the race."""
        return {
            "metric": self.metric.name,
            "winner": self.winner.plan.size,
            "seconds": round(sum(c.seconds for c in self.contenders), 2),
            "would_change": self.list_changes(),
            "contenders": [contender.describe() for contender in self.contenders],
            "not_raced": [asdict(option) for option in self.plan.advice.options if option.name not in self.names()][:10],
        }

    def list_changes(self) -> list[str]:
        """Return what would change the choice."""
        found = [
            f"{c.plan.size} is better than {self.winner.plan.size} with a probability of {100 * c.probability:.0f} %: more validation "
            "rows or a longer race may decide for it"
            for c in self.contenders
            if c is not self.winner and c.probability is not None and c.probability >= MIN_PROBABILITY
        ]
        first = self.contenders[0]
        if first is not self.winner:
            found.append(f"without a race, {first.plan.size} would have been trained, the first choice of the rules")
        larger = [
            c.plan.size for c in self.contenders if c is not self.winner and count_weights(c) > 2 * count_weights(self.winner)
        ]
        if larger:
            found.append(f"with many more minutes or examples, a larger network may win: {', '.join(larger)}")
        return found

    def names(self) -> set[str]:
        return {contender.plan.size for contender in self.contenders}


def count_weights(contender: Contender) -> int:
    return profile.count_parameters(contender.plan.objective.model)


def has_same_targets(a: Plan, b: Plan) -> bool:
    """Return whether two plans are scored against the same targets, so that their outputs can be compared row by row."""
    found = [plan.task.targets(plan.source.take(plan.validation_rows[:100])) for plan in (a, b)]
    return found[0].keys() == found[1].keys() and all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def compute_win_probability(
    evaluator: Evaluator, outputs: Arrays, others: Arrays, targets: Arrays, metric: str, sign: int, seed: int = 0
) -> float:
    """Return how often the outputs score better than others, over bootstrap samples of the same rows; ties count half."""
    rng, count = np.random.default_rng(seed), len(next(iter(targets.values())))
    wins, repeats, end = 0.0, 0, time.monotonic() + MAX_BOOTSTRAP_SECONDS
    while repeats < BOOTSTRAP_REPEATS and (repeats < 10 or time.monotonic() < end):
        rows = rng.integers(0, count, count)
        take = lambda arrays: {name: values[rows] for name, values in arrays.items()}  # noqa: B023  # used at once
        own, other = (evaluator.score(take(each), take(targets))[metric] for each in (outputs, others))
        wins += 0.5 if own == other else float(sign * own > sign * other)
        repeats += 1
    return wins / repeats

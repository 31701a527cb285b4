"""Expected scores, from recorded trainings of networks on other data (evidence.csv).

A score is compared across data sets as a skill: 0 for the best reference that is no model, such as the most frequent class, 1 for a
perfect score. The skill of a planned training is expected to be like that of recorded ones which are near it: the same task and
network, as many training rows, as many examples seen. Where a baseline was fitted, such as a linear model, its skill shows how hard
the data is, and what is expected is the factor between the errors (1 - skill) of network and baseline.

Data sets differ more than trainings on one of them, so each counts once, and one imagined data set with any result is added.
`benchmarks/learning_curves.py` records trainings, and `benchmarks/fit_rules.py` writes the table and measures how well scores are
predicted for data sets that are left out.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

OTHER_MODEL, OTHER_ARCHITECTURE = 0.5, 2.0  # distances to a training of another size, and of another architecture
DOUBLINGS_PER_DISTANCE = 3.0  # doublings of the rows or the examples seen that count as a distance of 1
MAX_DISTANCE = 4.0  # of trainings that are considered
QUANTILES = (0.1, 0.5, 0.9)
PRIOR_WEIGHT = 0.3  # of the imagined data set, where a recorded one at distance 0 has 1
PRIOR_SKILLS = (0.02, 0.2, 0.4, 0.6, 0.8, 0.98)
PRIOR_FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0)  # of the error of the baseline
MIN_ERROR = 1e-3  # 1 - skill at least, for factors


@dataclass(frozen=True)
class Training:
    """A recorded training."""

    data: str
    task: str
    model: str
    architecture: str
    rows: int  # training rows
    examples: float  # seen in training: steps times batch
    skill: float
    baseline: float | None = None  # skill of the best baseline on the same rows


@dataclass(frozen=True)
class Expectation:
    """Quantiles of the expected skill, and the data sets that they come from."""

    low: float
    median: float
    high: float
    data: tuple[str, ...]


@functools.cache
def load_trainings() -> tuple[Training, ...]:
    text = files(__package__).joinpath("evidence.csv").read_text(encoding="utf-8")
    return tuple(
        Training(
            row["data"],
            row["task"],
            row["model"],
            row["architecture"],
            int(row["rows"]),
            float(row["examples"]),
            float(row["skill"]),
            float(row["baseline"]) if row["baseline"] else None,
        )
        for row in csv.DictReader(text.splitlines())
    )


def get_perfect(better: str, values: Sequence[float]) -> float:
    """Return the perfect score of a metric: 0 for errors and losses, else 1, or 100 if scores go that far."""
    return 0.0 if better == "min" else 100.0 if max(values) > 1.5 else 1.0


def to_skill(score: float, trivial: float, better: str) -> float:
    """Return how far a score is from the trivial one (0) to the perfect one (1)."""
    perfect = get_perfect(better, (score, trivial))
    return (score - trivial) / (perfect - trivial) if perfect != trivial else 0.0


def to_score(skill: float, trivial: float, better: str, scale: float = 0.0) -> float:
    """Return the score of a skill. `scale` is any other score of the same metric, which shows whether 1 or 100 is perfect."""
    return trivial + skill * (get_perfect(better, (trivial, scale)) - trivial)


def expect(
    task: str,
    model: str,
    architecture: str,
    rows: int,
    examples: float,
    baseline: float | None = None,
    trainings: Sequence[Training] | None = None,
) -> Expectation | None:
    """Return the expected skill of a training; None if nothing near it was recorded.

    `baseline` is the skill of the best baseline on this data.
    """
    near = [t for t in (load_trainings() if trainings is None else trainings) if t.task == task]
    if baseline is not None:
        near = [t for t in near if t.baseline is not None]
    weights = np.array([math.exp(-compute_distance(t, model, architecture, rows, examples)) for t in near])
    kept = weights >= math.exp(-MAX_DISTANCE)
    if not kept.any():
        return None
    near, weights = [t for t, k in zip(near, kept) if k], weights[kept]
    order = [near[i].data for i in np.argsort(-weights)]
    for name in set(order):  # a data set counts as much as its nearest training
        own = np.array([t.data == name for t in near])
        weights[own] *= weights[own].max() / weights[own].sum()
    prior: tuple[float, ...] = PRIOR_SKILLS if baseline is None else PRIOR_FACTORS
    values = [t.skill if baseline is None else get_factor(t.skill, t.baseline or 0.0) for t in near]
    found = compute_quantiles([*values, *prior], [*weights, *[PRIOR_WEIGHT / len(prior)] * len(prior)])
    if baseline is not None:
        found = sorted(1 - factor * max(1 - baseline, MIN_ERROR) for factor in found)
    low, median, high = found
    return Expectation(low, median, high, tuple(dict.fromkeys(order)))


def get_factor(skill: float, baseline: float) -> float:
    """Return the error of a network as a fraction of that of the baseline."""
    return max(1 - skill, MIN_ERROR) / max(1 - baseline, MIN_ERROR)


def compute_quantiles(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return the quantiles of weighted values."""
    order = np.argsort(values)
    sorted_values, sorted_weights = np.asarray(values)[order], np.asarray(weights)[order]
    reached = (np.cumsum(sorted_weights) - sorted_weights / 2) / sorted_weights.sum()
    return np.interp(QUANTILES, reached, sorted_values).tolist()


def compute_distance(training: Training, model: str, architecture: str, rows: int, examples: float) -> float:
    doublings = abs(math.log2(max(rows, 1) / training.rows)) + abs(math.log2(max(examples, 1) / training.examples))
    other = 0.0 if training.model == model else OTHER_MODEL if training.architecture == architecture else OTHER_ARCHITECTURE
    return doublings / DOUBLINGS_PER_DISTANCE + other

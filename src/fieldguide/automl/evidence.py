"""Expected scores, from recorded trainings of networks on other data (evidence.csv).

A score is compared across data sets as a skill: 0 for the best reference that is no model, such as the most frequent class, 1 for a
perfect score. The skill of a planned training is expected to be like that of recorded ones which are near it: the same task and
network, as many training rows, as many examples seen. `benchmarks/learning_curves.py` records trainings, and
`benchmarks/fit_rules.py` writes the table and measures how well scores are predicted for data sets that are left out.
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
    task: str, model: str, architecture: str, rows: int, examples: float, trainings: Sequence[Training] | None = None
) -> Expectation | None:
    """Return the expected skill of a training; None if nothing near it was recorded."""
    near = [t for t in (load_trainings() if trainings is None else trainings) if t.task == task]
    distances = np.array([compute_distance(t, model, architecture, rows, examples) for t in near])
    if not len(near) or distances.min() > MAX_DISTANCE:
        return None
    weights = np.where(distances <= MAX_DISTANCE, np.exp(-distances), 0.0)
    order = np.argsort([t.skill for t in near])
    skills, weights = np.array([t.skill for t in near])[order], weights[order]
    reached = (np.cumsum(weights) - weights / 2) / weights.sum()
    low, median, high = np.interp(QUANTILES, reached, skills)
    named = tuple(dict.fromkeys(t.data for t, d in sorted(zip(near, distances), key=lambda p: p[1]) if d <= MAX_DISTANCE))
    return Expectation(float(low), float(median), float(high), named)


def compute_distance(training: Training, model: str, architecture: str, rows: int, examples: float) -> float:
    doublings = abs(math.log2(max(rows, 1) / training.rows)) + abs(math.log2(max(examples, 1) / training.examples))
    other = 0.0 if training.model == model else OTHER_MODEL if training.architecture == architecture else OTHER_ARCHITECTURE
    return doublings / DOUBLINGS_PER_DISTANCE + other

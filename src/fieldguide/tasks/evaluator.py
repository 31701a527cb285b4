"""The evaluator of a task: scores, their confidence intervals, calibration, and the baselines to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fieldguide.data.dataset import Data

Arrays = dict[str, np.ndarray]  # name -> array whose first axis is the example

MAX_RESAMPLES, MIN_RESAMPLES = 300, 60  # of the test rows, for intervals
MAX_RESAMPLED_VALUES = 15_000_000  # outputs that are scored in all resamples; the minimum may exceed it


@dataclass(frozen=True)
class Baseline:
    """A reference to compare with: its outputs on the test rows, scored exactly like the model's outputs."""

    name: str
    what: str
    outputs: Arrays
    bound: bool = False  # True for an upper bound: the best result that can be expected


class Evaluator:
    """Scores outputs against targets. Both are arrays, so that an evaluator needs neither a model nor files."""

    scores_untrained: ClassVar[bool] = (
        False  # a complete pretrained network is scored before it is trained, and may stay as it is
    )
    max_validation_examples: ClassVar[int | None] = None  # maximum validation rows scored during training
    baseline_models: ClassVar[tuple[str, ...]] = ()  # architectures that are fitted in seconds, to compare networks with
    max_test_examples: ClassVar[int | None] = None  # maximum test rows that are predicted; set if prediction is slow
    prediction_passes: ClassVar[float] = 1.0  # time of a prediction, in forward passes of training: more if it is generated

    def prepare_test(self, train: Data, held: Data) -> None:
        """Compute from the training rows what the test's scores and elements need in addition to the targets."""

    def estimate_scoring_seconds(self) -> float:
        """Return the seconds that the test takes besides its predictions, for tasks that train networks to score them."""
        return 0.0

    def prepare_scoring(self, rows: int) -> None:
        """Receive the number of examples that are about to be predicted and scored."""

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        """Return every metric of `metrics` that the outputs allow; during training, at least the monitored one."""
        raise NotImplementedError

    def collect_outputs(self, records: Sequence[Mapping[str, Any]]) -> Arrays | None:
        """Return the arrays that `score` takes, from records of predictions; None if records do not hold them."""
        return None

    def find_doubts(self, targets: Arrays) -> list[str]:
        """Return reasons why scores on these targets would say little, for example that all targets are equal."""
        return []

    def suggest_metric(self) -> tuple[str, str]:
        """Return the name of the metric that suits the training data and the reason; empty texts for the task's own choice."""
        return "", ""

    def calibrate(self, outputs: Arrays, targets: Arrays) -> None:
        """Fit the parameters of `postprocess` on the trained model's outputs for the validation rows."""

    def postprocess(self, outputs: Arrays) -> Arrays:
        """Return the outputs as they are scored and formatted, for example with calibrated probabilities."""
        return outputs

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        """Return the 95 % confidence interval of every metric, by resampling examples."""
        return bootstrap_intervals(self, outputs, targets)

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        """Return references that are no models, such as always predicting the most frequent class."""
        raise NotImplementedError


def bootstrap_intervals(
    evaluator: Evaluator, outputs: Arrays, targets: Arrays, *, repeats: int = MAX_RESAMPLES, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return bootstrap intervals of every metric over examples (Efron 1979; percentile method).

    There are fewer than `repeats` resamples if outputs are many, for example the probabilities of a hundred classes.
    """
    rng, count = np.random.default_rng(seed), len(next(iter(targets.values())))
    values = sum(array.size for array in outputs.values())
    repeats = min(repeats, max(MIN_RESAMPLES, MAX_RESAMPLED_VALUES // max(values, 1)))
    drawn: dict[str, list[float]] = {}
    for _ in range(repeats):
        rows = rng.integers(0, count, count)
        for name, value in evaluator.score(
            {k: v[rows] for k, v in outputs.items()}, {k: v[rows] for k, v in targets.items()}
        ).items():
            drawn.setdefault(name, []).append(value)
    tails = [50 * (1 - level), 50 * (1 + level)]
    undefined = (float("nan"), float("nan"))  # for example the AUC of a single class
    return {
        name: undefined if np.isnan(values).all() else tuple(np.nanpercentile(values, tails).tolist())
        for name, values in drawn.items()
    }

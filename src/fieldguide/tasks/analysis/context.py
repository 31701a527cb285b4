"""What analyses of a tested model start from, and the time that they may take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fieldguide.data.dataset import Data
from fieldguide.tasks.evaluator import Arrays

MIN_ANALYSIS_SECONDS = 5.0
MAX_ANALYSIS_FRACTION = 0.05  # of the training time, if that is more


class Deadline:
    """A moment after which an optional computation stops, with what it has so far."""

    def __init__(self, seconds: float):
        self.seconds, self.end = seconds, time.monotonic() + seconds

    @classmethod
    def after_training(cls, seconds: float, most: float = math.inf) -> Deadline:
        """Return the deadline of all analyses after this training time; they take at most `most` seconds."""
        return cls(min(max(MIN_ANALYSIS_SECONDS, MAX_ANALYSIS_FRACTION * seconds), most))

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.end - time.monotonic()

    @property
    def is_over(self) -> bool:
        return self.left <= 0

    def part(self, fraction: float) -> Deadline:
        """Return the deadline of one of several computations: a fraction of the whole time, if that much is left."""
        return Deadline(min(fraction * self.seconds, self.left))


@dataclass
class ReportContext:
    """A tested model: its test rows with outputs and targets, and functions that compute the outputs of other examples.

    `predict` takes rows as they are before preprocessing, `predict_batch` a batch of tensors; both return post-processed outputs.
    `make_batch` returns the tensors of rows. `seconds_per_example` is how long the test took.
    """

    test: Data
    outputs: Arrays
    targets: Arrays
    predict: Callable[[Data], Arrays]
    make_batch: Callable[[Data], dict[str, Any]]
    predict_batch: Callable[[dict[str, Tensor]], Arrays]
    deadline: Deadline
    seconds_per_example: float = 0.0

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """Return at most `count` random test rows, in order."""
        return np.sort(np.random.default_rng(seed).permutation(len(self.test))[:count])


def take_rows(arrays: Arrays, rows: np.ndarray) -> Arrays:
    """Return outputs or targets of some examples."""
    return {name: values[rows] for name, values in arrays.items()}

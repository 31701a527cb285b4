"""The clock of a run: how long each part takes, and when the minutes are over.

The minutes of a run include everything: reading, baselines, training, the test and the report.
"""

from __future__ import annotations

import time
from typing import Any

from fieldguide.automl.callbacks import NullCallback

# First word of the name of a phase -> the part of a run that it belongs to
PARTS = {
    "reading": "reading",
    "checking": "reading",
    "fitting": "preparing",
    "choosing": "planning",
    "preparing": "preparing",
    "measuring": "planning",
    "racing": "race",
    "training": "training",
    "testing": "testing",
    "computing": "testing",
    "analyzing": "report",
}
FIXED_RESERVE = 4.0  # seconds that report and start of the test take at least
RESERVE_FRACTION = 0.03  # of the minutes, for the same
TEST_FACTOR = 2.0  # the test and its analyses take this many forward passes over the test rows
MAX_RESERVE_FRACTION = 0.4  # of the minutes that are kept for the test
MIN_TRAINING_FRACTION = 0.25  # of the minutes that training gets, even if everything else was slow


class Clock(NullCallback):
    """A callback that measures the parts of a run, and passes every event on to another callback.

    `start` is the moment on `time.monotonic` from which the minutes count.
    """

    def __init__(self, callback: Any):
        self.callback, self.start = callback, time.monotonic()
        self.parts: dict[str, float] = {}
        self.part, self.since = "reading", self.start
        for name in (n for n in vars(NullCallback) if not n.startswith("_") and n not in vars(Clock)):
            setattr(self, name, getattr(callback, name))

    def enter(self, part: str) -> None:
        """End the present part and begin another one."""
        now = time.monotonic()
        self.parts[self.part] = self.parts.get(self.part, 0.0) + now - self.since
        self.part, self.since = part, now

    def on_phase(self, name: str, total: int | None = None) -> None:
        word = name.split()[0]
        self.enter("baselines" if "baseline" in name and word == "fitting" else PARTS.get(word, self.part))
        self.callback.on_phase(name, total)

    def on_train_start(self, settings: Any, done: int) -> None:
        self.enter("training")
        self.callback.on_train_start(settings, done)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def summarize(self) -> dict[str, float]:
        """Return the seconds of each part so far."""
        self.enter(self.part)
        return {name: round(seconds, 2) for name, seconds in self.parts.items()}

    def describe(self) -> str:
        """Return how long the run took, and each part of it that took a hundredth or more."""
        parts = self.summarize()
        total = sum(parts.values())
        shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items() if seconds >= 0.01 * total)
        return f"{total:.1f} s in all: {shown} s"


def get_training_seconds(minutes: float, elapsed: float, test_seconds: float, scoring_seconds: float = 0.0) -> float:
    """Return the seconds that training may take; 0 if there is no limit.

    Args:
        minutes: for the whole run; 0 for no limit.
        elapsed: seconds that have passed before training.
        test_seconds: estimated seconds of one forward pass over the test rows.
        scoring_seconds: estimated seconds of the test besides predictions.
    """
    total = 60 * minutes
    reserve = FIXED_RESERVE + RESERVE_FRACTION * total + TEST_FACTOR * test_seconds + scoring_seconds
    reserve = min(reserve, MAX_RESERVE_FRACTION * total)
    return max(total - elapsed - reserve, MIN_TRAINING_FRACTION * total)

"""The state of training that checkpoints hold, and what observers of training are told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from fieldguide.core.errors import TrainingError


class Interrupted(TrainingError):
    """Raised on Ctrl-C, SIGTERM or SIGHUP, after the state was saved. `fieldguide fit --resume` continues the run."""


class Callback(Protocol):
    """Interface of an observer of training, such as a progress bar."""

    def on_step(self, step: int, losses: dict[str, float]) -> None: ...
    def on_evaluate(self, step: int, scores: dict[str, float], best: bool) -> None: ...
    def log(self, text: str) -> None: ...
    def on_replan(self, steps: int) -> None: ...


@dataclass
class State:
    """State of training that is saved in a checkpoint as JSON, in addition to the tensors."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
    seconds: float = 0.0  # training time, including time before resumptions
    sums: dict[str, float] = field(default_factory=dict)
    summed: int = 0
    stopped: str = ""  # reason why training ended before its last step
    most: int = 0  # upper limit of the steps if they follow from the minutes; else 0
    steps: int = 0  # steps as replanned during training; 0 = as in the settings
    evaluate: int = 0  # steps between evaluations as replanned during training; 0 = as in the settings
    batch: int = 0  # examples per step as replanned during training; 0 = as in the settings
    repeatable: bool = True  # False once measured time, or the user, has changed when training ends

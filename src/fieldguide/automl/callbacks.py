"""Callbacks that receive the progress of `fit`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fieldguide.core.settings import Settings
    from fieldguide.data.dataset import Data
    from fieldguide.tasks import Task


class NullCallback:
    """Base class of the callbacks of `fit`; it ignores every event. Override the methods of interest."""

    def log(self, text: str) -> None:
        """Receive one line for the user."""

    def on_phase(self, name: str, total: int | None = None) -> None:
        """Receive the name of the phase that begins, and the number of examples it works on, if known."""

    def on_progress(self, done: int) -> None:
        """Receive the number of examples of the present phase that are done."""

    def on_data(self, data: Data, task: type[Task], why: str) -> None:
        """Receive the data as read and the task with the reason for it."""

    def on_plan(self, advice: Any, config: Any) -> None:
        """Receive the ranked architectures and the config of the chosen one."""

    def on_train_start(self, settings: Settings, done: int) -> None:
        """Receive the settings and the steps done in earlier sessions, before the first step."""

    def on_step(self, step: int, losses: dict[str, float]) -> None:
        """Receive the losses of a training step."""

    def on_evaluate(self, step: int, scores: dict[str, float], best: bool) -> None:
        """Receive validation scores and whether they are the best so far."""

    def on_replan(self, steps: int) -> None:
        """Receive the new number of steps after the measured speed changed it."""

    def on_end(self, run: Any) -> None:
        """Receive the finished run."""

    def close(self) -> None:
        """Release what the callback holds. Called last, after an error as well."""

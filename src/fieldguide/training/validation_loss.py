"""The training loss on a few validation examples, to be drawn next to the training loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from fieldguide.data.loader import Batches, make_generator
from fieldguide.objectives import Objective
from fieldguide.training.precision import autocast, move_batch


class ValidationLoss:
    """Computes the loss of the same examples each time, without dropout and always with the same noise.

    `make_batches` returns them without augmentation.

    It costs about a third of a training step, and leaves torch's random state alone. A failure is logged once and ends it,
    since it must not end the training.
    """

    def __init__(
        self,
        make_batches: Callable[[], Batches],
        *,
        batch: int,
        device: torch.device,
        precision: str,
        log: Callable[[str], None],
    ):
        self.make_batches, self.batch, self.device, self.precision, self.log = make_batches, batch, device, precision, log
        self.tensors: dict[str, Tensor] | None = None
        self.is_available = True

    def compute(self, objective: Objective) -> dict[str, float]:
        """Return {"validation_loss": loss}, or nothing if the objective has several losses or the examples have none."""
        if not self.is_available or len(objective.phases) != 1:
            return {}
        try:
            loss = self._compute(objective)
        except Exception as error:  # noqa: BLE001  # see the docstring of the class
            self.log(f"the validation loss is not recorded: {type(error).__name__}: {error}")
            self.is_available = False
            return {}
        return {"validation_loss": loss} if math.isfinite(loss) else {}

    @torch.inference_mode()
    def _compute(self, objective: Objective) -> float:
        if self.tensors is None:
            batches = self.make_batches()
            if not len(batches):
                self.is_available = False
                return math.nan
            rows = np.arange(min(self.batch, len(batches)))
            self.tensors = move_batch(batches.make(rows, make_generator(0)), self.device)
        training = objective.training
        objective.eval()
        try:
            with keep_random_state(self.device), autocast(self.device, self.precision):
                torch.manual_seed(0)
                return float(objective(dict(self.tensors), objective.phases[0].name)["loss"])
        finally:
            objective.train(training)


def keep_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Restore torch's random state on the CPU and a device afterwards."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device.index or 0], device_type=device.type)

"""Reconstruction: the squared error between an input and what a network rebuilds of it."""

from __future__ import annotations

from torch import Tensor, nn

from fieldguide.objectives.base import Objective


class Reconstruction(Objective):
    """Mean squared error of a network that rebuilds the input `name` of a batch.

    `outputs` returns `errors` B F: the squared error of each feature, or of each channel at the last step of a series.
    """

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        self.model, self.name = model, name

    def compute_errors(self, batch: dict[str, Tensor]) -> Tensor:  # -> the shape of the input
        inputs = batch[self.name]
        return (self.model(inputs).float() - inputs.float()).square()

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        return {"loss": self.compute_errors(batch).mean()}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        errors = self.compute_errors(batch)
        return {"errors": errors[:, -1] if errors.ndim == 3 else errors}

"""Anomaly maps: networks that say how unusual each place of an image is. They are fitted without gradient descent."""

from __future__ import annotations

from torch import Tensor, nn

from fieldguide.objectives.base import Objective


class AnomalyMap(Objective):
    """Outputs of a network with an anomaly map: `map` B H W, and `errors` B 1, the largest value of each map."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        """Return the mean distance of images as the loss, for tools that look at gradients."""
        return {"loss": self.model(batch["image"]).mean()}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = self.model(batch["image"]).float()
        return {"map": found, "errors": found.flatten(1).amax(1, keepdim=True)}

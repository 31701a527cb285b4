"""An ensemble of a network and a baseline: the weighted mean of their probabilities, or of their values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fieldguide.objectives.supervised import Supervised


class Member(nn.Module):
    """A fitted baseline in an ensemble, with its weight. `inputs` names the batch tensors that it takes."""

    weight: Tensor  # scalar

    def __init__(self, network: nn.Module, inputs: Sequence[str], weight: float = 0.0):
        super().__init__()
        self.network, self.inputs = network, tuple(inputs)
        self.register_buffer("weight", torch.tensor(weight))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.network(*(batch[name] for name in self.inputs))


class Ensemble(Supervised):
    """The objective of a trained network together with a baseline, for prediction."""

    keep = ("model", "baseline")

    def __init__(self, network: Supervised, baseline: Member):
        super().__init__(network.model, network.inputs, network.loss)
        self.baseline = baseline

    def compute_predictions(self, batch: dict[str, Tensor]) -> Tensor:
        """Return raw outputs, B C, that give the mean of both: logarithms of probabilities, or values."""
        own, other = self.loss.outputs(super().compute_predictions(batch)), self.loss.outputs(self.baseline(batch))
        return self.loss.invert({name: torch.lerp(own[name], other[name], self.baseline.weight) for name in own})

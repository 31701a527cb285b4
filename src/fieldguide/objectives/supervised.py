"""Supervised learning with one target per example: classification and regression."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective


class Classification(nn.Module):
    """Cross-entropy with label smoothing (Szegedy et al. 2016, section 7) and class weights.

    `logits` is B ... C; axes in between are members of an ensemble, whose losses are averaged. `target` is B class
    indices, or B C probabilities, as produced by mixup.
    """

    weights: Tensor | None  # C

    def __init__(self, smoothing: float = 0.0, weights: Sequence[float] | None = None):
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer(
            "weights", None if weights is None else torch.tensor(weights, dtype=torch.float32), persistent=False
        )

    def forward(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:  # B ... C, B | B C -> scalar
        flat, target = flatten_ensemble(logits.float(), target)
        return {"loss": F.cross_entropy(flat, target, weight=self.weights, label_smoothing=self.smoothing)}

    def outputs(self, logits: Tensor) -> dict[str, Tensor]:  # B ... C -> B C
        probabilities = logits.float().softmax(-1)
        return {"probabilities": probabilities.flatten(1, -2).mean(1) if logits.ndim > 2 else probabilities}

    def invert(self, outputs: dict[str, Tensor]) -> Tensor:  # B C -> B C
        """Return logits that give these outputs."""
        return outputs["probabilities"].clamp_min(torch.finfo(torch.float32).tiny).log()


class Regression(nn.Module):
    """Mean squared error on standardized targets. `values` is B ... D, `target` B D."""

    def forward(self, values: Tensor, target: Tensor) -> dict[str, Tensor]:  # B ... D, B D -> scalar
        flat, target = flatten_ensemble(values.float(), target)
        return {"loss": F.mse_loss(flat, target)}

    def outputs(self, values: Tensor) -> dict[str, Tensor]:  # B ... D -> B D
        values = values.float()
        return {"values": values.flatten(1, -2).mean(1) if values.ndim > 2 else values}

    def invert(self, outputs: dict[str, Tensor]) -> Tensor:  # B D -> B D
        """Return raw outputs that give these outputs."""
        return outputs["values"]


def flatten_ensemble(outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:  # B ... C, B * -> BK C, BK *
    """Flatten the members of an ensemble into the batch axis and repeat the target for each."""
    count = outputs[0, ..., 0].numel()
    if count == 1:
        return outputs.flatten(0, -2), target
    return outputs.flatten(0, -2), target.repeat_interleave(count, 0)


class Supervised(Objective):
    """Objective of a network and a loss. `inputs` names the batch tensors that the network takes, in order (`Card.inputs`)."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], loss: Classification | Regression):
        super().__init__()
        self.model, self.loss, self.inputs = model, loss, tuple(inputs)

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        return self.loss(self.compute_predictions(batch), batch["target"])

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.loss.outputs(self.compute_predictions(batch))

    def compute_predictions(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the raw outputs of the network."""
        return self.model(*(batch[name] for name in self.inputs))

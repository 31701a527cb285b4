"""Next-token prediction for decoders and encoder-decoders (Bengio et al. 2003, JMLR 3:1137, eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective


class NextToken(Objective):
    """Mean cross-entropy of `target` (B T int64, -1 = ignored) under the network's logits B T V.

    `inputs` names the batch tensors that the network takes, in order; tensors that a batch lacks, such as a mask without
    padding, are passed as None. `smoothing` is label smoothing (Szegedy et al. 2016, section 7).
    """

    def __init__(self, model: nn.Module, inputs: Sequence[str], smoothing: float = 0.0):
        super().__init__()
        self.model, self.inputs, self.smoothing = model, tuple(inputs), smoothing

    def compute_logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(*(batch.get(name) for name in self.inputs))

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        logits, target = self.compute_logits(batch).flatten(0, 1).float(), batch["target"].flatten()
        total = F.cross_entropy(logits, target, ignore_index=-1, label_smoothing=self.smoothing, reduction="sum")
        return {
            "loss": total / (target >= 0).sum().clamp(min=1)
        }  # 0 if the batch has no target, such as a chat without assistant turns

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `nats`, the summed negative log-likelihood of each row, and `count`, its number of targets: B, B."""
        target = batch["target"]
        logits = self.compute_logits(batch).float()
        nats = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-1, reduction="none").view_as(target)
        return {"nats": nats.sum(1, dtype=torch.float64).float(), "count": (target >= 0).sum(1)}


class DenoisingObjective(NextToken):
    """Next-token objective for denoising: the loss covers all of `target`, the metrics only the removed tokens.

    `removed` (B T bool) marks the removed tokens.
    """

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `nats`, `right` (correct predictions) and `count` over the removed tokens of each row (teacher forcing)."""
        target, removed = batch["target"], batch["removed"]
        logits = self.compute_logits(batch).float()
        nats = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-1, reduction="none").view_as(target)
        return {
            "nats": torch.where(removed, nats, 0).sum(1),
            "right": (removed & (logits.argmax(-1) == target)).sum(1),
            "count": removed.sum(1),
        }

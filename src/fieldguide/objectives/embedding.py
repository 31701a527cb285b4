"""Vectors: what a network without a head says of a picture or a text. Nothing is trained."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective

POOLING_MODES = ("mean", "cls")  # over the tokens of a text, or that of its first token, in which some have learnt to say all


class EmbeddingObjective(Objective):
    """A vector of length 1 for each example: products of two are their likeness."""

    def __init__(self, model: nn.Module, pooled: str = "mean"):
        super().__init__()
        self.model, self.pooled = model, pooled

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if "tokens" not in batch:
            return {"vector": F.normalize(self.model(batch["image"]).float(), dim=-1)}
        x = self.model.features(batch["tokens"], batch["mask"]).float()
        x = x[:, 0] if self.pooled == "cls" else (x * batch["mask"][..., None]).sum(1)  # a sum points where the mean does
        return {"vector": F.normalize(x, dim=-1)}

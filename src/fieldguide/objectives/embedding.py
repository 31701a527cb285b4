"""Embeddings of images or texts by a network without a head. For inference only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective

POOLING_MODES = ("mean", "cls")  # mean over the tokens of a text, or the output of the first token


class EmbeddingObjective(Objective):
    """Return one normalized vector per example; the dot product of two vectors is their cosine similarity."""

    def __init__(self, model: nn.Module, pooling: str = "mean"):
        super().__init__()
        self.model, self.pooling = model, pooling

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if "tokens" not in batch:
            return {"vector": F.normalize(self.model(batch["image"]).float(), dim=-1)}
        x = self.model.features(batch["tokens"], batch["mask"]).float()
        x = (
            x[:, 0] if self.pooling == "cls" else (x * batch["mask"][..., None]).sum(1)
        )  # the normalized sum equals the normalized mean
        return {"vector": F.normalize(x, dim=-1)}

"""Embeddings of images or texts by a network without a head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective

# Ways to turn the vectors of the tokens into one vector, in the order in which several are concatenated.
POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken")


@dataclass(frozen=True)
class Pooling:
    """How a text becomes a vector: the text before it, the pooling of its tokens, and the layers after the pooling."""

    modes: tuple[str, ...] = ("mean",)
    prompt: str = ""  # put before each text
    skip: int = 0  # first tokens that the pooling leaves out, such as the prompt
    head: nn.Module | None = None  # applied to the pooled vector: N D -> N E


class EmbeddingObjective(Objective):
    """Return one normalized vector per example; the dot product of two vectors is their cosine similarity."""

    def __init__(self, model: nn.Module, pooling: Pooling | None = None):
        super().__init__()
        self.model, self.pooling = model, pooling or Pooling()
        self.head = self.pooling.head or nn.Identity()

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if "tokens" not in batch:
            return {"vector": F.normalize(self.model(batch["image"]).float(), dim=-1)}
        x, mask = self.model.features(batch["tokens"], batch["mask"]), batch["mask"].clone()
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mask[:, : self.pooling.skip] = False
        pooled = torch.cat([pool(x, mask, mode) for mode in self.pooling.modes], 1)
        return {"vector": F.normalize(self.head(pooled), dim=-1)}


def pool(x: Tensor, mask: Tensor, mode: str) -> Tensor:  # N T D, N T bool -> N D
    """Return one vector per text from the vectors of its tokens.

    The modes are those of sentence-transformers: the first token, the largest value, the mean, the sum over the square root of
    the length, the mean weighted by position, the last token.
    """
    weights = mask[..., None].float()
    if mode == "cls":
        return x[:, 0]
    if mode == "max":
        return x.masked_fill(~mask[..., None], -torch.inf).amax(1)
    if mode == "lasttoken":
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        return x[torch.arange(len(x), device=x.device), last]
    if mode == "weightedmean":
        weights = weights * torch.arange(1, mask.shape[1] + 1, device=mask.device)[None, :, None]
    total, count = (x * weights).sum(1), weights.sum(1).clamp(min=1e-9)
    return total / (count.sqrt() if mode == "mean_sqrt_len" else count)

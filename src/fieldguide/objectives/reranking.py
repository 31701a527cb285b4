"""Objectives of reranking: a network reads a query with a passage and returns how well they fit.

Shapes: B queries, P pairs of a query and a passage, K passages of a query at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective

PAIRS_PER_CHUNK = 256  # that are scored at once


class Reranking(Objective):
    """Binary cross-entropy of each pair, or cross-entropy over the passages of a query.

    The network returns one logit for each pair, P 1. `query` (P int64) is the index of the pair's query in the batch, `relevance`
    (P float, 0 to 1) the target.

    "pointwise" is the mean binary cross-entropy over pairs (Nogueira and Cho 2019, arXiv:1901.04085, equation 1). "listwise" is the
    mean over queries of the cross-entropy between the softmax over the query's logits and the relevance divided by its sum
    (Cao et al. 2007, doi:10.1145/1273496.1273513, with top-one probabilities proportional to relevance); queries without a relevant
    passage have no loss.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[str], loss: Literal["pointwise", "listwise"] = "pointwise"):
        super().__init__()
        self.model, self.inputs, self.loss = model, tuple(inputs), loss

    def compute_logits(self, batch: dict[str, Tensor]) -> Tensor:  # -> P
        logits = self.model(*(batch[name] for name in self.inputs))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return wide.flatten(1).mean(1)  # over the members of an ensemble

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        logits, query = self.compute_logits(batch), batch["query"]
        relevance = batch["relevance"].to(logits.dtype)
        if self.loss == "pointwise":
            return {"loss": F.binary_cross_entropy_with_logits(logits, relevance)}
        count = int(query.max()) + 1
        highest = logits.detach().new_full((count,), -torch.inf).scatter_reduce(0, query, logits.detach(), "amax")
        shifted = logits - highest[query]
        total = shifted.new_zeros(count).index_add(0, query, shifted.exp())
        mass = relevance.new_zeros(count).index_add(0, query, relevance)
        nats = -(relevance * (shifted - total.log()[query])).sum_to_size(len(query)) / mass.clamp(min=1e-12)[query]
        return {"loss": nats.sum() / (mass > 0).sum().clamp(min=1)}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `logit` of each pair, P; or with `slot` (P int64), `logits` of each query, B K, NaN where it has fewer passages."""
        names = [name for name in self.inputs if name in batch]
        parts = [
            self.compute_logits({name: batch[name][i : i + PAIRS_PER_CHUNK] for name in names})
            for i in range(0, len(batch["tokens"]), PAIRS_PER_CHUNK)
        ]
        logits = torch.cat(parts)
        if "slot" not in batch:
            return {"logit": logits}
        query, slot = batch["query"], batch["slot"]
        table = logits.new_full((int(query.max()) + 1, int(slot.max()) + 1), torch.nan)
        table[query, slot] = logits
        return {"logits": table}

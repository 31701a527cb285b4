"""In-batch softmax of two towers (Yi et al. 2019, doi:10.1145/3298689.3346996, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fieldguide.objectives.next_item import NextItem


class InBatch(NextItem):
    """Cross-entropy of each target among the targets of the batch, whose logits are lowered by the logarithm of their frequency.

    Without the correction, items that are often targets, and so often negatives, would score too low (equation 5). Another
    occurrence of a row's own target is no negative. Each item is encoded once: one that occurs m times as a negative counts m times.
    `negatives` and `smoothing` have no effect.
    """

    def compute_loss(self, hidden: Tensor, target: Tensor) -> dict[str, Tensor]:  # N E, N
        # Not `unique`, whose number of results plans of memory could not know.
        often = target.new_zeros(self.model.config.items).index_add(0, target, torch.ones_like(target))
        items, place = (often > 0).nonzero()[:, 0], (often > 0).cumsum(0)[target] - 1
        logits = F.linear(hidden, self.model.encode_items(items)).float()
        logits = logits - self.share[items].log() if len(self.share) > 1 else logits
        own = F.one_hot(place, len(items)).bool()
        return {"loss": F.cross_entropy(torch.where(own, logits, logits + often[items].log()), place)}

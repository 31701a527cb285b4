"""Next-item prediction for sequential recommendation (Kang and McAuley 2018, section III.E, with a softmax)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective

DEFAULT_TOP_K = 100  # items returned per prediction unless more are requested


class NextItem(Objective):
    """Cross-entropy of `target` (B T int64, 0 = none) over all items, or a sampled softmax over `negatives` items.

    Negatives are sampled in proportion to their frequency and weighted by 1 / (number of samples times probability), so
    that their sum equals that over all items in expectation (Bengio and Senécal 2008, doi:10.1109/TNN.2007.912312,
    equation 9). A sampled item that is a row's own target is masked.

    Args:
        counts: occurrences of each item, item 0 first.
        negatives: number of sampled negatives; 0 uses all items.
        smoothing: label smoothing over all items.
        repeats: whether items of the history may be recommended again.
    """

    share: Tensor  # items

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[str],
        counts: Sequence[int] = (),
        negatives: int = 0,
        smoothing: float = 0.0,
        repeats: bool = False,
    ):
        super().__init__()
        self.model, self.inputs, self.negatives = model, tuple(inputs), negatives
        self.smoothing, self.repeats, self.top = smoothing, repeats, DEFAULT_TOP_K
        weights = torch.tensor(counts or [0.0], dtype=torch.float64)
        self.register_buffer("share", (weights / weights.sum().clamp(min=1)).float(), persistent=False)

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        hidden, target = self.model.features(*(batch.get(name) for name in self.inputs)), batch["target"]
        return self.compute_loss(hidden[target > 0], target[target > 0])  # without padding

    def compute_loss(self, hidden: Tensor, target: Tensor) -> dict[str, Tensor]:  # N D, N
        """Return the loss of predicting the items `target` from hidden states."""
        table = self.model.table()
        if not self.negatives:
            logits = F.linear(hidden, table).float()
            logits[:, 0] = -torch.inf  # item 0 is padding
            if not self.smoothing:
                return {"loss": F.cross_entropy(logits, target)}
            logp = logits.log_softmax(-1)[:, 1:]
            hit = logp.gather(1, target[:, None] - 1).mean()
            return {"loss": -(1 - self.smoothing) * hit - self.smoothing * logp.mean()}
        sampled = torch.multinomial(self.share, self.negatives, replacement=True)
        positive = (hidden * table[target]).sum(-1).float()
        negative = F.linear(hidden, table[sampled]).float() - (self.negatives * self.share[sampled]).log()
        negative = negative.masked_fill(target[:, None] == sampled, -torch.inf)
        logits = torch.cat([positive[:, None], negative], 1)
        return {"loss": F.cross_entropy(logits, torch.zeros_like(target))}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `top`, the best items of each row in descending order, and their logits, `scores`.

        With `next_item` (B int64, 0 = unknown), the item to rank, also return its `rank` among all items: 1 + the number of
        items with a higher logit + half the number of other items with the same logit.
        """
        scores = self.model.score_next(*(batch.get(name) for name in self.inputs)).float()
        return rank_items(scores, batch["seen"], batch.get("next_item"), self.repeats, self.top)


def rank_items(
    scores: Tensor, seen: Tensor, next_item: Tensor | None, repeats: bool = False, top: int = DEFAULT_TOP_K
) -> dict[str, Tensor]:
    """Rank items by scores B V, excluding those of `seen` (B T, 0 = none) unless `repeats`; see `NextItem.outputs`."""
    scores = scores.clone()
    if not repeats:
        scores.scatter_(1, seen, -torch.inf)
    scores[:, 0] = -torch.inf
    best = scores.topk(min(top, scores.shape[1] - 1))
    found = {"top": best.indices.masked_fill(best.values == -torch.inf, 0), "scores": best.values}
    if next_item is not None:
        own = scores.gather(1, next_item[:, None])
        rank = 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
        found["rank"] = rank.masked_fill((next_item == 0) | (own[:, 0] == -torch.inf), torch.inf)
    return found

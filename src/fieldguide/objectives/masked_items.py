"""Prediction of hidden items of a history, the cloze task of BERT4Rec (Sun et al. 2019, arXiv:1904.06690, section 3.6)."""

from __future__ import annotations

import torch
from torch import Tensor

from fieldguide.objectives.next_item import NextItem

LAST_ONLY_PROBABILITY = 1 / 11  # of hiding the last item alone: the authors add one such copy to ten of each history


class MaskedItems(NextItem):
    """Cross-entropy of hidden items, as in `NextItem`, over all items or sampled ones.

    Rows are those of `NextItem`: `items` and the item after each, `target`. They are joined to one history, of which the
    latest items are read. The share `model.config.hidden_share` of them is hidden, at least one; of one row in eleven, only
    the last item is, because this is how the next item is predicted. Without training (`eval`), only the last item is hidden,
    so that the loss of the same rows is always the same.
    """

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        history, real = join_history(batch["items"], batch["target"])
        hidden = choose_hidden(real, self.model.config.hidden_share if self.training else 0.0)
        found = self.model.features(history.masked_fill(hidden, 0), real)
        return self.compute_loss(found[hidden], history[hidden])


def join_history(items: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:  # B T, B T -> B T, B T bool
    """Return the latest T items of histories padded on the left, and which are real. `target` follows `items` by one place.

    A history of T + 1 items loses its first one.
    """
    history = torch.cat([items[:, 1:], target[:, -1:]], 1)
    return history, history > 0


def choose_hidden(real: Tensor, share: float) -> Tensor:  # B T bool -> B T bool
    """Choose the hidden items: `share` of each row (rounded, at least one), or the last one of some rows, or of all if
    `share` is 0. The choice is random on each call and uses a CPU generator for every device.
    """
    places = torch.arange(1, real.shape[1] + 1, device=real.device) * real
    last = (places == places.amax(1, keepdim=True)) & real
    if not share:
        return last
    draw = torch.rand(real.shape).to(real.device).masked_fill(~real, 2.0)
    count = (real.sum(1, keepdim=True) * share).round().clamp(min=1)
    chosen = (draw.argsort(1).argsort(1) < count) & real
    only = torch.rand(len(real), 1).to(real.device) < LAST_ONLY_PROBABILITY
    return torch.where(only, last, chosen)

"""The load-balancing loss of mixture-of-experts layers (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def load_balancing_loss(scores: Tensor, used: int, real: Tensor | None = None) -> Tensor:  # N E, N bool -> scalar
    """Return E times the sum over experts of (fraction of tokens routed to the expert) x (mean router probability).

    A token counts for each of its `used` best experts; the loss is `used` for a uniform load. Only tokens with `real`
    True are counted, so padding has no influence.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weight = torch.ones_like(scores[:, :1]) if real is None else real[:, None].to(scores.dtype)
    weight = weight / weight.sum().clamp(min=1)
    chosen = F.one_hot(scores.topk(used, 1).indices, scores.shape[1]).sum(1)
    return scores.shape[1] * ((chosen * weight).sum(0) * (scores.softmax(1) * weight).sum(0)).sum()

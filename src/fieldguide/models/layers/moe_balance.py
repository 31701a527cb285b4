"""How unevenly a router loads its experts (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unevenness(scores: Tensor, used: int, real: Tensor | None = None) -> Tensor:  # N E, N bool -> a number
    """E times the sum over experts of the share of tokens that have it among their best `used`, times its mean probability;
    `used` where all are even. Only `real` tokens count: padding is served, and says nothing."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weight = torch.ones_like(scores[:, :1]) if real is None else real[:, None].to(scores.dtype)
    weight = weight / weight.sum().clamp(min=1)
    chosen = F.one_hot(scores.topk(used, 1).indices, scores.shape[1]).sum(1)
    return scores.shape[1] * ((chosen * weight).sum(0) * (scores.softmax(1) * weight).sum(0)).sum()

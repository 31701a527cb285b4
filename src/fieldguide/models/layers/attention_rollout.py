"""Where a Transformer looks: weights of attention, and attention followed through blocks (Abnar and Zuidema 2020,
arXiv:2005.00928, section 3). Fused kernels never hold these weights, so they are computed anew, and only when asked for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fieldguide.models.layers.attention import Attention


def weights(attention: Attention, x: Tensor, mask: Tensor | None = None) -> Tensor:  # B T D, B T bool -> B heads T T
    """How much each token (row) looks at each other (column); rows sum to 1."""
    q, k = attention.qkv(x).unflatten(-1, (3, attention.heads, -1))[:, :, :2].permute(2, 0, 3, 1, 4)  # each B heads T d
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return scores.softmax(-1)


def rollout(maps: Iterable[Tensor]) -> Tensor:  # of each block, B heads T T -> B T T
    """How much each token's end (row) draws on each token's beginning (column): heads are averaged, the residual path
    counts as much as attention, blocks are multiplied; rows sum to 1."""
    flow = None
    for layer in maps:
        step = (layer.mean(1) + torch.eye(layer.shape[-1], dtype=layer.dtype, device=layer.device)) / 2
        flow = step if flow is None else step @ flow
    return flow

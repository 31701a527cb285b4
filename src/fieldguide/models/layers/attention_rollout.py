"""Attention weights of a Transformer and attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928, section 3).

Fused attention kernels do not return the weights, so they are recomputed here, on request only.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fieldguide.models.layers.attention import Attention


def attention_weights(attention: Attention, x: Tensor, mask: Tensor | None = None) -> Tensor:  # B T D, B T bool -> B heads T T
    """Return the attention weights of each query (row) for each key (column); rows sum to 1."""
    q, k = attention.qkv(x).unflatten(-1, (3, attention.heads, -1))[:, :, :2].permute(2, 0, 3, 1, 4)  # each B heads T d
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return scores.softmax(-1)


def rollout(maps: Iterable[Tensor]) -> Tensor:  # one map per block, B heads T T -> B T T
    """Return the contribution of each input token (column) to each output token (row); rows sum to 1.

    Heads are averaged, the residual connection is weighted equally with attention, and the blocks are multiplied.
    """
    flow: Tensor | None = None
    for layer in maps:
        step = (layer.mean(1) + torch.eye(layer.shape[-1], dtype=layer.dtype, device=layer.device)) / 2
        flow = step if flow is None else step @ flow
    assert flow is not None  # a model has at least one block
    return flow

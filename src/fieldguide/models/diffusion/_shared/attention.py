"""Attention of latent diffusion: to given states, or of images and texts to both, with a matrix each for queries, keys and values, as
adapters (LoRA) expect them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.norm import RMSNorm

EPS = 1e-6  # of the norms of queries and keys


class Attention(nn.Module):
    """Multi-head attention to given states, of width K. The last layer has a bias, the others if `bias`."""

    def __init__(self, dim: int, states: int, heads: int, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=bias)
        self.k, self.v = nn.Linear(states, dim, bias=bias), nn.Linear(states, dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:  # B N D, B T K, B T -> B N D
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(states), self.v(states)))
        x = dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
        return self.proj(x.transpose(1, 2).flatten(2))


class Stream(nn.Module):
    """What one modality brings to and takes from joint attention: queries, keys and values, the first two normalized by their root
    mean square if `norm`, and an output layer if `output`.

    Raises `SettingsError` if `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, heads: int, norm: bool, output: bool = True):
        super().__init__()
        if dim % heads:
            raise SettingsError(f"dim={dim} must be divisible by heads={heads}")
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(dim // heads, eps=EPS) if norm else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(dim, dim) if output else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # B N D -> three times B heads N d
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q, self.k, self.v))  # B N heads d
        return self.norm_q(q).transpose(1, 2), self.norm_k(k).transpose(1, 2), v.transpose(1, 2)


def attend_jointly(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]],
    mask: Tensor | None = None,
    rotate: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[Tensor]:  # queries, keys and values of each modality -> B N D of each
    """Return the outputs of all queries, each of which attends to the keys of all modalities.

    `mask` is True for the keys to attend to, B T; `rotate` is applied to all queries and keys in a row.
    """
    q, k, v = (torch.cat(tensors, 2) for tensors in zip(*parts)) if len(parts) > 1 else parts[0]
    x = dot_product_attention(rotate(q), rotate(k), v, None if mask is None else mask[:, None, None])
    return list(x.transpose(1, 2).flatten(2).split([part[0].shape[2] for part in parts], 1))


def place_mask(mask: Tensor | None, others: Tensor, first: bool) -> Tensor | None:  # B T, B N D -> B T+N
    """Return the mask of a text with True for other keys, which follow those of the text if `first`; None without a mask."""
    if mask is None:
        return None
    rest = torch.ones_like(others[..., 0], dtype=torch.bool)
    return torch.cat([mask, rest] if first else [rest, mask], 1)

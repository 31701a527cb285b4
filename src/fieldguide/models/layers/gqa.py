"""Causal attention in which several heads of queries share one of keys and values, with rotary positions.

(Ainslie et al. 2023, arXiv:2305.13245; Shazeer 2019, arXiv:1911.02150 where all share one; Su et al. 2021,
arXiv:2104.09864 for the positions.) What is kept of read tokens shrinks by as much.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.kv_cache import Cache
from fieldguide.models.layers.rope import rotate

Turn = tuple[Tensor, Tensor]  # cosines and sines


class GroupedAttention(nn.Module):
    """`heads` of queries and `groups` of keys and values, each `width` wide; `norm(width)` makes what normalises each
    query and key before they turn. `scale` multiplies their products, by default 1 / sqrt(width).

    `turn` are cosines and sines for the new tokens' places; `seen` is that of `fieldguide.models.layers.kv_cache.causal`. With a
    cache, keys and values of layer number `layer` are kept there. Raises `SettingsError` where `groups` does not divide
    `heads`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        groups: int,
        width: int,
        norm: Callable[[int], nn.Module] | None = None,
        scale: float | None = None,
    ):
        super().__init__()
        if heads % groups:
            raise SettingsError(f"heads={heads} cannot be split among groups={groups}: choose a divisor")
        self.heads, self.kv_heads, self.width, self.scale = heads, groups, width, scale
        self.q = nn.Linear(dim, heads * width, bias=False)
        self.kv = nn.Linear(dim, 2 * groups * width, bias=False)
        self.norm_q, self.norm_k = (norm(width), norm(width)) if norm else (None, None)
        self.proj = nn.Linear(heads * width, dim, bias=False)

    def forward(
        self, x: Tensor, turn: Turn, seen: Tensor | None, cache: Cache | None = None, layer: int = 0
    ) -> Tensor:  # B T D -> B T D
        q = self.q(x).unflatten(-1, (self.heads, self.width)).transpose(1, 2)  # B heads T d
        k, v = self.kv(x).unflatten(-1, (2, self.kv_heads, self.width)).permute(2, 0, 3, 1, 4)  # each B groups T d
        if self.norm_q is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k = rotate(q, *turn), rotate(k, *turn)
        if cache is not None:
            k, v = cache.put(layer, k, v)  # B groups K d
        return self.proj(self.looked(q, k, v, seen))

    def looked(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:  # B heads T d, B groups K d -> B T D
        """What queries take from the values whose keys answer them."""
        whole = seen is None and q.shape[2] == k.shape[2] and q.shape[2] > 1
        if q.shape[2] == 1 and self.heads > self.kv_heads:
            # The heads of a group become rows of one: keys and values are read once, not copied for each.
            x = F.scaled_dot_product_attention(q.view(len(q), self.kv_heads, -1, self.width), k, v, seen, scale=self.scale)
            return x.reshape(len(x), 1, -1)
        x = F.scaled_dot_product_attention(
            q, k, v, seen, is_causal=whole, scale=self.scale, enable_gqa=self.heads > self.kv_heads
        )
        return x.transpose(1, 2).flatten(2)


class GatedMlp(nn.Module):
    """Two layers, the first gated: down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202, equation 6). Both halves
    of the first are one matrix, gates first."""

    def __init__(self, dim: int, hidden: int, act: Callable[[Tensor], Tensor] = F.silu):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False), act

    def forward(self, x: Tensor) -> Tensor:  # ... D -> ... D
        gate, x = self.up(x).chunk(2, -1)
        return self.down(self.act(gate) * x)


def turns(places: Tensor, speed: Tensor, like: Tensor) -> Turn:  # T or B T, d/2 -> (B 1) T d, twice
    """Cosines and sines by which queries and keys at these places turn, signed as `rotate` takes them; computed in
    float32."""
    angle = places[..., None].float() * speed
    cos, sin = angle.cos(), angle.sin()
    cos, sin = torch.cat([cos, cos], -1).to(like.dtype), torch.cat([-sin, sin], -1).to(like.dtype)
    return (cos, sin) if places.ndim == 1 else (cos[:, None], sin[:, None])

"""Causal grouped-query attention with rotary position embeddings, and the gated MLP.

Several query heads share one head of keys and values (Ainslie et al. 2023, arXiv:2305.13245; multi-query attention if
all share one: Shazeer 2019, arXiv:1911.02150), which reduces the key/value cache by the same factor. Rotary
positions: Su et al. 2021, arXiv:2104.09864.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.kv_cache import Cache
from fieldguide.models.layers.rope import rotate

CosSin = tuple[Tensor, Tensor]  # cosines and signed sines of the rotary angles


class RotaryAttention(nn.Module):
    """Causal attention with `heads` query heads and `groups` key/value heads of width `width`, and rotary positions.

    Subclasses create the output layer `proj` and implement `project`. `scale` multiplies the attention scores; the default is
    1 / sqrt(width). `turn` holds the cosines and sines for the positions of the new tokens; `seen` is the mask returned by
    `fieldguide.models.layers.kv_cache.causal_mask`. If a cache is given, the keys and values of layer number `layer` are
    appended to it. Raises `SettingsError` if `groups` does not divide `heads`.
    """

    proj: nn.Linear

    def __init__(self, heads: int, groups: int, width: int, scale: float | None = None):
        super().__init__()
        if heads % groups:
            raise SettingsError(f"heads={heads} must be divisible by kv_heads={groups}.")
        self.heads, self.kv_heads, self.width, self.scale = heads, groups, width, scale

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # B T D -> B heads T d, B groups T d, B groups T d
        """Return queries, keys and values."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, turn: CosSin, seen: Tensor | None, cache: Cache | None = None, layer: int = 0
    ) -> Tensor:  # B T D -> B T D
        q, k, v = self.project(x)
        q, k = rotate(q, *turn), rotate(k, *turn)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # B groups K d
        return self.proj(self.attend(q, k, v, seen))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:  # B heads T d, B groups K d -> B T D
        """Return the attention output, heads concatenated."""
        whole = seen is None and q.shape[2] == k.shape[2] and q.shape[2] > 1
        if q.shape[2] == 1 and self.heads > self.kv_heads:
            # The query heads of a group become rows of one head, so keys and values are read once, not copied per
            # head.
            x = F.scaled_dot_product_attention(q.view(len(q), self.kv_heads, -1, self.width), k, v, seen, scale=self.scale)
            return x.reshape(len(x), 1, -1)
        x = dot_product_attention(q, k, v, seen, is_causal=whole, scale=self.scale, enable_gqa=self.heads > self.kv_heads)
        return x.transpose(1, 2).flatten(2)


class GroupedAttention(RotaryAttention):
    """Rotary attention with one matrix for queries and one for keys and values.

    `bias` adds biases to queries, keys and values. `norm(width)` creates the optional normalization of queries and keys,
    applied before the rotation.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        groups: int,
        width: int,
        norm: Callable[[int], nn.Module] | None = None,
        scale: float | None = None,
        bias: bool = False,
    ):
        super().__init__(heads, groups, width, scale)
        self.q = nn.Linear(dim, heads * width, bias)
        self.kv = nn.Linear(dim, 2 * groups * width, bias)
        self.norm_q = norm(width) if norm else None
        self.norm_k = norm(width) if norm else None
        self.proj = nn.Linear(heads * width, dim, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # B T D -> B heads T d, B groups T d, B groups T d
        q = self.q(x).unflatten(-1, (self.heads, self.width)).transpose(1, 2)  # B heads T d
        k, v = self.kv(x).unflatten(-1, (2, self.kv_heads, self.width)).permute(2, 0, 3, 1, 4)  # each B groups T d
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        return q, k, v


class GatedMlp(nn.Module):
    """A gated MLP: down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202, equation 6).

    The gate and up projections are stored in one matrix, the gate first.
    """

    def __init__(self, dim: int, hidden: int, act: Callable[[Tensor], Tensor] = F.silu):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False), act

    def forward(self, x: Tensor) -> Tensor:  # ... D -> ... D
        gate, x = self.up(x).chunk(2, -1)
        return self.down(self.act(gate) * x)


def cos_sin_at(places: Tensor, speed: Tensor, like: Tensor, scale: float = 1.0) -> CosSin:  # T or B T, d/2 -> (B 1) T d, twice
    """Return the cosines and sines of the rotary angles at these positions, signed as `rotate` expects; computed in
    float32.

    `speed` holds the inverse frequencies in radians per token, for all rows or each of them (B 1 d/2); the result has the dtype
    of `like`. Cosines and sines are multiplied by `scale`, which lengthens queries and keys.
    """
    angle = places[..., None].float() * speed
    cos, sin = angle.cos() * scale, angle.sin() * scale
    cos, sin = torch.cat([cos, cos], -1).to(like.dtype), torch.cat([-sin, sin], -1).to(like.dtype)
    return (cos, sin) if places.ndim == 1 else (cos[:, None], sin[:, None])

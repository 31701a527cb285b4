"""Causal multi-head self-attention with a key/value cache (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3)."""

from __future__ import annotations

from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.kv_cache import Cache


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a token attends to itself and to the tokens before it.

    `seen` is the mask returned by `fieldguide.models.layers.kv_cache.causal_mask`. If a cache is given, the keys and
    values of layer number `layer` are appended to it. `dropout` acts on the attention weights. Raises `SettingsError`
    if `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if dim % heads:
            raise SettingsError(f"dim={dim} must be divisible by heads={heads}.")
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, seen: Tensor | None, cache: Cache | None, layer: int) -> Tensor:  # B T D -> B T D
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B heads T d
        if cache is not None:
            k, v = cache.update(layer, k, v)  # B heads K d
        x = dot_product_attention(
            q, k, v, seen, self.dropout if self.training else 0.0, is_causal=bool(seen is None and q.shape[2] == k.shape[2])
        )
        return self.proj(x.transpose(1, 2).flatten(2))

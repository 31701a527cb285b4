"""Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.dot_product_attention import dot_product_attention


class Attention(nn.Module):
    """Bidirectional multi-head self-attention.

    `qkv` computes queries, keys and values, in this order, in one matrix product. `dropout` acts on the attention
    weights. Raises `SettingsError` if `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if dim % heads:
            raise SettingsError(f"dim={dim} must be divisible by heads={heads}.")
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None, num_queries: int | None = None) -> Tensor:  # B T D, B T -> B T D
        """Return the attention output of all tokens, or of the first `num_queries` tokens only (for example the class
        token of the last block).

        `mask` is True for real tokens; padding is never attended to.
        """
        if num_queries is None:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B heads T d
        else:
            weights, biases = (p.split([x.shape[-1], 2 * x.shape[-1]]) for p in (self.qkv.weight, self.qkv.bias))
            q = F.linear(x[:, :num_queries], weights[0], biases[0]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            k, v = F.linear(x, weights[1], biases[1]).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if mask is not None:
            mask = mask[:, None, None, :]  # the key mask is the same for all queries and heads
        x = dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.proj(x.transpose(1, 2).flatten(2))

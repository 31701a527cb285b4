"""SASRec: sequential recommendation by causal self-attention (Kang and McAuley 2018, arXiv:1808.09781).

New here: causal attention over the items of a user in order of time, which handles short and long histories. This is
the authors' own form: in attention only the queries are normalized, and the residual connection adds the normalized
queries, not the input; there is no output projection; the hidden width of the MLP is D; items are scored by the input
embedding. Common ports differ in each of these points.

Initialization: Glorot uniform for all matrices and both embeddings, zero biases, as in the authors' code.
Shapes: B batch, T items of a history, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.kv_cache import causal_mask


@dataclass(frozen=True, kw_only=True)
class Config:
    items: int = 3417  # number of items including 0, which means no item
    length: int = 200  # maximum history length; pass the latest items of longer ones
    dim: int = 50  # D
    depth: int = 2
    heads: int = 1
    dropout: float = 0.2


class Block(nn.Module):
    """A block as in equations 2 to 6, with the residual connections of the authors' code."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norm1 = nn.LayerNorm(dim, eps=1e-8)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-8)
        self.up = nn.Linear(dim, dim)
        self.down = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:  # B T D -> B T D
        y = self.norm1(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.query(y), self.key(x), self.value(x)))
        z = dot_product_attention(q, k, v, seen, self.rate if self.training else 0.0, is_causal=seen is None)
        y = self.norm2(y + z.transpose(1, 2).flatten(2))
        return y + self.dropout(self.down(self.dropout(F.relu(self.up(y)))))


class SASRec(nn.Module):
    """A sequence model that returns the logits of the next item at each position. Raises `DataError` for histories
    longer than `length`.

    Positions count back from the latest item, which always has the last one. Item 0 means no item: its embedding is
    zero whatever the weights are, and so is its logit, which should be excluded from rankings.
    """

    def __init__(self, config: Config):
        super().__init__()
        if config.dim % config.heads:
            raise SettingsError(f"dim={config.dim} must be divisible by heads={config.heads}.")
        self.config = config
        self.embed = nn.Embedding(config.items, config.dim)
        self.pos = nn.Embedding(config.length, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, config.dropout) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-8)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def table(self) -> Tensor:  # items D
        """Return the item embeddings, used for input and scoring; item 0 is zero."""
        return F.pad(self.embed.weight[1:], (0, 0, 1, 0))

    def score_next(self, items: Tensor, mask: Tensor | None = None) -> Tensor:  # B T -> B V
        """Return the logits of the item after the latest one of each history."""
        return F.linear(self.features(items, mask)[:, -1], self.table())

    def features(self, items: Tensor, mask: Tensor | None = None) -> Tensor:  # B T -> B T D
        """Return the hidden states; the product with a row of `table` is the logit of that item."""
        steps, length = items.shape[1], self.config.length
        if steps > length:
            raise DataError(
                f"A history of {steps} items exceeds the model's length={length}. "
                f"Pass the latest {length} items or create the model with a larger length."
            )
        table = self.table()
        real: Tensor | float  # 1 for items, 0 for padding
        if mask is None:
            place, real = torch.arange(length - steps, length, device=items.device), 1.0
        else:
            place = (length - mask.sum(1, keepdim=True) + mask.cumsum(1) - 1).clamp(0, length - 1)
            real = mask[..., None].to(table.dtype)
        x = self.dropout(F.embedding(items, table) * math.sqrt(self.config.dim) + self.pos(place)) * real
        seen = causal_mask(steps, mask, None, items.device)
        for block in self.blocks:
            x = block(x, seen) * real
        return self.norm(x)

    def forward(self, items: Tensor, mask: Tensor | None = None) -> Tensor:  # B T, B T -> B T items
        return F.linear(self.features(items, mask), self.table())


CARD = Card(
    name="sasrec",
    model=SASRec,
    config=Config,
    paper="arXiv:1808.09781",
    year=2018,
    input_type="items",
    output_type="items",
    sizes={
        # MovieLens-1M: 3,416 items and no item. The pmixer port has 212,000 parameters: two output projections
        # (5,100) and one more position (50).
        "sasrec-ml1m": Size(params=206_850, source="counted in the authors' code"),
        "sasrec-m": Size(dim=128, heads=2),
        "sasrec-test": Size(items=30, length=12, dim=8, heads=2, dropout=0.0),
    },
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "beta2": 0.98},
)

"""HSTU: generative recommendation by attention without a softmax (Zhai et al. 2024, arXiv:2402.17152).

New here: attention weights are SiLU(q k + bias) divided by the length of the model, not a softmax, so that they keep how
often something occurs; the bias depends on the distance in places and, in logarithmic buckets, in time; and a gate U takes the
place of the MLP. As in the authors' code, time runs from an item to the moment at which the next one is met, both norms have
no parameters, and users and items are compared by the cosine over a temperature. Of their bias by place, the half
for later items is left out, since attention is causal.

Initialization: N(0, 0.02) for embeddings of items (truncated at two standard deviations), projections and biases by place and
time; Glorot for positions (normal) and outputs (uniform).
Shapes: B batch, T items of a history, D width, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError

EPS = 1e-6  # epsilon of norms and of lengths
BUCKETS = 128  # the last bucket of time
BUCKET_WIDTH = 0.301  # of the natural logarithm of seconds, although it is the decimal logarithm of 2


@dataclass(frozen=True, kw_only=True)
class Config:
    items: int = 3953  # number of items including 0, which means no item
    length: int = 211  # maximum history length, by which attention is divided; pass the latest items of longer ones
    dim: int = 50  # D
    depth: int = 2
    heads: int = 1  # H
    key_dim: int = 50  # width of queries and keys per head
    value_dim: int = 50  # width of values and gates per head
    dropout: float = 0.2
    temperature: float = 0.05  # by which cosines are divided


class Block(nn.Module):
    """A sequential transduction unit (equations 1 to 3)."""

    def __init__(self, config: Config):
        super().__init__()
        c = config
        self.heads, self.length = c.heads, c.length
        self.widths = [c.heads * c.value_dim] * 2 + [c.heads * c.key_dim] * 2
        self.uvqk = nn.Linear(c.dim, sum(self.widths), bias=False)
        self.place_bias = nn.Parameter(torch.empty(c.length))  # by the number of places between two items
        self.time_bias = nn.Parameter(torch.empty(BUCKETS + 1))
        self.out = nn.Linear(c.heads * c.value_dim, c.dim)
        self.dropout = nn.Dropout(c.dropout)

    def reset_parameters(self) -> None:
        for part in (self.uvqk.weight, self.place_bias, self.time_bias):
            nn.init.normal_(part, std=0.02)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, distance: Tensor, bucket: Tensor | None, seen: Tensor) -> Tensor:  # B T D -> B T D
        """Return the hidden states after attention. `distance` is T T, `bucket` B T T (None: all at once) and `seen` B T T."""
        u, v, q, k = F.silu(self.uvqk(F.layer_norm(x, x.shape[-1:], eps=EPS))).split(self.widths, -1)
        v, q, k = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (v, q, k))  # B H T d
        time = self.time_bias[0] if bucket is None else self.time_bias[bucket][:, None]
        # Divided by the length of the model, not of the batch, so that padding changes nothing.
        weights = F.silu(q @ k.transpose(-1, -2) + self.place_bias[distance] + time) / self.length
        y = ((weights * seen[:, None]) @ v).transpose(1, 2).flatten(2)
        return x + self.out(self.dropout(u * F.layer_norm(y, y.shape[-1:], eps=EPS)))


class HSTU(nn.Module):
    """A sequence model that returns the logits of the next item at each position. Raises `DataError` for histories
    longer than `length`.

    Positions count from the first item. Item 0 means no item: its logit is 0, which should be excluded from rankings. Without
    `times`, everything happens at once.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = config
        if not c.temperature > 0:
            raise SettingsError(f"temperature={c.temperature} must be above 0.")
        self.config = config
        self.embed = nn.Embedding(c.items, c.dim)
        self.pos = nn.Embedding(c.length, c.dim)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.embed.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.xavier_normal_(self.pos.weight)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.reset_parameters()

    def table(self) -> Tensor:  # items D
        """Return the item embeddings of length 1; that of item 0 is zero."""
        return F.pad(scale_to_one(self.embed.weight[1:]), (0, 0, 1, 0))

    def score_next(self, items: Tensor, mask: Tensor | None = None, times: Tensor | None = None) -> Tensor:  # B T -> B V
        """Return the logits of the item after the latest one of each history."""
        return F.linear(self.features(items, mask, times)[:, -1], self.table())

    def features(self, items: Tensor, mask: Tensor | None = None, times: Tensor | None = None) -> Tensor:  # B T -> B T D
        """Return the hidden states, of length 1 / temperature; the product with a row of `table` is the logit of that item."""
        steps, length = items.shape[1], self.config.length
        if steps > length:
            raise DataError(
                f"A history of {steps} items exceeds the model's length={length}. "
                f"Pass the latest {length} items or create the model with a larger length."
            )
        order = torch.arange(steps, device=items.device)
        distance = (order[:, None] - order).clamp(min=0)
        seen = (order[:, None] >= order)[None]
        place, real = order, torch.ones_like(items, dtype=torch.bool)
        if mask is not None:
            place, real, seen = (mask.cumsum(1) - 1).clamp(min=0), mask, seen & mask[:, None]
        x = F.embedding(items, F.pad(self.embed.weight[1:], (0, 0, 1, 0))) * math.sqrt(self.config.dim)
        x = self.dropout(x + self.pos(place)) * real[..., None].to(x.dtype)
        bucket = None if times is None else find_buckets(times)
        for block in self.blocks:
            x = block(x, distance, bucket, seen)
        return scale_to_one(x) / self.config.temperature

    def forward(self, items: Tensor, mask: Tensor | None = None, times: Tensor | None = None) -> Tensor:  # B T -> B T items
        return F.linear(self.features(items, mask, times), self.table())


def scale_to_one(x: Tensor) -> Tensor:  # ... D -> ... D
    """Return vectors divided by their length."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=EPS)


def find_buckets(times: Tensor) -> Tensor:  # B T 2 int64 -> B T T int64
    """Return the bucket of the time from each item (columns) to the one after each item (rows)."""
    passed = (times[:, :, None, 1] - times[:, None, :, 0]).abs().clamp(min=1)
    return (passed.float().log() / BUCKET_WIDTH).long().clamp(max=BUCKETS)


CARD = Card(
    name="hstu",
    model=HSTU,
    config=Config,
    paper="arXiv:2402.17152",
    year=2024,
    input_type="items",
    optional_inputs=("times",),
    output_type="items",
    sizes={
        # MovieLens-1M, whose largest item is 3,952, and 200 items, 10 of output and 1. The authors' blocks have 210 biases
        # more, for later items, which are never used.
        "hstu-ml1m": Size(params=233_980, source="meta-recsys/generative-recommenders, hstu-sampled-softmax-n128-final.gin"),
        "hstu-large-ml1m": Size(
            depth=8,
            heads=2,
            key_dim=25,
            value_dim=25,
            params=311_320,
            source="meta-recsys/generative-recommenders, hstu-sampled-softmax-n128-large-final.gin",
        ),
        "hstu-test": Size(items=30, length=12, dim=8, heads=2, key_dim=3, value_dim=5, dropout=0.0, temperature=0.2),
    },
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "beta2": 0.98},
)

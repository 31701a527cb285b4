"""What the encoder-decoders share: attention to the source, the two-layer network, and how a row is said with a cache.

Shapes: B batch, S source tokens, T target tokens, D width, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.errors import DataError
from fieldguide.models.layers.kv_cache import Cache
from fieldguide.models.layers.padding import at_least_one

Memory = tuple[Tensor, Tensor]  # keys and values of a layer's source, B heads S d each
Source = tuple[list[Memory], Tensor | None]  # of all layers, and which of its tokens are real, B S


class CrossAttention(nn.Module):
    """Every target token looks at the real tokens of its source (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3).

    `width` is d, by default dim / heads; `scale` multiplies products of queries and keys, by default 1 / sqrt(d);
    `dropout` acts on the attention weights. The source may have fewer rows: each then serves as many rows of tokens that
    follow one another.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        width: int | None = None,
        *,
        bias: bool = True,
        scale: float | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.heads, self.scale, self.dropout = heads, scale, dropout
        inner = heads * width if width else dim
        self.q = nn.Linear(dim, inner, bias)
        self.kv = nn.Linear(dim, 2 * inner, bias)
        self.proj = nn.Linear(inner, dim, bias)

    def remember(self, source: Tensor) -> Memory:  # B S D -> B heads S d, twice
        return tuple(self.kv(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind())

    def forward(self, x: Tensor, memory: Memory, mask: Tensor | None) -> Tensor:  # B T D, B S -> B T D
        q = self.q(x)
        q = q.reshape(memory[0].shape[0], -1, q.shape[-1]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q, *memory, None if mask is None else mask[:, None, None], self.dropout if self.training else 0.0, scale=self.scale
        )
        return self.proj(y.transpose(1, 2).flatten(2).reshape(*x.shape[:2], -1))


class FeedForward(nn.Module):
    """Widen, bend by `act`, narrow (Vaswani et al. 2017, section 3.3)."""

    def __init__(self, dim: int, hidden: int, act: Callable[[Tensor], Tensor], dropout: float = 0.0, bias: bool = True):
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias)
        self.down = nn.Linear(hidden, dim, bias)
        self.act, self.dropout = act, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # ... D -> ... D
        return self.down(self.dropout(self.act(self.up(x))))


class EncoderDecoder(nn.Module):
    """Source and what is said so far -> logits of the token that follows each of the latter.

    `tokens` begins with the token that answers begin with. With a `cache` (see `new_cache`) the source is read once,
    after which it may be None, and only the tokens not yet read are given; it may have a row for every several rows of
    tokens, the beams of a search. Padding may stand on either side. Subclasses make `embed` and `decoder`, a list of blocks
    with a `cross`, and say how to `encode`, `decode` and `say`.
    """

    embed: nn.Embedding
    decoder: nn.ModuleList

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    @property
    def width(self) -> int:
        """d"""
        return self.config.dim // self.config.heads

    @property
    def longest(self) -> int | None:
        """Tokens of an answer at most; None = any number."""
        return self.config.length

    def new_cache(self, rows: int, length: int | None = None) -> Cache:
        """Room for `length` target tokens a row, at most and by default the network's own."""
        return self.cache(rows, min(length or self.config.length, self.config.length))

    def cache(self, rows: int, length: int) -> Cache:
        weight = self.embed.weight
        return Cache(rows, length, len(self.decoder), self.config.heads, self.width, dtype=weight.dtype, device=weight.device)

    def check(self, steps: int, cache: Cache | None = None) -> None:
        """Raises `DataError` for rows that are too long; call after `open`."""
        if (total := steps + (cache.start if cache else 0)) > self.config.length:
            raise DataError(
                f"a row of {total} tokens is longer than length={self.config.length}; "
                "cut the rows or create the network with a larger length"
            )

    def encode(self, source: Tensor, mask: Tensor | None = None) -> Tensor:  # B S, B S bool -> B S D
        raise NotImplementedError

    def decode(
        self, tokens: Tensor, mask: Tensor | None, memory: list[Memory], source_mask: Tensor | None, cache: Cache | None
    ) -> Tensor:  # B T -> B T D
        raise NotImplementedError

    def say(self, x: Tensor) -> Tensor:  # ... D -> ... vocab
        raise NotImplementedError

    def remember(self, source: Tensor, mask: Tensor | None) -> Source:  # B S, B S bool
        """All that a decoder needs of its source."""
        mask = None if mask is None else at_least_one(mask)
        encoded = self.encode(source, mask)
        return [block.cross.remember(encoded) for block in self.decoder], mask

    def forward(self, source, source_mask, tokens: Tensor, mask=None, cache: Cache | None = None) -> Tensor:  # -> B T vocab
        known = self.remember(source, source_mask) if cache is None or cache.cross is None else cache.cross
        if cache is not None:
            cache.cross = known
            cache.open(tokens.shape[1], mask)
        return self.say(self.decode(tokens, mask, *known, cache))

    def last(self, tokens: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:  # B T -> B vocab
        """The logits of each row's last place alone, with a cache that has its source (`cross`)."""
        cache.open(tokens.shape[1], mask)
        return self.say(self.decode(tokens, mask, *cache.cross, cache)[:, -1])

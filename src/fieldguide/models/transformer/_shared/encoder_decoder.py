"""Parts shared by the encoder-decoders: cross-attention, the MLP, and decoding with a cache.

Shapes: B batch, S source tokens, T target tokens, D width, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from fieldguide.core.errors import DataError
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.kv_cache import Cache
from fieldguide.models.layers.padding import ensure_nonempty

Memory = tuple[Tensor, Tensor]  # keys and values of the source for one layer, B heads S d each
Source = tuple[list[Memory], Tensor | None]  # those of all layers, and the mask of real source tokens, B S


class CrossAttention(nn.Module):
    """Attention of target tokens to the real tokens of their source (Vaswani et al. 2017, arXiv:1706.03762, section
    3.2.3).

    `width` is d, by default dim / heads; `scale` multiplies the attention scores, by default 1 / sqrt(d); `dropout`
    acts on the attention weights. The source may have fewer rows than the target: each then serves several
    consecutive target rows.
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

    def project_kv(self, source: Tensor) -> Memory:  # B S D -> B heads S d, twice
        """Return the keys and values of the encoded source."""
        return tuple(self.kv(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind())

    def forward(self, x: Tensor, memory: Memory, mask: Tensor | None) -> Tensor:  # B T D, B S -> B T D
        q = self.q(x)
        q = q.reshape(memory[0].shape[0], -1, q.shape[-1]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        y = dot_product_attention(
            q, *memory, None if mask is None else mask[:, None, None], self.dropout if self.training else 0.0, scale=self.scale
        )
        return self.proj(y.transpose(1, 2).flatten(2).reshape(*x.shape[:2], -1))


class FeedForward(nn.Module):
    """Two linear layers with the activation `act` in between (Vaswani et al. 2017, section 3.3)."""

    def __init__(self, dim: int, hidden: int, act: Callable[[Tensor], Tensor], dropout: float = 0.0, bias: bool = True):
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias)
        self.down = nn.Linear(hidden, dim, bias)
        self.act, self.dropout = act, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # ... D -> ... D
        return self.down(self.dropout(self.act(self.up(x))))


class EncoderDecoder(nn.Module):
    """Base class of encoder-decoders that return the logits of the next target token at each position.

    `tokens` begins with the decoder start token. With a `cache` (see `new_cache`) the source is encoded once, after
    which it may be None, and only the new tokens are passed; the source may have one row per several rows of tokens,
    the beams of a search. Padding may be on either side. Subclasses create `embed` and `decoder`, a list of blocks
    with a `cross`, and implement `encode`, `decode` and `forward_head`.
    """

    embed: nn.Embedding
    decoder: nn.ModuleList

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    @property
    def width(self) -> int:
        """Width d of a head."""
        return self.config.dim // self.config.heads

    @property
    def max_target_length(self) -> int | None:
        """Maximum number of generated tokens; None = unlimited."""
        return self.config.length

    def new_cache(self, rows: int, length: int | None = None) -> Cache:
        """Return a cache for `length` target tokens per row, by default and at most the model's own `length`."""
        return self.make_cache(rows, min(length or self.config.length, self.config.length))

    def make_cache(self, rows: int, length: int) -> Cache:
        """Return a cache for `length` target tokens per row."""
        weight = self.embed.weight
        return Cache(rows, length, len(self.decoder), self.config.heads, self.width, dtype=weight.dtype, device=weight.device)

    def check_length(self, steps: int, cache: Cache | None = None) -> None:
        """Raise `DataError` for sequences that are too long; call it after `Cache.reserve`."""
        if (total := steps + (cache.start if cache else 0)) > self.config.length:
            raise DataError(
                f"A sequence of {total} tokens exceeds the model's length={self.config.length}. "
                "Truncate the input or create the model with a larger length."
            )

    def encode(self, source: Tensor, mask: Tensor | None = None) -> Tensor:  # B S, B S bool -> B S D
        """Return the encoded source."""
        raise NotImplementedError

    def decode(
        self, tokens: Tensor, mask: Tensor | None, memory: list[Memory], source_mask: Tensor | None, cache: Cache | None
    ) -> Tensor:  # B T -> B T D
        """Return the final hidden states of the target tokens."""
        raise NotImplementedError

    def forward_head(self, x: Tensor) -> Tensor:  # ... D -> ... vocab
        """Return the logits of hidden states."""
        raise NotImplementedError

    def encode_source(self, source: Tensor, mask: Tensor | None) -> Source:  # B S, B S bool
        """Return what the decoder needs of its source: keys and values of all layers, and the mask."""
        mask = None if mask is None else ensure_nonempty(mask)
        encoded = self.encode(source, mask)
        blocks: Iterable[Any] = self.decoder
        return [block.cross.project_kv(encoded) for block in blocks], mask

    def forward(  # B S, B S bool, B T, B T bool -> B T vocab
        self,
        source: Tensor | None,
        source_mask: Tensor | None,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        if cache is not None and cache.cross is not None:
            known = cache.cross
        else:
            assert source is not None
            known = self.encode_source(source, source_mask)
        if cache is not None:
            cache.cross = known
            cache.reserve(tokens.shape[1], mask)
        return self.forward_head(self.decode(tokens, mask, *known, cache))

    def last(self, tokens: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:  # B T -> B vocab
        """Return the logits of the last position only, with a cache that holds the source (`cross`)."""
        assert cache.cross is not None
        cache.reserve(tokens.shape[1], mask)
        return self.forward_head(self.decode(tokens, mask, *cache.cross, cache)[:, -1])

"""mBART: texts in 25 or 50 languages are repaired, then translated (Liu et al. 2020, arXiv:2001.08210).

New here: BART's training on many languages at once, with a token that names the language: of 25, last in the source and
first in the answer; of 50 (arXiv:2008.00401), first in both. Layers normalise first, as deeper stacks on noisier data
need it; each stack ends with a norm of its own, and embeddings are scaled by sqrt(D) where they are read.

Initialisation: as BART, N(0, 0.02), zero biases.
Shapes: B batch, S source tokens, T target tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.causal import CausalAttention
from fieldguide.models.transformer import bart
from fieldguide.models.transformer._shared.encoder_decoder import CrossAttention, FeedForward, Memory


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 250_027
    length: int = 1024  # longest row, tokens
    dim: int = 1024  # D
    depth: int = 12  # layers of the encoder
    decoder_depth: int = 12
    heads: int = 16
    hidden: int = 4096  # width inside the two-layer networks
    dropout: float = 0.1
    attn_dropout: float = 0.0  # of attention weights
    mlp_dropout: float = 0.0  # inside the two-layer networks
    begin: int | None = None  # the token that answers begin with; None = that of their language
    end: int = 2
    pad: int = 1


class EncoderBlock(nn.Module):
    """`mlp` is the two-layer network of this layer."""

    def __init__(self, c: Any, mlp: nn.Module):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(c.dim), Attention(c.dim, c.heads, c.attn_dropout)
        self.norm2, self.mlp = nn.LayerNorm(c.dim), mlp
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # B S D -> B S D
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class DecoderBlock(nn.Module):
    """As above."""

    def __init__(self, c: Any, mlp: nn.Module):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(c.dim), CausalAttention(c.dim, c.heads, c.attn_dropout)
        self.norm2, self.cross = nn.LayerNorm(c.dim), CrossAttention(c.dim, c.heads, dropout=c.attn_dropout)
        self.norm3, self.mlp = nn.LayerNorm(c.dim), mlp
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, seen: Tensor | None, memory: Memory, mask, cache, layer: int) -> Tensor:  # B T D -> B T D
        x = x + self.dropout(self.attn(self.norm1(x), seen, cache, layer))
        x = x + self.dropout(self.cross(self.norm2(x), memory, mask))
        return x + self.dropout(self.mlp(self.norm3(x)))


class MBart(bart.Bart):
    """Source and what is said so far -> logits of the token that follows each of the latter; used as BART is."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.scale = math.sqrt(config.dim)

    def norms(self) -> tuple[nn.Module, nn.Module]:
        return nn.LayerNorm(self.config.dim), nn.LayerNorm(self.config.dim)

    def network(self, layer: int) -> nn.Module:
        c = self.config
        return FeedForward(c.dim, c.hidden, F.gelu, c.mlp_dropout)

    def encoder_block(self, layer: int) -> nn.Module:
        return EncoderBlock(self.config, self.network(layer))

    def decoder_block(self, layer: int) -> nn.Module:
        return DecoderBlock(self.config, self.network(layer))


CARD = Card(
    name="mbart",
    model=MBart,
    config=Config,
    paper="arXiv:2001.08210",
    year=2020,
    input_type="pair",
    output_type="tokens",
    pretraining_objective="infill",
    sizes={
        "mbart-cc25": Size(params=610_851_840, source="facebook/mbart-large-cc25"),
        "mbart-50": Size(vocab_size=250_054, begin=2, params=610_879_488, source="facebook/mbart-large-50"),
        # Of the same form, to be trained from nothing.
        "mbart-mini": Size(vocab_size=8192, **bart.stacks(4, 256, 4, 1024)),
        "mbart-test": Size(**bart.TEST),
    },
    weights={"huggingface": bart.HUGGINGFACE},
    configs={"huggingface": bart.config("mbart", "MBartForConditionalGeneration", scaled=True)},
    recipe=bart.RECIPE,
)

"""mBART: multilingual denoising pre-training for translation (Liu et al. 2020, arXiv:2001.08210).

New here: BART's training on 25 or 50 languages at once, with a token for the language: for 25, last in the source and
first in the target; for 50 (arXiv:2008.00401), first in both. Layers are pre-norm, which deeper stacks and noisier
data need; each stack ends with a normalization layer, and the input embeddings are scaled by sqrt(D).

Initialization: as BART, N(0, 0.02), zero biases.
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
from fieldguide.models.layers.kv_cache import Cache
from fieldguide.models.transformer import bart
from fieldguide.models.transformer._shared.encoder_decoder import CrossAttention, FeedForward, Memory


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 250_027
    length: int = 1024  # maximum sequence length, in tokens
    dim: int = 1024  # D
    depth: int = 12  # number of encoder layers
    decoder_depth: int = 12
    heads: int = 16
    hidden: int = 4096  # hidden width of the MLPs
    dropout: float = 0.1
    attn_dropout: float = 0.0  # dropout of the attention weights
    mlp_dropout: float = 0.0  # dropout inside the MLPs
    begin: int | None = None  # ID of the first decoder token; None = the language token
    end: int = 2
    pad: int = 1


class EncoderBlock(nn.Module):
    """A pre-norm encoder block: attention and the given `mlp`."""

    def __init__(self, c: Any, mlp: nn.Module):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(c.dim), Attention(c.dim, c.heads, c.attn_dropout)
        self.norm2, self.mlp = nn.LayerNorm(c.dim), mlp
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # B S D -> B S D
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class DecoderBlock(nn.Module):
    """A pre-norm decoder block: causal attention, cross-attention and the given `mlp`."""

    def __init__(self, c: Any, mlp: nn.Module):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(c.dim), CausalAttention(c.dim, c.heads, c.attn_dropout)
        self.norm2, self.cross = nn.LayerNorm(c.dim), CrossAttention(c.dim, c.heads, dropout=c.attn_dropout)
        self.norm3, self.mlp = nn.LayerNorm(c.dim), mlp
        self.dropout = nn.Dropout(c.dropout)

    def forward(  # B T D -> B T D
        self, x: Tensor, seen: Tensor | None, memory: Memory, mask: Tensor | None, cache: Cache | None, layer: int
    ) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x), seen, cache, layer))
        x = x + self.dropout(self.cross(self.norm2(x), memory, mask))
        return x + self.dropout(self.mlp(self.norm3(x)))


class MBart(bart.Bart):
    """An encoder-decoder that returns the logits of the next target token at each position; same interface as `Bart`."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.scale = math.sqrt(config.dim)

    def make_norms(self) -> tuple[nn.Module, nn.Module]:
        return nn.LayerNorm(self.config.dim), nn.LayerNorm(self.config.dim)

    def make_mlp(self, layer: int) -> nn.Module:
        """Return the MLP of this layer."""
        c = self.config
        return FeedForward(c.dim, c.hidden, F.gelu, c.mlp_dropout)

    def make_encoder_block(self, layer: int) -> nn.Module:
        return EncoderBlock(self.config, self.make_mlp(layer))

    def make_decoder_block(self, layer: int) -> nn.Module:
        return DecoderBlock(self.config, self.make_mlp(layer))


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
        # Small sizes for training from scratch.
        "mbart-mini": Size(vocab_size=8192, **bart.stack_shape(4, 256, 4, 1024)),
        "mbart-test": Size(**bart.TEST),
    },
    weights={"huggingface": bart.HUGGINGFACE},
    configs={"huggingface": bart.map_config("mbart", "MBartForConditionalGeneration", scaled=True)},
    recipe=bart.RECIPE,
)

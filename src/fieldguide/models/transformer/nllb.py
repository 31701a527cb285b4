"""NLLB-200: translation between any two of 200 languages (NLLB Team 2022, arXiv:2207.04672).

New here: nothing in the network, which is that of M2M-100 (arXiv:2010.11125): mBART with sinusoids for places, ReLU and no
norm of the embeddings; but in what it learns from: sentences found and cleaned for languages that have few. The language
stands first in the source, and first in the answer, after its begin.

Initialisation: N(0, 0.02) for matrices and embeddings, zero biases.
Shapes: B batch, S source tokens, T target tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.mapping.key_rules import Dropped, Row
from fieldguide.models.transformer import bart
from fieldguide.models.transformer._shared.encoder_decoder import FeedForward
from fieldguide.models.transformer.mbart import MBart


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 256_206
    length: int = 1024  # longest row, tokens
    dim: int = 1024  # D
    depth: int = 12  # layers of the encoder
    decoder_depth: int = 12
    heads: int = 16
    hidden: int = 4096  # width inside the two-layer networks
    dropout: float = 0.1
    attn_dropout: float = 0.1  # of attention weights
    mlp_dropout: float = 0.0  # inside the two-layer networks
    begin: int = 2  # the token that answers begin with, before their language
    end: int = 2
    pad: int = 1


class Places(nn.Module):
    """All sines, then all cosines, of wavelengths from 2 pi to 10000 * 2 pi (Vaswani et al. 2017, section 3.5, in the order
    and with the steps of the authors' code, and rounded as there)."""

    def __init__(self, length: int, dim: int):
        super().__init__()
        speed = torch.exp(torch.arange(dim // 2).float() * -(math.log(10_000) / (dim // 2 - 1)))
        angle = torch.arange(length).float()[:, None] * speed
        self.register_buffer("weights", torch.cat([angle.sin(), angle.cos()], 1), persistent=False)

    def forward(self, place: Tensor) -> Tensor:  # ... -> ... D
        return self.weights[place]


class NLLB(MBart):
    """Source and what is said so far -> logits of the token that follows each of the latter; used as BART is."""

    biased = False

    def places(self) -> nn.Module:
        return Places(self.config.length + bart.OFFSET, self.config.dim)

    def norms(self) -> tuple[nn.Module, nn.Module]:
        return nn.Identity(), nn.LayerNorm(self.config.dim)

    def network(self, layer: int) -> nn.Module:
        c = self.config
        return FeedForward(c.dim, c.hidden, F.relu, c.mlp_dropout)


def tables() -> dict[str, Row]:
    """Names beside the layers' in files of transformers."""
    computed = {f"model.{side}.embed_positions.weights": Dropped("sinusoids") for side in ("encoder", "decoder")}
    return computed | bart.tables("model.") | {"lm_head.weight": "embed.weight"}


def sized(depth: int, dim: int, hidden: int, params: int, source: str, **other: int) -> Size:
    return Size(**bart.stacks(depth, dim, 16, hidden), **other, params=params, source=source)


CARD = Card(
    name="nllb",
    model=NLLB,
    config=Config,
    paper="arXiv:2207.04672",
    year=2022,
    input_type="pair",
    output_type="tokens",
    sizes={
        "nllb-600m": Size(params=615_073_792, source="facebook/nllb-200-distilled-600M"),
        "nllb-1.3b": sized(24, 1024, 8192, 1_370_638_336, "facebook/nllb-200-1.3B"),
        "nllb-3.3b": sized(24, 2048, 8192, 3_344_863_232, "facebook/nllb-200-3.3B"),
        "m2m100-418m": Size(vocab_size=128_112, params=483_905_536, source="facebook/m2m100_418M"),
        "m2m100-1.2b": sized(24, 1024, 8192, 1_239_470_080, "facebook/m2m100_1.2B", vocab_size=128_112),
        # Of the same form, to be trained from nothing.
        "nllb-mini": Size(vocab_size=8192, **bart.stacks(4, 256, 4, 1024), attn_dropout=0.0),
        "nllb-test": Size(**bart.TEST),
    },
    weights={"huggingface": tables() | bart.layers("model.")},
    configs={"huggingface": bart.config("m2m_100", "M2M100ForConditionalGeneration", "relu", scaled=True)},
    recipe=bart.RECIPE,
)

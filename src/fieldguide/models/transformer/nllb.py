"""NLLB-200: translation between any two of 200 languages (NLLB Team 2022, arXiv:2207.04672).

New here: the training data, sentences mined and cleaned for low-resource languages. The architecture is that of
M2M-100 (arXiv:2010.11125): mBART with sinusoidal positions, ReLU and no normalization of the embeddings. The language
token is first in the source, and in the target it follows the start token.

Initialization: N(0, 0.02) for matrices and embeddings, zero biases.
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
    length: int = 1024  # maximum sequence length, in tokens
    dim: int = 1024  # D
    depth: int = 12  # number of encoder layers
    decoder_depth: int = 12
    heads: int = 16
    hidden: int = 4096  # hidden width of the MLPs
    dropout: float = 0.1
    attn_dropout: float = 0.1  # dropout of the attention weights
    mlp_dropout: float = 0.0  # dropout inside the MLPs
    begin: int = 2  # ID of the first decoder token, before the language token
    end: int = 2
    pad: int = 1


class SinusoidalPositions(nn.Module):
    """Sinusoidal positions: all sines, then all cosines, of wavelengths from 2 pi to 10000 * 2 pi (Vaswani et al. 2017,
    section 3.5, in the order, spacing and precision of the authors' code).
    """

    weights: Tensor  # length D

    def __init__(self, length: int, dim: int):
        super().__init__()
        speed = torch.exp(torch.arange(dim // 2).float() * -(math.log(10_000) / (dim // 2 - 1)))
        angle = torch.arange(length).float()[:, None] * speed
        self.register_buffer("weights", torch.cat([angle.sin(), angle.cos()], 1), persistent=False)

    def forward(self, place: Tensor) -> Tensor:  # ... -> ... D
        return self.weights[place]


class NLLB(MBart):
    """An encoder-decoder that returns the logits of the next target token at each position; same interface as `Bart`."""

    biased = False

    def make_positions(self) -> nn.Module:
        return SinusoidalPositions(self.config.length + bart.OFFSET, self.config.dim)

    def make_norms(self) -> tuple[nn.Module, nn.Module]:
        return nn.Identity(), nn.LayerNorm(self.config.dim)

    def make_mlp(self, layer: int) -> nn.Module:
        """Return the MLP of this layer."""
        c = self.config
        return FeedForward(c.dim, c.hidden, F.relu, c.mlp_dropout)


def map_embeddings() -> dict[str, Row]:
    """Return the names outside the layers in files of transformers."""
    computed = {f"model.{side}.embed_positions.weights": Dropped("sinusoids") for side in ("encoder", "decoder")}
    return computed | bart.map_embeddings("model.") | {"lm_head.weight": "embed.weight"}


def make_size(depth: int, dim: int, hidden: int, params: int, source: str, **other: int) -> Size:
    """Return a size with 16 heads."""
    return Size(**bart.stack_shape(depth, dim, 16, hidden), **other, params=params, source=source)


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
        "nllb-1.3b": make_size(24, 1024, 8192, 1_370_638_336, "facebook/nllb-200-1.3B"),
        "nllb-3.3b": make_size(24, 2048, 8192, 3_344_863_232, "facebook/nllb-200-3.3B"),
        "m2m100-418m": Size(vocab_size=128_112, params=483_905_536, source="facebook/m2m100_418M"),
        "m2m100-1.2b": make_size(24, 1024, 8192, 1_239_470_080, "facebook/m2m100_1.2B", vocab_size=128_112),
        # Small sizes for training from scratch.
        "nllb-mini": Size(vocab_size=8192, **bart.stack_shape(4, 256, 4, 1024), attn_dropout=0.0),
        "nllb-test": Size(**bart.TEST),
    },
    weights={"huggingface": map_embeddings() | bart.map_layers("model.")},
    configs={"huggingface": bart.map_config("m2m_100", "M2M100ForConditionalGeneration", "relu", scaled=True)},
    recipe=bart.RECIPE,
)

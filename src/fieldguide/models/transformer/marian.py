"""Marian: small translation models for a thousand language pairs, OPUS-MT (Tiedemann and Thottingal 2020).

New here: one Transformer for each pair of languages, trained with Marian (Junczys-Dowmunt et al. 2018, arXiv:1804.00344) on the
parallel texts of OPUS. BART's layers with swish; sinusoidal positions, first all sines and then all cosines; embeddings scaled by
sqrt(D) and not normalized; a bias of the logits that files hold. Targets begin with the padding token, which is never generated.

Initialization: N(0, 0.02) for matrices and embeddings, zero biases.
Shapes: B batch, S source tokens, T target tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.mapping.config_rules import ConfigRow, Expect, ValueMap
from fieldguide.models.mapping.key_rules import Dropped, Row
from fieldguide.models.transformer import bart
from fieldguide.models.transformer._shared.encoder_decoder import FeedForward


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 58_101
    length: int = 512  # maximum sequence length, in tokens
    dim: int = 512  # D
    depth: int = 6  # number of encoder layers
    decoder_depth: int = 6
    heads: int = 8
    hidden: int = 2048  # hidden width of the MLPs
    relu: bool = False  # ReLU instead of swish, as in the larger models
    dropout: float = 0.1
    attn_dropout: float = 0.0  # dropout of the attention weights
    mlp_dropout: float = 0.0  # dropout inside the MLPs
    begin: int = 58_100  # ID of the first decoder token
    end: int = 0
    pad: int = 58_100


class HalvedSinusoids(nn.Module):
    """Sinusoidal positions: all sines, then all cosines, of wavelengths from 2 pi to nearly 10000 * 2 pi (Vaswani et al. 2017,
    section 3.5), computed in float64. The index of position p is p + `bart.OFFSET`.
    """

    weights: Tensor  # length D

    def __init__(self, length: int, dim: int):
        super().__init__()
        speed = 10_000 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * speed
        self.register_buffer("weights", torch.cat([angle.sin(), angle.cos()], 1).float(), persistent=False)

    def forward(self, place: Tensor) -> Tensor:  # ... -> ... D
        return self.weights[place - bart.OFFSET]


class Marian(bart.Bart):
    """An encoder-decoder that returns the logits of the next target token at each position; same interface as `Bart`."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.scale = math.sqrt(config.dim)
        act: Callable[[Tensor], Tensor] = F.relu if config.relu else F.silu
        for module in self.modules():
            if isinstance(module, FeedForward):
                module.act = act

    def make_positions(self) -> nn.Module:
        return HalvedSinusoids(self.config.length, self.config.dim)

    def make_norms(self) -> tuple[nn.Module, nn.Module]:
        return nn.Identity(), nn.Identity()


def map_names() -> dict[str, Row]:
    """Return the names in files of transformers, for Marian and Pegasus."""
    computed = {
        f"model.{side}.embed_positions.weight{end}": Dropped("sinusoids")
        for side in ("encoder", "decoder")
        for end in ("", "s")
    }
    return bart.map_embeddings("model.") | computed | bart.map_layers("model.") | bart.HEAD


def map_config(kind: str, name: str, act: ConfigRow) -> dict[str, ConfigRow]:
    """Return the configuration keys of transformers, for Marian and Pegasus."""
    return bart.map_config(kind, name, scaled=True) | {"activation_function": act}


CARD = Card(
    name="marian",
    model=Marian,
    config=Config,
    paper="https://aclanthology.org/2020.eamt-1.61",
    year=2020,
    input_type="pair",
    output_type="tokens",
    sizes={
        # transformers also counts the two tables of positions.
        "opus-mt-en-de": Size(params=73_886_208, source="Helsinki-NLP/opus-mt-en-de"),
        "opus-mt-en-fr": Size(
            vocab_size=59_514, begin=59_513, pad=59_513, params=74_609_664, source="Helsinki-NLP/opus-mt-en-fr"
        ),
        # A small size for training from scratch.
        "marian-mini": Size(vocab_size=8192, **bart.stack_shape(3, 256, 4, 1024), begin=0, end=1, pad=0),
        "marian-test": Size(**bart.TEST, begin=1, end=0, pad=1),
    },
    weights={"huggingface": map_names()},
    configs={
        "huggingface": {
            **map_config("marian", "MarianMTModel", ValueMap("relu", {"swish": False, "silu": False, "relu": True})),
            "share_encoder_decoder_embeddings": Expect(True),
        }
    },
    recipe=bart.RECIPE,
)

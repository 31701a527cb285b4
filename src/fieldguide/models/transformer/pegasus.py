"""Pegasus: pre-training by writing the sentences that sum up a text (Zhang et al. 2019, arXiv:1912.08777).

New here: the sentences of a text that are most similar to the rest are removed, and the decoder writes them, which resembles
summarization more than filling gaps does. The network is mBART's with sinusoidal positions, first all sines and then all
cosines, ReLU and no normalization of the embeddings.

Initialization: N(0, 0.02) for matrices and embeddings, zero biases.
Shapes: B batch, S source tokens, T target tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from fieldguide.core.card import Card, Size
from fieldguide.models.mapping.config_rules import Expect
from fieldguide.models.transformer import bart
from fieldguide.models.transformer._shared.encoder_decoder import FeedForward
from fieldguide.models.transformer.marian import HalvedSinusoids, map_config, map_names
from fieldguide.models.transformer.mbart import MBart


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 96_103
    length: int = 1024  # maximum sequence length, in tokens
    dim: int = 1024  # D
    depth: int = 16  # number of encoder layers
    decoder_depth: int = 16
    heads: int = 16
    hidden: int = 4096  # hidden width of the MLPs
    dropout: float = 0.1
    attn_dropout: float = 0.1  # dropout of the attention weights
    mlp_dropout: float = 0.1  # dropout inside the MLPs
    begin: int = 0  # ID of the first decoder token
    end: int = 1
    pad: int = 0


class Pegasus(MBart):
    """An encoder-decoder that returns the logits of the next target token at each position; same interface as `Bart`."""

    def make_positions(self) -> nn.Module:
        return HalvedSinusoids(self.config.length, self.config.dim)

    def make_norms(self) -> tuple[nn.Module, nn.Module]:
        return nn.Identity(), nn.LayerNorm(self.config.dim)

    def make_mlp(self, layer: int) -> nn.Module:
        """Return the MLP of this layer."""
        c = self.config
        return FeedForward(c.dim, c.hidden, F.relu, c.mlp_dropout)


CARD = Card(
    name="pegasus",
    model=Pegasus,
    config=Config,
    paper="arXiv:1912.08777",
    year=2019,
    input_type="pair",
    output_type="tokens",
    pretraining_objective="infill",
    sizes={
        # transformers also counts the two tables of positions.
        "pegasus-large": Size(params=568_699_904, source="google/pegasus-large"),
        "pegasus-xsum": Size(length=512, params=568_699_904, source="google/pegasus-xsum"),
        # A small size for training from scratch.
        "pegasus-mini": Size(vocab_size=8192, **bart.stack_shape(3, 256, 4, 1024), attn_dropout=0.0, mlp_dropout=0.0),
        "pegasus-test": Size(**bart.TEST),
    },
    weights={"huggingface": map_names()},
    configs={"huggingface": map_config("pegasus", "PegasusForConditionalGeneration", Expect("relu"))},
    recipe=bart.RECIPE,
)

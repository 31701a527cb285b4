"""Autoencoder: a network that rebuilds its input from a few numbers (Hinton and Salakhutdinov 2006).

New here: a narrow middle. An encoder reduces the input to a code, a decoder rebuilds the input from it, and both are trained by the
error between the two, without labels. What is like the training data survives, what is not does not: the error says how unusual
an input is. The paper pretrains each layer as a restricted Boltzmann machine and uses sigmoids; here all layers are trained at
once with ReLU, and the code is linear as in the paper.

Initialization: torch's default for linear layers.
Shapes: B batch, F features, D width of the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from fieldguide.core.card import Card, Size


@dataclass(frozen=True, kw_only=True)
class Config:
    features: int = 32  # F
    hidden: tuple[int, ...] = (64,)  # widths of the encoder; those of the decoder are in the opposite order
    code: int = 8  # D; at most half of the features, so that the input cannot be copied
    dropout: float = 0.0


def build_layers(widths: Sequence[int], dropout: float) -> nn.Sequential:
    """Return linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])


class Autoencoder(nn.Module):
    """Features -> the same features, rebuilt."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        widths = [c.features, *c.hidden, max(1, min(c.code, c.features // 2))]
        self.encoder, self.decoder = build_layers(widths, c.dropout), build_layers(widths[::-1], c.dropout)

    def encode(self, vector: Tensor) -> Tensor:  # B F -> B D
        return self.encoder(vector)

    def forward(self, vector: Tensor) -> Tensor:  # B F -> B F
        return self.decoder(self.encode(vector))


CARD = Card(
    name="autoencoder",
    model=Autoencoder,
    config=Config,
    paper="doi:10.1126/science.1127647",
    year=2006,
    input_type="vector",
    output_type="reconstruction",
    sizes={
        "autoencoder-s": Size(),
        "autoencoder-m": Size(hidden=(256, 64), code=16),
        "autoencoder-mnist": Size(
            features=784, hidden=(1000, 500, 250), code=30, params=2_837_314, source="the paper's layers 784-1000-500-250-30"
        ),
        "autoencoder-test": Size(features=6, hidden=(7, 5), code=4),
    },
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-4},
)

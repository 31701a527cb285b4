"""Convolutional autoencoder: rebuilds a series from a short, narrow code (Masci et al. 2011).

New here: convolutions in both halves of an autoencoder, so that the code keeps the order of time and the same patterns are found
everywhere. Each layer of the encoder halves the number of steps; each layer of the decoder doubles it. The paper is about images
and reduces them by maximum filters; here are strided convolutions of series.

Initialization: torch's default for convolutions.
Shapes: B batch, T steps, C channels, D width, K channels of the code, N steps of the code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 1  # C
    dim: int = 32  # D
    depth: int = 3  # layers of each half
    code: int = 2  # K
    kernel: int = 7  # odd
    dropout: float = 0.0


class ConvAutoencoder(nn.Module):
    """Series of any length -> the same series, rebuilt."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        edge = c.kernel // 2
        inputs = [c.channels, *[c.dim] * c.depth]
        self.down = nn.ModuleList(nn.Conv1d(i, c.dim, c.kernel, 2, edge) for i in inputs[: c.depth])
        self.narrow, self.wide = nn.Conv1d(c.dim, c.code, 1), nn.Conv1d(c.code, c.dim, 1)
        self.up = nn.ModuleList(nn.ConvTranspose1d(c.dim, c.dim, 4, 2, 1) for _ in range(c.depth))
        self.last = nn.Conv1d(c.dim, c.channels, c.kernel, 1, edge)
        self.dropout = nn.Dropout(c.dropout)

    def encode(self, series: Tensor) -> Tensor:  # B T C -> B K N
        x = series.mT
        for conv in self.down:
            x = self.dropout(F.relu(conv(x)))
        return self.narrow(x)

    def forward(self, series: Tensor) -> Tensor:  # B T C -> B T C
        x = F.relu(self.wide(self.encode(series)))
        for conv in self.up:
            x = self.dropout(F.relu(conv(x)))
        return self.last(x)[:, :, : series.shape[1]].mT  # the code stands for a few steps more if T is no multiple


CARD = Card(
    name="conv-autoencoder",
    model=ConvAutoencoder,
    config=Config,
    paper="doi:10.1007/978-3-642-21735-7_7",
    year=2011,
    input_type="series",
    output_type="reconstruction",
    endless=True,
    adapt=lambda need: {"code": max(2, need["channels"])} if need.get("channels") else {},
    sizes={
        "conv-autoencoder-s": Size(),
        "conv-autoencoder-m": Size(dim=64),
        "conv-autoencoder-test": Size(channels=3, dim=5, depth=2, code=4, kernel=3),
    },
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 1e-4},
)

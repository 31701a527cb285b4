"""Shared base of the RNN, LSTM and GRU text classifiers, which differ only in the cell.

Initialization: that of `models.layers.recurrent.Recurrent`; embeddings are normal with standard deviation 0.1, the
head is uniform by fan-in.
Shapes: B batch, T tokens, D width of an embedding, H hidden units, directions 1 or 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fieldguide.models.layers.recurrent import Recurrent


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 16_000
    num_classes: int = 2
    dim: int = 128  # D
    hidden: int = 256  # H
    depth: int = 1  # layers
    directions: int = 2  # 2 is bidirectional
    dropout: float = 0.3  # on embeddings, between layers and before the head


class RecurrentClassifier(nn.Module):
    """Text classifier that uses the state after the last real token (and the first, in the backward direction)."""

    cell: ClassVar[type[nn.RNN | nn.LSTM | nn.GRU]]

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.rnn = Recurrent(self.cell, config.dim, config.hidden, config.depth, config.directions, config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden * config.directions, config.num_classes)
        nn.init.normal_(self.embed.weight, std=0.1)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # B T, B T -> B classes
        x = self.dropout(self.embed(tokens))  # B T D
        return self.head(self.dropout(self.rnn(x, mask)))

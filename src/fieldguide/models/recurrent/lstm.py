"""LSTM: a memory cell behind gates (Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735).

New here: a cell state that is added to, not multiplied, so its gradient survives many steps; gates decide
what is written, kept (the forget gate of Gers et al. 2000) and read.

Initialisation: that of `blocks.recurrent.Recurrent`; embeddings are normal with deviation 0.1, the head is
uniform by fan-in.
Shapes: B batch, T tokens, D width of an embedding, H hidden units, directions 1 or 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fieldguide.blocks.recurrent import Recurrent
from fieldguide.card import Card, Size


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab: int = 16_000
    classes: int = 2
    dim: int = 128               # D
    hidden: int = 256            # H
    depth: int = 1               # layers
    directions: int = 2          # 2 reads every row backwards too
    dropout: float = 0.3         # on embeddings, between layers and before the head


class LSTM(nn.Module):
    """Tokens -> class logits, read after the last real token of each row (and after the first, backwards)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.rnn = Recurrent(nn.LSTM, config.dim, config.hidden, config.depth, config.directions,
                             config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden * config.directions, config.classes)
        nn.init.normal_(self.embed.weight, std=0.1)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:     # B T, B T -> B classes
        x = self.dropout(self.embed(tokens))                                     # B T D
        return self.head(self.dropout(self.rnn(x, mask)))


CARD = Card(
    name="lstm", model=LSTM, config=Config, paper="doi:10.1162/neco.1997.9.8.1735", year=1997,
    takes="tokens", gives="label",
    sizes={
        "lstm-s": Size(),
        "lstm-m": Size(dim=256, hidden=512, depth=2),
        "lstm-test": Size(vocab=30, classes=3, dim=6, hidden=5, depth=2, directions=2, dropout=0.0),
    },
    # Recurrent gradients burst now and then, so they are clipped.
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.01, "clip": 1.0, "warmup": 0.05},
)

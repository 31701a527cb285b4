"""GRU: one state, two gates (Cho et al. 2014, arXiv:1406.1078).

New here: an update gate that keeps or replaces the state and a reset gate that forgets it; three quarters of
an LSTM's parameters. The form is that of torch and cuDNN: the reset gate acts after the recurrent product,
which has a bias of its own (the paper's first version applies it before).

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


class GRU(nn.Module):
    """Tokens -> class logits, read after the last real token of each row (and after the first, backwards)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.rnn = Recurrent(nn.GRU, config.dim, config.hidden, config.depth, config.directions,
                             config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden * config.directions, config.classes)
        nn.init.normal_(self.embed.weight, std=0.1)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:     # B T, B T -> B classes
        x = self.dropout(self.embed(tokens))                                     # B T D
        return self.head(self.dropout(self.rnn(x, mask)))


CARD = Card(
    name="gru", model=GRU, config=Config, paper="arXiv:1406.1078", year=2014,
    takes="tokens", gives="label",
    sizes={
        "gru-s": Size(),
        "gru-m": Size(dim=256, hidden=512, depth=2),
        "gru-test": Size(vocab=30, classes=3, dim=6, hidden=5, depth=2, directions=2, dropout=0.0),
    },
    # Recurrent gradients burst now and then, so they are clipped.
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.01, "clip": 1.0, "warmup": 0.05},
)

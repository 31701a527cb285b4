"""LSTMClassifier: the guide's text classifier with two LSTM layers (Hochreiter and Schmidhuber 1997).

New here: with a mask, the state after the last real token is used. The guide's code uses the last position of a row,
which is padding in a padded batch; without a mask this network equals it.

Initialization: torch's defaults, as in the guide's code.
Shapes: B batch, T tokens, E width of an embedding, H hidden units.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.padding import lengths, select_position


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 10_000
    embed_dim: int = 128  # E
    hidden: int = 256  # H
    num_classes: int = 2


class LSTMClassifier(nn.Module):
    """The guide's `LSTMClassifier(vocab_size, embed_dim, hidden, num_classes)`."""

    def __init__(self, vocab_size: int, embed_dim: int, hidden: int, num_classes: int):
        super().__init__()
        self.emb = nn.Embedding(vocab_size, embed_dim)
        self.lstm = nn.LSTM(embed_dim, hidden, num_layers=2, batch_first=True, dropout=0.3)
        self.fc = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # B T, B T -> B classes
        states, _ = self.lstm(self.emb(x))  # B T H, of the last layer
        return self.fc(states[:, -1] if mask is None else select_position(states, lengths(mask) - 1))


CARD = Card(
    name="lstm-classifier",
    model=LSTMClassifier,
    config=Config,
    build=lambda config: LSTMClassifier(**asdict(config)),
    paper="doi:10.1162/neco.1997.9.8.1735",
    year=1997,
    input_type="tokens",
    output_type="label",
    names={"vocab_size": "vocab_size", "dim": "embed_dim", "num_classes": "num_classes"},
    sizes={
        "lstm-classifier": Size(params=2_202_114, source="the guide's code"),
        "lstm-classifier-test": Size(vocab_size=30, embed_dim=6, hidden=5, num_classes=3),
    },
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "grad_clip": 1.0},
)

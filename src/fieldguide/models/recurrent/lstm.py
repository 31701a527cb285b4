"""LSTM: a memory cell behind gates (Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735).

New here: a cell state that is added to, not multiplied, so its gradient survives many steps; gates decide
what is written, kept (the forget gate of Gers et al. 2000) and read.

Initialisation: that of `models.recurrent.reader`.
Shapes: B batch, T tokens, D width of an embedding, H hidden units, directions 1 or 2.
"""

from __future__ import annotations

from torch import nn

from fieldguide.core.card import Card, Size
from fieldguide.models.recurrent._shared.text_encoder import Config, RecurrentClassifier


class LSTM(RecurrentClassifier):
    """Tokens -> class logits, read after the last real token of each row (and after the first, backwards)."""

    cell = nn.LSTM


CARD = Card(
    name="lstm",
    model=LSTM,
    config=Config,
    paper="doi:10.1162/neco.1997.9.8.1735",
    year=1997,
    input_type="tokens",
    output_type="label",
    sizes={
        "lstm-s": Size(),
        "lstm-m": Size(dim=256, hidden=512, depth=2),
        "lstm-test": Size(vocab_size=30, num_classes=3, dim=6, hidden=5, depth=2, directions=2, dropout=0.0),
    },
    # Recurrent gradients burst now and then, so they are clipped.
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.01, "grad_clip": 1.0, "warmup": 0.05},
)

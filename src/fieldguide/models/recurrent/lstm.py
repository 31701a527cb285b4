"""LSTM: a gated memory cell (Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735).

New here: the cell state is updated by addition, so that gradients do not vanish over many steps. Gates control what is
written, kept (the forget gate of Gers et al. 2000) and read.

Initialization: that of `models.recurrent._shared.text_encoder`.
Shapes: B batch, T tokens, D width of an embedding, H hidden units, directions 1 or 2.
"""

from __future__ import annotations

from torch import nn

from fieldguide.core.card import Card, Size
from fieldguide.models.recurrent._shared.text_encoder import Config, RecurrentClassifier


class LSTM(RecurrentClassifier):
    """Text classifier that uses the state after the last real token (and the first, in the backward direction)."""

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
    # Gradients of recurrent networks occasionally explode, so they are clipped.
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.01, "grad_clip": 1.0, "warmup": 0.05},
)

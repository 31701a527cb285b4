"""RNN: a simple recurrent network (Elman 1990, doi:10.1207/s15516709cog1402_1).

New here: the hidden state is fed back, so that outputs depend on earlier tokens. Gradients vanish or explode with the
number of steps, which limits its memory; LSTM and GRU address this.

Initialization: that of `models.recurrent._shared.text_encoder`.
Shapes: B batch, T tokens, D width of an embedding, H hidden units, directions 1 or 2.
"""

from __future__ import annotations

from torch import nn

from fieldguide.core.card import Card, Size
from fieldguide.models.recurrent._shared.text_encoder import Config, RecurrentClassifier


class RNN(RecurrentClassifier):
    """Text classifier that uses the state after the last real token (and the first, in the backward direction)."""

    cell = nn.RNN


CARD = Card(
    name="rnn",
    model=RNN,
    config=Config,
    paper="doi:10.1207/s15516709cog1402_1",
    year=1990,
    input_type="tokens",
    output_type="label",
    sizes={
        "rnn-s": Size(directions=1),
        "rnn-m": Size(dim=256, hidden=512, depth=2, directions=1),
        "rnn-test": Size(vocab_size=30, num_classes=3, dim=6, hidden=5, depth=2, directions=2, dropout=0.0),
    },
    # Gradients of recurrent networks occasionally explode, so they are clipped.
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "grad_clip": 1.0, "warmup": 0.05},
)

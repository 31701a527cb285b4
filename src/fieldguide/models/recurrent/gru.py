"""GRU: a gated recurrent unit with two gates (Cho et al. 2014, arXiv:1406.1078).

New here: an update gate that keeps or replaces the state and a reset gate that discards it, with three quarters of the
parameters of an LSTM. The form is that of torch and cuDNN: the reset gate is applied after the recurrent product,
which has its own bias (the paper's first version applies it before).

Initialization: that of `models.recurrent._shared.text_encoder`.
Shapes: B batch, T tokens, D width of an embedding, H hidden units, directions 1 or 2.
"""

from __future__ import annotations

from torch import nn

from fieldguide.core.card import Card, Size
from fieldguide.models.recurrent._shared.text_encoder import Config, RecurrentClassifier


class GRU(RecurrentClassifier):
    """Text classifier that uses the state after the last real token (and the first, in the backward direction)."""

    cell = nn.GRU


CARD = Card(
    name="gru",
    model=GRU,
    config=Config,
    paper="arXiv:1406.1078",
    year=2014,
    input_type="tokens",
    output_type="label",
    sizes={
        "gru-s": Size(),
        "gru-m": Size(dim=256, hidden=512, depth=2),
        "gru-test": Size(vocab_size=30, num_classes=3, dim=6, hidden=5, depth=2, directions=2, dropout=0.0),
    },
    # Gradients of recurrent networks occasionally explode, so they are clipped.
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.01, "grad_clip": 1.0, "warmup": 0.05},
)

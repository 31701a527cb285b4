"""LSTMForecaster: an LSTM reads the past and the whole future is written at once (Wen et al. 2017, MQ-RNN).

New here: MQ-RNN's direct way (arXiv:1711.11053, sections 3.2 and 3.3). The last state and all that is known ahead go
through a global network, which gives one context for each step of the future and one for all; a local network, the
same for every step, turns both and what is known of that step into its values. Nothing forecast is fed back, so errors
do not build up, and quantiles need no sampling. Series that share a window are read one by one with the same weights.
Where it departs: trained on one window at a time, not on all its beginnings ("forking sequences"); what is known ahead is
also read beside the past, as its values of the past are known too.

Initialisation: that of `blocks.recurrent.Recurrent` for the LSTM, torch's default for linear layers.
Shapes: B batch, T steps of the past, H steps of the future, C series, Q values a step, P covariates measured, K covariates
known ahead, S width of the state, D width of a context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError
from fieldguide.models.layers.recurrent import Recurrent


@dataclass(frozen=True, kw_only=True)
class Config:
    length: int = 168  # T; another length can be read too
    horizon: int = 24  # H
    values: int = 1  # Q: 1 for a point, more for quantiles
    past: int = 0  # P
    known: int = 0  # K
    hidden: int = 64  # S
    depth: int = 1  # layers of the LSTM
    context: int = 16  # D
    width: int = 64  # inside the global and the local network
    dropout: float = 0.0  # between layers of the LSTM, and on its last state


class LSTMForecaster(nn.Module):
    """The past of series, and what stands beside it, -> their future. Raises `DataError` where what is known ahead does
    not reach the end of the horizon."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.rnn = Recurrent(nn.LSTM, 1 + c.past + c.known, c.hidden, c.depth, dropout=c.dropout)
        self.dropout = nn.Dropout(c.dropout)
        self.up = nn.Linear(c.hidden + c.horizon * c.known, c.width)  # the global network
        self.down = nn.Linear(c.width, (c.horizon + 1) * c.context)
        self.local = nn.Linear(2 * c.context + c.known, c.width)  # and the local one
        self.head = nn.Linear(c.width, c.values)

    def forward(self, series: Tensor, past: Tensor, known: Tensor) -> Tensor:  # B T C, B T P, B T+H K -> B H C Q
        c, (_, steps, columns) = self.config, series.shape
        if known.shape[1] != steps + c.horizon:
            raise DataError(
                f"the past has {steps} steps and the future {c.horizon}, but what is known ahead has {known.shape[1]}"
            )
        beside = torch.cat([past, known[:, :steps]], -1).repeat_interleave(columns, 0)  # B*C T P+K
        x = torch.cat([series.transpose(1, 2).reshape(-1, steps, 1), beside], -1)  # B*C T 1+P+K
        ahead = known[:, steps:].repeat_interleave(columns, 0)  # B*C H K
        state = self.dropout(self.rnn(x))  # B*C S
        contexts = self.down(F.relu(self.up(torch.cat([state, ahead.flatten(1)], -1))))
        contexts = contexts.unflatten(-1, (c.horizon + 1, c.context))  # B*C H+1 D, the last for all
        each, whole = contexts[:, :-1], contexts[:, -1:].expand(-1, c.horizon, -1)
        y = self.head(F.relu(self.local(torch.cat([each, whole, ahead], -1))))  # B*C H Q
        return y.unflatten(0, (-1, columns)).transpose(1, 2)


CARD = Card(
    name="lstm-forecaster",
    model=LSTMForecaster,
    config=Config,
    paper="arXiv:1711.11053",
    year=2017,
    input_type="covariates",
    output_type="forecast",
    sizes={
        "lstm-forecaster-s": Size(),
        "lstm-forecaster-m": Size(hidden=128, depth=2, context=32, width=128, dropout=0.1),
        "lstm-forecaster-test": Size(length=9, horizon=4, values=2, past=2, known=3, hidden=5, depth=2, context=3, width=7),
    },
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 1e-4, "grad_clip": 1.0},
)

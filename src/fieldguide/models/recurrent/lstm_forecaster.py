"""LSTMForecaster: an LSTM encoder with direct multi-horizon forecasts (MQ-RNN, Wen et al. 2017).

New here: MQ-RNN's direct forecasts (arXiv:1711.11053, sections 3.2 and 3.3). A global network computes, from the last state
and the known future covariates, one context per future step and one for all steps. A local network, shared by all steps,
computes the values of a step from both contexts and the known covariates of that step. Forecasts are not fed back, so
errors do not accumulate, and quantiles need no sampling. Series of a window are processed separately with the same weights.
Differences from the paper: no forking sequences (each window gives one training example), and the known covariates are
also inputs in the past.

Initialization: that of `models.layers.recurrent.Recurrent` for the LSTM, torch's default for linear layers.
Shapes: B batch, T steps of the past, H steps of the future, C series, Q values per step, P covariates known only in the past,
K covariates known in advance, S width of the state, D width of a context.
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
    length: int = 168  # T; other lengths are possible
    horizon: int = 24  # H
    values: int = 1  # Q: 1 for a point forecast, more for quantiles
    past: int = 0  # P
    known: int = 0  # K
    hidden: int = 64  # S
    depth: int = 1  # layers of the LSTM
    context: int = 16  # D
    width: int = 64  # inside the global and the local network
    dropout: float = 0.0  # between layers of the LSTM, and on its last state


class LSTMForecaster(nn.Module):
    """LSTM forecaster: past values and covariates -> forecasts.

    Raises `DataError` if the known covariates do not cover the past and the horizon.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.rnn = Recurrent(nn.LSTM, 1 + c.past + c.known, c.hidden, c.depth, dropout=c.dropout)
        self.dropout = nn.Dropout(c.dropout)
        self.up = nn.Linear(c.hidden + c.horizon * c.known, c.width)  # the global network
        self.down = nn.Linear(c.width, (c.horizon + 1) * c.context)
        self.local = nn.Linear(2 * c.context + c.known, c.width)  # the local network
        self.head = nn.Linear(c.width, c.values)

    def forward(self, series: Tensor, past: Tensor, known: Tensor) -> Tensor:  # B T C, B T P, B T+H K -> B H C Q
        c, (_, steps, columns) = self.config, series.shape
        if known.shape[1] != steps + c.horizon:
            raise DataError(
                f"the known covariates have {known.shape[1]} steps, but the past has {steps} and the horizon {c.horizon}"
            )
        covariates = torch.cat([past, known[:, :steps]], -1).repeat_interleave(columns, 0)  # B*C T P+K
        x = torch.cat([series.transpose(1, 2).reshape(-1, steps, 1), covariates], -1)  # B*C T 1+P+K
        ahead = known[:, steps:].repeat_interleave(columns, 0)  # B*C H K
        state = self.dropout(self.rnn(x))  # B*C S
        contexts = self.down(F.relu(self.up(torch.cat([state, ahead.flatten(1)], -1))))
        contexts = contexts.unflatten(-1, (c.horizon + 1, c.context))  # B*C H+1 D, the last one for all steps
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

"""TiDE: a dense encoder and decoder that read covariates (Das et al. 2023, arXiv:2304.08424).

New here: everything is residual MLPs. One reduces the covariates of each step to a few numbers; the past of the series, these numbers
for all steps and the static properties are encoded at once; a decoder gives a vector for each future step, and a small MLP
turns that vector and the covariates of the step into its forecast, so that a holiday acts on its own day directly. A linear map
of the past is added. As accurate as Transformers at a fraction of their time.

Initialization: torch's default for linear layers.
Shapes: B batch, T steps of the past, H steps of the future, C series, Q values per step, P covariates known only in the past,
K covariates known in advance, S static properties, R reduced covariates of a step, D decoded numbers of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Config:
    length: int = 720  # T
    horizon: int = 96  # H
    values: int = 1  # Q: 1 for a point forecast, more for quantiles
    past_variables: tuple[int, ...] = ()  # columns of each variable known only in the past, besides the series
    known_variables: tuple[int, ...] = ()  # columns of each variable known in advance
    static_variables: tuple[int, ...] = ()  # columns of each static variable
    hidden: int = 256
    depth: int = 2  # residual blocks of the encoder
    decoder_depth: int = 2
    reduced: int = 4  # R
    decoded: int = 8  # D
    local: int = 128  # hidden width of the MLP of a step
    dropout: float = 0.3

    @property
    def past(self) -> int:  # P
        return sum(self.past_variables)

    @property
    def known(self) -> int:  # K
        return sum(self.known_variables)

    @property
    def static(self) -> int:  # S
        return sum(self.static_variables)


class Residual(nn.Module):
    """An MLP of one hidden layer with a linear layer around it, normalized unless it computes forecasts."""

    def __init__(self, inputs: int, hidden: int, outputs: int, dropout: float, normalize: bool = True):
        super().__init__()
        self.up, self.down, self.skip = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs), nn.Linear(inputs, outputs)
        self.norm = nn.LayerNorm(outputs) if normalize else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # ... inputs -> ... outputs
        return self.norm(self.dropout(self.down(F.relu(self.up(x)))) + self.skip(x))


class TiDE(nn.Module):
    """Past values, covariates and static properties -> forecasts. Raises `DataError` for a past of another length."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.reduce_past = Residual(c.past, c.hidden, c.reduced, c.dropout) if c.past else None
        self.reduce_known = Residual(c.known, c.hidden, c.reduced, c.dropout) if c.known else None
        width = c.length + c.static
        width += c.length * c.reduced if c.past else 0
        width += (c.length + c.horizon) * c.reduced if c.known else 0
        inside = [c.hidden] * c.depth
        self.encoder = nn.Sequential(*(Residual(a, c.hidden, c.hidden, c.dropout) for a in [width, *inside][:-1]))
        outputs = [*[c.hidden] * (c.decoder_depth - 1), c.decoded * c.horizon]
        self.decoder = nn.Sequential(*(Residual(c.hidden, c.hidden, b, c.dropout) for b in outputs))
        # Normalizing the few forecasts of a step would fix their mean and scale, and a single one would become constant.
        self.local = Residual(c.decoded + (c.reduced if c.known else 0), c.local, c.values, c.dropout, normalize=False)
        self.skip = nn.Linear(c.length, c.horizon * c.values)

    def forward(self, series: Tensor, past: Tensor, known: Tensor, static: Tensor) -> Tensor:  # BTC, BTP, B T+H K, BS -> BHCQ
        c, columns = self.config, series.shape[2]
        if series.shape[1] != c.length:
            raise DataError(f"The past has {series.shape[1]} steps, but the model was created with length={c.length}.")
        own = series.mT.flatten(0, 1)  # B*C T
        each = lambda x: x.repeat_interleave(columns, 0)
        parts = [own]
        if self.reduce_past is not None:
            parts.append(each(self.reduce_past(past).flatten(1)))
        if self.reduce_known is not None:
            known = self.reduce_known(known)  # B T+H R
            parts.append(each(known.flatten(1)))
        y = self.decoder(self.encoder(torch.cat([*parts, each(static)], 1))).unflatten(1, (c.horizon, -1))  # B*C H D
        if self.reduce_known is not None:
            y = torch.cat([y, each(known[:, c.length :])], 2)
        y = self.local(y) + self.skip(own).unflatten(1, (c.horizon, -1))  # B*C H Q
        return y.unflatten(0, (-1, columns)).transpose(1, 2)


CARD = Card(
    name="tide",
    model=TiDE,
    config=Config,
    paper="arXiv:2304.08424",
    year=2023,
    input_type="static-covariates",
    output_type="forecast",
    sizes={
        "tide-etth1": Size(),
        "tide-mini": Size(length=168, hidden=64, depth=1, decoder_depth=1, local=32, dropout=0.1),
        "tide-test": Size(
            length=9,
            horizon=4,
            values=2,
            past_variables=(2,),
            known_variables=(1, 2),
            static_variables=(2,),
            hidden=7,
            decoder_depth=2,
            reduced=2,
            decoded=3,
            local=5,
            dropout=0.0,
        ),
    },
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "warmup": 0.1, "grad_clip": 1.0},
)

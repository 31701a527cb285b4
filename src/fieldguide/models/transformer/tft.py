"""Temporal Fusion Transformer: forecasts that show what they depend on (Lim et al. 2019, arXiv:1912.09363).

New here: variables are selected. At every step a softmax weighs the variables, one by one, and these weights are shown. An LSTM over
the past and another over the future, both begun by the static properties, give each step a local context, and attention over all
steps a wide one. Its heads share their values, so that the mean of their weights says which steps a forecast looks at. Gates around
every part (GRN) let the network skip what the data does not need.

A variable is a group of columns: a number is one, a category one per value, the hour of the day two. A network without static
properties has no context of them, and if no covariate is known in advance, the position of a step in the window is its only one.

Initialization: torch's default for linear layers, LSTMs as `models.layers.recurrent.Recurrent`.
Shapes: B batch, T steps of the past, H steps of the future, C series, Q values per step, P columns known only in the past,
K columns known in advance, S static columns, V variables, D width, h heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError

EPS = 1e-3  # of the norms, as in the authors' code


@dataclass(frozen=True, kw_only=True)
class Config:
    length: int = 168  # T; other lengths are possible
    horizon: int = 24  # H
    values: int = 3  # Q: the forecast and its quantiles
    past_variables: tuple[int, ...] = ()  # columns of each variable known only in the past, besides the series
    known_variables: tuple[int, ...] = ()  # columns of each variable known in advance
    static_variables: tuple[int, ...] = ()  # columns of each static variable
    dim: int = 160  # D
    heads: int = 4
    dropout: float = 0.1

    @property
    def past(self) -> int:  # P
        return sum(self.past_variables)

    @property
    def known(self) -> int:  # K
        return sum(self.known_variables)

    @property
    def static(self) -> int:  # S
        return sum(self.static_variables)


class GatedUnit(nn.Module):
    """A linear layer that another one gates (GLU), added to the input of what came before, and normalized."""

    def __init__(self, inputs: int, outputs: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.gate = nn.Linear(inputs, 2 * outputs)
        self.norm = nn.LayerNorm(outputs, eps=EPS)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # ... inputs, ... outputs -> ... outputs
        return self.norm(skip + F.glu(self.gate(self.dropout(x)), -1))


class GRN(nn.Module):
    """A gated residual network: an MLP with a context that may be skipped."""

    def __init__(self, inputs: int, hidden: int, outputs: int, dropout: float, context: int = 0):
        super().__init__()
        self.up, self.down = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
        self.context = nn.Linear(context, hidden, bias=False) if context else None
        self.unit = GatedUnit(hidden, outputs, dropout)
        self.skip = nn.Linear(inputs, outputs) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:  # ... inputs, ... context -> ... outputs
        y = self.up(x)
        if self.context is not None and context is not None:
            y = y + self.context(context)
        return self.unit(self.down(F.elu(y)), self.skip(x))


class Selection(nn.Module):
    """Columns of V variables -> their weighted mean, and the weights. A single variable needs no weights."""

    def __init__(self, widths: Sequence[int], c: Config, context: int):
        super().__init__()
        self.widths = tuple(widths)
        self.embed = nn.ModuleList(nn.Linear(width, c.dim) for width in widths)
        self.each = nn.ModuleList(GRN(c.dim, c.dim, c.dim, c.dropout) for _ in widths)
        count = len(self.widths)
        self.weigh = GRN(count * c.dim, c.dim, count, c.dropout, context) if count > 1 else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # ... columns -> ... D, ... V
        parts = [embed(part) for embed, part in zip(self.embed, x.split(self.widths, -1))]
        made = torch.stack([grn(part) for grn, part in zip(self.each, parts)], -1)  # ... D V
        if self.weigh is None:
            return made[..., 0], torch.ones_like(x[..., :1])
        weights = self.weigh(torch.cat(parts, -1), context).softmax(-1)
        return (made * weights[..., None, :]).sum(-1), weights


class TemporalFusionTransformer(nn.Module):
    """Past values, covariates and static properties -> forecasts.

    Raises `DataError` if the known covariates do not cover the past and the horizon.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.dim % c.heads:
            raise SettingsError(f"dim={c.dim} must be divisible by heads={c.heads}.")
        dim, drop, context = c.dim, c.dropout, c.dim if c.static_variables else 0
        known = c.known_variables or (1,)
        self.static = Selection(c.static_variables, c, 0) if context else None
        # Contexts of the static properties: of selection, of enrichment, and both initial states of the LSTM.
        self.contexts = nn.ModuleList(GRN(dim, dim, dim, drop) for _ in range(4 if context else 0))
        self.past = Selection((1, *c.past_variables, *known), c, context)  # the series is the first variable
        self.known = Selection(known, c, context)
        self.encoder, self.decoder = (nn.LSTM(dim, dim, batch_first=True) for _ in range(2))
        self.local = GatedUnit(dim, dim, drop)
        self.enrich = GRN(dim, dim, dim, drop, context)
        self.query, self.key = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.value = nn.Linear(dim, dim // c.heads, bias=False)  # shared by the heads
        self.proj = nn.Linear(dim // c.heads, dim, bias=False)
        self.dropout = nn.Dropout(drop)
        self.attended = GatedUnit(dim, dim, drop)
        self.mlp = GRN(dim, dim, dim, drop)
        self.last = GatedUnit(dim, dim, 0.0)
        self.head = nn.Linear(dim, c.values)

    def attend(self, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:  # B T+H D -> B H D, B h H T+H
        """Return what each future step sees of itself and of earlier steps, and the weights."""
        heads = lambda y: y.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)
        q, k = heads(self.query(x[:, steps:])), heads(self.key(x))  # B h H D/h, B h T+H D/h
        places = torch.arange(x.shape[1], device=x.device)
        later = places > places[steps:, None]  # H T+H
        weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf).softmax(-1)
        seen = (self.dropout(weights) @ self.value(x)[:, None]).mean(1)
        return self.dropout(self.proj(seen)), weights

    def compute(
        self, series: Tensor, past: Tensor, known: Tensor, static: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:  # B T C, B T P, B T+H K, B S -> B H C Q, weights of B*C windows
        """Return forecasts, and the weights of the variables (`past` T V, `known` H V, `static` V) and of the steps
        (`attention` H T+H, the mean of the heads).
        """
        c, (rows, steps, columns) = self.config, series.shape
        if known.shape[1] != steps + c.horizon:
            raise DataError(
                f"the known covariates have {known.shape[1]} steps, but the past has {steps} and the horizon {c.horizon}"
            )
        if not c.known_variables:
            place = torch.arange(-steps, c.horizon, device=series.device, dtype=series.dtype) / steps
            known = place[None, :, None].expand(rows, -1, -1)
        each = lambda x: x.repeat_interleave(columns, 0)
        own, past, known = series.mT.flatten(0, 1)[..., None], each(past), each(known)  # B*C T 1, ...
        select = enrich = state = None
        weights = {}
        if self.static is not None:
            properties, weights["static"] = self.static(each(static))
            select, enrich, hidden, cell = (grn(properties) for grn in self.contexts)
            select, enrich, state = select[:, None], enrich[:, None], (hidden[None], cell[None])
        before, weights["past"] = self.past(torch.cat([own, past, known[:, :steps]], -1), select)
        after, weights["known"] = self.known(known[:, steps:], select)
        seen, state = self.encoder(before, state)
        ahead, _ = self.decoder(after, state)
        x = self.local(torch.cat([seen, ahead], 1), torch.cat([before, after], 1))  # B*C T+H D
        rich = self.enrich(x, enrich)
        y, attention = self.attend(rich, steps)
        weights["attention"] = attention.mean(1)
        y = self.mlp(self.attended(y, rich[:, steps:]))
        y = self.head(self.last(y, x[:, steps:]))  # B*C H Q
        return y.unflatten(0, (-1, columns)).transpose(1, 2), weights

    def forward(self, series: Tensor, past: Tensor, known: Tensor, static: Tensor) -> Tensor:  # BTC, BTP, B T+H K, BS -> BHCQ
        return self.compute(series, past, known, static)[0]

    def weigh_inputs(self, series: Tensor, past: Tensor, known: Tensor, static: Tensor) -> dict[str, Tensor]:
        """Return the weights of variables and steps; those of the past begin with the series."""
        return self.compute(series, past, known, static)[1]


CARD = Card(
    name="tft",
    model=TemporalFusionTransformer,
    config=Config,
    paper="arXiv:1912.09363",
    year=2019,
    input_type="static-covariates",
    output_type="forecast",
    endless=True,
    sizes={
        # One category of 369 customers; the hour, the day of the week and the time since the start (the authors' `electricity`).
        "tft-electricity": Size(static_variables=(369,), known_variables=(1, 1, 1)),
        "tft-s": Size(dim=32),
        "tft-m": Size(dim=64),
        "tft-test": Size(
            length=7,
            horizon=3,
            values=2,
            past_variables=(1, 2),
            known_variables=(1, 2),
            static_variables=(2, 1),
            dim=6,
            heads=2,
            dropout=0.0,
        ),
    },
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "warmup": 0.1, "grad_clip": 1.0},
)

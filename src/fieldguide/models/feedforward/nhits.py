"""N-HiTS: forecasts at several rates, each interpolated from few values (Challu et al. 2022, arXiv:2201.12886).

New here: hierarchical interpolation. Each block reads the past after max pooling of its own width and predicts only a fraction of
the horizon's values, between which it interpolates linearly. Blocks with wide pools and few values forecast slow components, the
others fast ones, so a long horizon needs few parameters. As in N-BEATS, a block also predicts the past that it explains, which is
subtracted before the next block, and the forecasts of all blocks are added. The sum begins with the last value of the past.

Initialization: torch's default for linear layers, as in the authors' code.
Shapes: B batch, T steps of the past, H steps of the future, C series, Q values per step, K values that a block predicts.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError


@dataclass(frozen=True, kw_only=True)
class Config:
    length: int = 480  # T
    horizon: int = 96  # H
    values: int = 1  # Q: 1 for a point forecast, more for quantiles
    pools: tuple[int, ...] = (16, 8, 1)  # width of the pools, by stack
    rates: tuple[int, ...] = (24, 12, 1)  # steps of the horizon per predicted value, by stack
    blocks: int = 1  # per stack
    depth: int = 2  # hidden layers of a block
    hidden: int = 512  # their width
    dropout: float = 0.0


class Block(nn.Module):
    """A block: pooled past -> the past that it explains, and its forecast."""

    def __init__(self, c: Config, pool: int, rate: int):
        super().__init__()
        self.config, self.pool = c, pool
        widths = [math.ceil(c.length / pool), *[c.hidden] * c.depth]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.dropout = nn.Dropout(c.dropout)
        self.head = nn.Linear(widths[-1], c.length + c.values * max(c.horizon // rate, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # B T -> B T, B Q H
        c, y = self.config, F.max_pool1d(x[:, None], self.pool, ceil_mode=True)[:, 0]
        for layer in self.layers:
            y = self.dropout(F.relu(layer(y)))
        y = self.head(y)
        values = y[:, c.length :].unflatten(1, (c.values, -1))  # B Q K
        return y[:, : c.length], F.interpolate(values, c.horizon, mode="linear")


class NHiTS(nn.Module):
    """N-HiTS: past values -> forecasts.

    Raises `SettingsError` unless `pools` and `rates` have one positive value per stack, and `DataError` for a past of another length.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if len(c.pools) != len(c.rates) or not c.pools or min(*c.pools, *c.rates) < 1:
            raise SettingsError(f"pools={c.pools}, rates={c.rates}: each stack needs one of both, at least 1.")
        self.blocks = nn.ModuleList(Block(c, *pair) for pair in zip(c.pools, c.rates) for _ in range(c.blocks))

    def forward(self, series: Tensor) -> Tensor:  # B T C -> B H C Q
        c = self.config
        if series.shape[1] != c.length:
            raise DataError(f"The past has {series.shape[1]} steps, but the model was created with length={c.length}.")
        x = series.mT.flatten(0, 1)  # B*C T
        total = x[:, -1:, None]
        x = x.flip(1)  # the latest step first, so that the last pool, which may be smaller, holds the oldest steps
        for block in self.blocks:
            explained, forecast = block(x)
            x, total = x - explained, total + forecast.mT  # B*C H Q
        return total.unflatten(0, (-1, series.shape[2])).transpose(1, 2)


CARD = Card(
    name="nhits",
    model=NHiTS,
    config=Config,
    paper="arXiv:2201.12886",
    year=2022,
    input_type="series",
    output_type="forecast",
    sizes={
        "nhits-480-96": Size(),
        "nhits-mini": Size(hidden=128, pools=(8, 4, 1)),
        "nhits-test": Size(length=13, horizon=6, values=2, pools=(4, 2, 1), rates=(3, 2, 1), hidden=9),
    },
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "warmup": 0.1, "grad_clip": 1.0},
)

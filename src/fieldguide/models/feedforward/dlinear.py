"""DLinear: linear forecasts of trend and remainder (Zeng et al. 2022, arXiv:2205.13504).

New here: a deliberately simple baseline. The past is decomposed into a moving average and the remainder; each passes
through one linear layer over time, shared by all series. Their sum outperformed the forecasting Transformers of its time.

Initialization: torch's default for linear layers, as in the authors' code.
Shapes: B batch, T steps of the past, H steps of the future, C series, Q values per step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError


@dataclass(frozen=True, kw_only=True)
class Config:
    length: int = 336  # T
    horizon: int = 96  # H
    values: int = 1  # Q: 1 for a point forecast, more for quantiles
    window: int = 25  # steps of the moving average, odd


class DLinear(nn.Module):
    """DLinear: past values -> forecasts.

    Raises `SettingsError` for an even `window`, and `DataError` for a past of another length.
    """

    def __init__(self, config: Config):
        super().__init__()
        if config.window % 2 == 0:
            raise SettingsError(f"window={config.window} must be odd, so that the moving average is centered")
        self.config = config
        self.seasonal = nn.Linear(config.length, config.horizon * config.values)
        self.trend = nn.Linear(config.length, config.horizon * config.values)

    def forward(self, series: Tensor) -> Tensor:  # B T C -> B H C Q
        if series.shape[1] != self.config.length:
            raise DataError(
                f"the past has {series.shape[1]} steps, but the network was created for length={self.config.length}"
            )
        x, edge = series.transpose(1, 2), self.config.window // 2  # B C T
        trend = F.avg_pool1d(F.pad(x, (edge, edge), mode="replicate"), self.config.window, 1)
        y = self.seasonal(x - trend) + self.trend(trend)  # B C H*Q
        return y.unflatten(-1, (self.config.horizon, self.config.values)).transpose(1, 2)


OFFICIAL = {  # cure-lab/LTSF-Linear, individual=False
    "Linear_Seasonal.*": "seasonal.*",
    "Linear_Trend.*": "trend.*",
}

CARD = Card(
    name="dlinear",
    model=DLinear,
    config=Config,
    paper="arXiv:2205.13504",
    year=2022,
    input_type="series",
    output_type="forecast",
    sizes={
        "dlinear-336-96": Size(params=64_704, source="the authors' code, counted"),
        "dlinear-96-24": Size(length=96, horizon=24),
        "dlinear-test": Size(length=12, horizon=5, values=2, window=5),
    },
    weights={"official": OFFICIAL},
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0},
)

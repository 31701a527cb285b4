"""Forecast: the future of series as a point and quantiles, each window on its own scale.

Reversible instance normalisation (Kim et al. 2022, RevIN, ICLR): a window is brought to mean 0 and deviation 1 by its own
past, and the forecast is brought back, so a network that learnt at one level is of use at another. It is done here,
without RevIN's learnt affine map: a gain and a shift shared by all series are no more than a linear layer can do, and
ones for each series would be undefined for a series that comes new. A network that normalises by itself (PatchTST) loses
nothing: to do it twice is to do it once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.base import Objective

EPSILON = 1e-5  # added to the variance, as in RevIN


def compute_mean_and_scale(
    series: Tensor, observed: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # B T C, B T C -> B 1 C, B 1 C
    """Mean and deviation of each window's observed steps (RevIN, eq. 1 and 2); 0 and nearly 0 where there is none."""
    real = torch.ones_like(series) if observed is None else observed.to(series.dtype)
    count = real.sum(1, keepdim=True).clamp(min=1)
    mean = (series * real).sum(1, keepdim=True) / count
    variance = ((series - mean).square() * real).sum(1, keepdim=True) / count
    return mean, (variance + EPSILON).sqrt()


def pinball_loss(values: Tensor, target: Tensor, quantiles: Tensor) -> Tensor:  # ... Q, ..., Q -> ... Q
    """Loss of quantiles (Koenker and Bassett 1978): an outcome above costs q, one below 1 - q, a unit of distance."""
    error = target[..., None] - values
    return torch.maximum(quantiles * error, (quantiles - 1) * error)


class Forecast(Objective):
    """A network B T C -> B H C Q and the loss of its forecasts: a point, then quantiles.

    Batches hold `series` (B T C, nothing missing), `observed` (B T C bool: False where a value was filled in) where there
    is something missing, `target` (B H C, NaN where the outcome is not known) and what else the network takes (`inputs`).
    `point` is "mae" or "mse": its loss is added to the mean pinball loss of `quantiles`. With one value a step (no
    quantiles) that is the plain loss. Means are over known outcomes.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[str],
        quantiles: Sequence[float] = (),
        point: str = "mae",
        normalise: bool = True,
    ):
        super().__init__()
        if point not in ("mae", "mse"):
            raise SettingsError(f"point={point!r} is neither mae nor mse")
        if list(quantiles) != sorted(set(quantiles)) or not all(0 < q < 1 for q in quantiles):
            raise SettingsError(f"quantiles={tuple(quantiles)}: give numbers between 0 and 1, each larger than the one before")
        self.model, self.inputs, self.point, self.normalise = model, tuple(inputs), point, normalise
        self.register_buffer("quantiles", torch.tensor(tuple(quantiles)), persistent=False)

    def compute_predictions(self, batch: dict[str, Tensor]) -> Tensor:  # -> B H C Q
        if not self.normalise:
            return self.model(*(batch[name] for name in self.inputs)).float()
        mean, scale = compute_mean_and_scale(batch["series"], batch.get("observed"))
        inputs = {**batch, "series": (batch["series"] - mean) / scale}
        values = self.model(*(inputs[name] for name in self.inputs)).float()
        return values * scale[..., None] + mean[..., None]

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        values, target = self.compute_predictions(batch), batch["target"]
        known = ~target.isnan()
        target, count = target.nan_to_num(), known.sum().clamp(min=1)
        error = (values[..., 0] - target) * known
        point = (error.abs() if self.point == "mae" else error.square()).sum() / count
        if not len(self.quantiles):
            return {"loss": point}
        each = pinball_loss(values[..., 1:], target, self.quantiles.to(values.dtype)).mean(-1) * known
        spread = each.sum() / count
        return {"loss": point + spread, self.point: point.detach(), "pinball": spread.detach()}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`values` B H C Q: the point, then the quantiles in order. Where they cross they are sorted, which never makes
        them worse (Chernozhukov et al. 2010, doi:10.3982/ECTA7880)."""
        values = self.compute_predictions(batch)
        return {"values": torch.cat([values[..., :1], values[..., 1:].sort(-1).values], -1)}

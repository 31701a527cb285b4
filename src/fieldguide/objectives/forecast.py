"""Forecasting objective: point and quantile losses with reversible instance normalization.

Reversible instance normalization (RevIN, Kim et al. 2022, ICLR) scales each window to mean 0 and standard deviation 1 by
its own past, and scales the forecast back, so that the network does not depend on the level of a series. RevIN's learned
affine map is omitted: a gain and a shift shared by all series can be expressed by a linear layer, and ones per series
would be undefined for new series. Networks that normalize internally (PatchTST) are unaffected, because the
normalization is idempotent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.base import Objective

EPSILON = 1e-5  # added to the variance, as in RevIN
POINT_LOSSES = ("mae", "mse", "mase")


def compute_mean_and_scale(
    series: Tensor, observed: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # B T C, B T C -> B 1 C, B 1 C
    """Return mean and standard deviation of the observed steps of each window (RevIN, eq. 1 and 2).

    Without observed steps they are 0 and the square root of `EPSILON`.
    """
    real = torch.ones_like(series) if observed is None else observed.to(series.dtype)
    count = real.sum(1, keepdim=True).clamp(min=1)
    mean = (series * real).sum(1, keepdim=True) / count
    variance = ((series - mean).square() * real).sum(1, keepdim=True) / count
    return mean, (variance + EPSILON).sqrt()


def pinball_loss(values: Tensor, target: Tensor, quantiles: Tensor) -> Tensor:  # ... Q, ..., Q -> ... Q
    """Return the quantile loss (Koenker and Bassett 1978): q per unit above the forecast, 1 - q per unit below it."""
    error = target[..., None] - values
    return torch.maximum(quantiles * error, (quantiles - 1) * error)


class Forecast(Objective):
    """Loss of a network B T C -> B H C Q that predicts a point followed by quantiles.

    Batches hold `series` (B T C, without missing values), optionally `observed` (B T C bool: False for filled values),
    `target` (B H C, NaN for unknown outcomes), optionally `weight` (B 1 1, by which errors of a window are multiplied) and the other
    `inputs` of the network. The losses are averaged over known outcomes.

    Args:
        quantiles: levels between 0 and 1 in ascending order; the mean pinball loss of these is added to the point loss.
        point: "mae" or "mse", the loss of the point forecast; "mase" for "mae" with weights of the series.
        normalise: apply reversible instance normalization.

    Raises:
        SettingsError: if `point` is unknown, or `quantiles` are not ascending or not between 0 and 1.
    """

    quantiles: Tensor

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[str],
        quantiles: Sequence[float] = (),
        point: str = "mae",
        normalise: bool = True,
    ):
        super().__init__()
        if point not in POINT_LOSSES:
            raise SettingsError(f"point={point!r} must be one of {', '.join(POINT_LOSSES)}")
        if list(quantiles) != sorted(set(quantiles)) or not all(0 < q < 1 for q in quantiles):
            raise SettingsError(f"quantiles={tuple(quantiles)} must be numbers between 0 and 1 in ascending order")
        self.model, self.inputs, self.point, self.normalise = model, tuple(inputs), point, normalise
        self.register_buffer("quantiles", torch.tensor(tuple(quantiles)), persistent=False)

    def compute_predictions(self, batch: dict[str, Tensor]) -> Tensor:  # -> B H C Q
        values = self.model(*self.arrange_inputs(batch)).float()
        if not self.normalise:
            return values
        mean, scale = compute_mean_and_scale(batch["series"], batch.get("observed"))
        return values * scale[..., None] + mean[..., None]

    def arrange_inputs(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Return the arguments of the network."""
        if self.normalise:
            mean, scale = compute_mean_and_scale(batch["series"], batch.get("observed"))
            batch = {**batch, "series": (batch["series"] - mean) / scale}
        return [batch[name] for name in self.inputs]

    @torch.no_grad()
    def weigh_inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that the network gives its variables and steps; empty if it has none."""
        weigh = getattr(self.model, "weigh_inputs", None)
        return weigh(*self.arrange_inputs(batch)) if weigh else {}

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        values, target = self.compute_predictions(batch), batch["target"]
        known = ~target.isnan()
        target, count = target.nan_to_num(), known.sum().clamp(min=1)
        known = known * batch.get("weight", 1.0)
        error = (values[..., 0] - target) * known
        point = (error.square() if self.point == "mse" else error.abs()).sum() / count
        if not len(self.quantiles):
            return {"loss": point}
        each = pinball_loss(values[..., 1:], target, self.quantiles.to(values.dtype)).mean(-1) * known
        spread = each.sum() / count
        return {"loss": point + spread, self.point: point.detach(), "pinball": spread.detach()}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `values` B H C Q: the point, then the quantiles in ascending order.

        Crossing quantiles are sorted, which never increases their loss (Chernozhukov et al. 2010, doi:10.3982/ECTA7880).
        """
        values = self.compute_predictions(batch)
        return {"values": torch.cat([values[..., :1], values[..., 1:].sort(-1).values], -1)}

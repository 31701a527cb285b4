"""How wrong forecasts are: scaled, in percent, by quantiles. B windows, H steps, C series, Q quantiles; NaN is unknown."""

from __future__ import annotations

import numpy as np


def seasonal_scale(values: np.ndarray, season: int) -> float:
    """Mean absolute error of the seasonal naive forecast of one step within `values` (T): what MASE divides by (Hyndman and
    Koehler 2006, doi:10.1016/j.ijforecast.2006.03.001). Of a series that is no longer than its season, or repeats it exactly,
    that of the naive forecast. NaN where nothing changes or nothing is known."""
    for lag in (season, 1):
        steps = np.abs(values[lag:] - values[:-lag])
        steps = steps[np.isfinite(steps)]
        if steps.any():
            return float(steps.mean())
    return float("nan")


def smape(point: np.ndarray, future: np.ndarray) -> np.ndarray:
    """Symmetric error of each outcome in percent, 0 to 200, as the M4 competition defines it (Makridakis et al. 2020,
    doi:10.1016/j.ijforecast.2019.04.014): 200 |y - f| / (|y| + |f|). Two zeros agree."""
    total = np.abs(future) + np.abs(point)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total == 0, 0.0, 200 * np.abs(future - point) / total)


def pinball_loss(values: np.ndarray, future: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """Loss of each quantile (Koenker and Bassett 1978): ... Q, ... -> ... Q."""
    error = future[..., None] - values
    return np.maximum(quantiles * error, (quantiles - 1) * error)


def compute_interval_widening(low: np.ndarray, high: np.ndarray, future: np.ndarray, level: float) -> float:
    """By how many widths intervals must grow at each end so that `level` of the outcomes lie inside; below 0: shrink.
    Conformal quantile regression (Romano et al. 2019, arXiv:1905.03222, eq. 6 to 8), its score in widths (Sesia and Candes
    2020, arXiv:1909.05433). 0 where nothing is known."""
    score = np.maximum(low - future, future - high) / np.maximum(high - low, 1e-9)
    score = score[np.isfinite(score)]
    if not len(score):
        return 0.0
    rank = min(1.0, level * (1 + 1 / len(score)))
    return float(max(np.quantile(score, rank, method="higher"), -0.45))

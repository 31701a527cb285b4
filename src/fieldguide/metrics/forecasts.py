"""Forecast metrics. Shapes: B windows, H steps, C series, Q quantiles; NaN marks unknown values."""

from __future__ import annotations

import numpy as np


def seasonal_scale(values: np.ndarray, season: int) -> float:
    """Return the scale of MASE: the mean absolute error of the seasonal naive forecast within `values`, T (Hyndman and
    Koehler 2006, doi:10.1016/j.ijforecast.2006.03.001).

    If the series is not longer than its season, or repeats it exactly, use the naive forecast of one step. NaN if the
    values are constant or unknown.
    """
    for lag in (season, 1):
        steps = np.abs(values[lag:] - values[:-lag])
        steps = steps[np.isfinite(steps)]
        if steps.any():
            return float(steps.mean())
    return float("nan")


def smape(point: np.ndarray, future: np.ndarray) -> np.ndarray:
    """Return the symmetric absolute percentage error of each outcome, 200 |y - f| / (|y| + |f|), as defined by the M4
    competition (Makridakis et al. 2020, doi:10.1016/j.ijforecast.2019.04.014). It is 0 if both values are 0."""
    total = np.abs(future) + np.abs(point)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total == 0, 0.0, 200 * np.abs(future - point) / total)


def pinball_loss(values: np.ndarray, future: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """Return the loss of each quantile (Koenker and Bassett 1978): ... Q, ... -> ... Q."""
    error = future[..., None] - values
    return np.maximum(quantiles * error, (quantiles - 1) * error)


def compute_interval_widening(low: np.ndarray, high: np.ndarray, future: np.ndarray, level: float) -> float:
    """Return the factor of their width by which intervals must grow at each end to contain a fraction `level` of outcomes.

    Negative values shrink them. Conformal quantile regression (Romano et al. 2019, arXiv:1905.03222, eq. 6 to 8) with
    scores relative to the width (Sesia and Candes 2020, arXiv:1909.05433). 0 if no outcome is known.
    """
    score = np.maximum(low - future, future - high) / np.maximum(high - low, 1e-9)
    score = score[np.isfinite(score)]
    if not len(score):
        return 0.0
    rank = min(1.0, level * (1 + 1 / len(score)))
    return float(max(np.quantile(score, rank, method="higher"), -0.45))

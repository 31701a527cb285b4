"""Series of any length as tensors of one length: missing values interpolated, channels standardized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

MAX_STEPS = 1024  # that a network reads, if the user sets no length


@dataclass(frozen=True)
class SeriesPreparer:
    """Turns series C x T into arrays `length` x C.

    Series are shortened by the same `factor` (steps of the data per step of the input, by averaging) and padded with the mean at
    their end. With `by_series`, each series is standardized by itself, else each channel by its training values.
    """

    length: int
    factor: float
    mean: tuple[float, ...]  # of each channel
    std: tuple[float, ...]
    by_series: bool = False

    @classmethod
    def fit(cls, values: Sequence[np.ndarray], length: int | None = None, by_series: bool = False) -> SeriesPreparer:
        """Fit on training series. `length` is that of the input; by default the longest series, at most `MAX_STEPS`."""
        longest = max(v.shape[1] for v in values)
        wanted = length or min(longest, MAX_STEPS)
        joined = np.concatenate(values, 1)
        known = np.isfinite(joined)
        count = np.maximum(known.sum(1), 1)
        mean = np.where(known, joined, 0).sum(1) / count
        std = np.sqrt((np.where(known, joined - mean[:, None], 0) ** 2).sum(1) / count)
        std = np.where(std > 0, std, 1.0)
        return cls(wanted, max(longest / wanted, 1.0), tuple(mean.tolist()), tuple(std.tolist()), by_series)

    def apply(self, values: Sequence[np.ndarray]) -> np.ndarray:  # N of C T -> N length C
        """Return the series as one array, float32."""
        found = np.zeros((len(values), self.length, len(self.mean)), np.float32)
        for row, series in zip(found, values):
            scaled = (series - np.array(self.mean)[:, None]) / np.array(self.std)[:, None]
            full = interpolate(scaled)
            if self.by_series:
                centered = full - full.mean(1, keepdims=True)
                spread = centered.std(1, keepdims=True)
                full = centered / np.where(spread > 1e-9, spread, 1.0)
            short = shorten(full, self.factor)[:, : self.length]
            row[: short.shape[1]] = short.T
        return found

    def count_cut(self, values: Sequence[np.ndarray]) -> int:
        """Return how many series are longer than the input."""
        return sum(round(v.shape[1] / self.factor) > self.length for v in values)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> SeriesPreparer:
        return cls(**{**saved, "mean": tuple(saved["mean"]), "std": tuple(saved["std"])})


def interpolate(values: np.ndarray) -> np.ndarray:  # C T -> C T
    """Fill missing values between known ones linearly, others with the nearest known one, and channels without values with 0."""
    known = np.isfinite(values)
    if known.all():
        return values
    found, steps = np.zeros_like(values), np.arange(values.shape[1])
    for channel, (row, is_known) in enumerate(zip(values, known)):
        if is_known.any():
            found[channel] = np.interp(steps, steps[is_known], row[is_known])
    return found


def shorten(values: np.ndarray, factor: float) -> np.ndarray:  # C T -> C T / factor
    """Return the means over consecutive stretches of `factor` steps, which may be a fraction."""
    if factor <= 1:
        return values
    steps = values.shape[1]
    edges = np.linspace(0, steps, max(round(steps / factor), 1) + 1)
    sums = np.concatenate([np.zeros((len(values), 1)), values.cumsum(1)], 1)
    at = np.stack([np.interp(edges, np.arange(steps + 1), row) for row in sums])
    return np.diff(at) / np.diff(edges)

"""Targets: class names as indices, and amounts on the scale of a standard normal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl


@dataclass(frozen=True)
class Labels:
    """Class names in order: whole numbers by size, others by name. Index i stands for `names[i]`."""

    names: tuple[str, ...]

    @classmethod
    def fit(cls, values: pl.Series | Iterable[Any]) -> Labels:
        series = values if isinstance(values, pl.Series) else pl.Series(list(values))
        names = series.drop_nulls().cast(pl.String).unique().to_list()
        try:
            return cls(tuple(sorted(names, key=lambda n: (int(n), n))))
        except ValueError:
            return cls(tuple(sorted(names)))

    def __len__(self) -> int:
        return len(self.names)

    def apply(self, values: pl.Series | Sequence[Any]) -> np.ndarray:
        """Indices, int64; -1 for a missing value and for a class that was not in training."""
        series = pl.Series(values) if not isinstance(values, pl.Series) else values
        index = {n: i for i, n in enumerate(self.names)}
        codes = series.cast(pl.String).replace_strict(index, default=-1, return_dtype=pl.Int64)
        return codes.fill_null(-1).to_numpy()

    def inverse(self, index: Sequence[int] | np.ndarray) -> list[str]:
        return [self.names[i] for i in index]

    def to_json(self) -> dict[str, Any]:
        return {"names": list(self.names)}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Labels:
        return cls(tuple(saved["names"]))


@dataclass(frozen=True)
class Standard:
    """An amount, shifted and scaled so that training values have mean 0 and standard deviation 1."""

    mean: float
    std: float

    @classmethod
    def fit(cls, values: pl.Series | np.ndarray) -> Standard:
        array = np.asarray(values, dtype=np.float64)
        array = array[np.isfinite(array)]
        return cls(float(array.mean()), float(array.std()) or 1.0)

    def apply(self, values: pl.Series | np.ndarray) -> np.ndarray:
        """float32; a missing value is NaN."""
        return ((np.asarray(values, dtype=np.float64) - self.mean) / self.std).astype(np.float32)

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """float64, in the unit of the data."""
        return np.asarray(values, dtype=np.float64) * self.std + self.mean

    def to_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Standard:
        return cls(saved["mean"], saved["std"])

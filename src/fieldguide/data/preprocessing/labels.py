"""Targets: class names as indices, and numbers standardized to mean 0 and standard deviation 1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.words import compose


@dataclass(frozen=True)
class Labels:
    """Class names in order: integers by value, others alphabetically. Index i is the class `names[i]`.

    Names are compared with composed characters (NFC): "café" is one class, however its accent is encoded.
    """

    names: tuple[str, ...]

    @classmethod
    def fit(cls, values: pl.Series | Iterable[Any]) -> Labels:
        """Fit on the distinct values."""
        series = values if isinstance(values, pl.Series) else pl.Series(list(values))
        names = series.drop_nulls().cast(pl.String).str.normalize("NFC").unique().to_list()
        try:
            return cls(tuple(sorted(names, key=lambda n: (int(n), n))))
        except ValueError:
            return cls(tuple(sorted(names)))

    def __len__(self) -> int:
        return len(self.names)

    def apply(self, values: pl.Series | Sequence[Any]) -> np.ndarray:
        """Return class indices, int64; -1 for missing values and unseen classes."""
        series = pl.Series(values) if not isinstance(values, pl.Series) else values
        index = {compose(n): i for i, n in enumerate(self.names)}
        codes = series.cast(pl.String).str.normalize("NFC").replace_strict(index, default=-1, return_dtype=pl.Int64)
        return codes.fill_null(-1).to_numpy()

    def inverse(self, index: Sequence[int] | np.ndarray) -> list[str]:
        """Return the class names of indices."""
        return [self.names[i] for i in index]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-compatible dictionary."""
        return {"names": list(self.names)}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Labels:
        """Restore from `to_json`."""
        return cls(tuple(saved["names"]))


@dataclass(frozen=True)
class Standardizer:
    """Standardization of a number so that training values have mean 0 and standard deviation 1."""

    mean: float
    std: float

    @classmethod
    def fit(cls, values: pl.Series | np.ndarray) -> Standardizer:
        """Fit on the finite values."""
        array = np.asarray(values, dtype=np.float64)
        array = array[np.isfinite(array)]
        return cls(float(array.mean()), float(array.std()) or 1.0)

    def apply(self, values: pl.Series | np.ndarray) -> np.ndarray:
        """Return standardized values, float32; NaN if missing."""
        return ((np.asarray(values, dtype=np.float64) - self.mean) / self.std).astype(np.float32)

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """Return values in the original unit, float64."""
        return np.asarray(values, dtype=np.float64) * self.std + self.mean

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-compatible dictionary."""
        return {"mean": self.mean, "std": self.std}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Standardizer:
        """Restore from `to_json`."""
        return cls(saved["mean"], saved["std"])

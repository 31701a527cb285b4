"""Targets: class names as indices, and numbers standardized to mean 0 and standard deviation 1."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.words import compose

PLAIN_NUMBER = re.compile(r"-?\d+(?:\.0*)?")
BOOLEANS = {"true": "1", "false": "0"}


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
        text = series.cast(pl.String).str.normalize("NFC")
        index = index_values([compose(n) for n in self.names], text)
        codes = text.replace_strict(index, default=-1, return_dtype=pl.Int64)
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


def index_values(names: Sequence[str], values: pl.Series, first: int = 0) -> dict[str, int]:
    """Return the position of each name, counted from `first`, and of other spellings of it that occur in `values`.

    1, 1.0 and 01 are spellings of the same number, and true and false of 1 and 0, unless they are names of their own.
    """
    index = {n: i for i, n in enumerate(names, first)}
    plain = [n for n in names if PLAIN_NUMBER.fullmatch(n) or n.lower() in BOOLEANS]
    if not plain:
        return index
    spelled = {v for v in values.drop_nulls().unique().to_list() if v not in index}
    if not spelled:
        return index
    for strict in (True, False):  # spellings of the number first, then numbers that lost or gained leading zeros
        known: dict[str, list[str]] = {}
        for name in plain:
            known.setdefault(number_key(name, strict), []).append(name)
        for value in sorted(spelled - set(index)):
            key = number_key(value, strict)
            if key and len(known.get(key, ())) == 1:
                index[value] = index[known[key][0]]
    return index


def list_spellings(names: Sequence[str], first: int = 0) -> dict[str, int]:
    """Return the usual other spellings of names that are whole numbers or truth values, with their positions."""
    numbers = {number_key(name, False) for name in names} - {""}
    texts = {f"{zeros}{n}{end}" for n in numbers for zeros in ("", "0", "00") for end in ("", ".", ".0", ".00")}
    words = {form(word) for word, n in BOOLEANS.items() if n in numbers for form in (str.lower, str.title, str.upper)}
    found = index_values(names, pl.Series(sorted(texts | words), dtype=pl.String), first)
    return {text: place for text, place in found.items() if text not in names}


def number_key(text: str, strict: bool) -> str:
    """Return the normal form of a whole number or truth value, "" for other text. `strict` keeps leading zeros."""
    text = BOOLEANS.get(text.lower(), text)
    if not PLAIN_NUMBER.fullmatch(text):
        return ""
    whole = text.partition(".")[0]
    return whole if strict else re.sub(r"^(-?)0+(?=\d)", r"\1", whole)


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

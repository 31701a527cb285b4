"""Tables: numbers mapped to a standard normal by training quantiles, categories as codes, dates as both, texts as numbers.

A number is mapped through the distribution function of its training values (piecewise linear between up to 1000
quantiles; Gorishniy et al. 2021, arXiv:2106.11959, found it best for neural networks) and then to the normal, so that
any value lies within +-5.2. A missing number is 0, the median, and an additional category marks it as missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import polars as pl
from scipy.special import ndtri

from fieldguide.data.dataset import Column
from fieldguide.data.preprocessing.labels import index_values
from fieldguide.data.preprocessing.text_features import TextFeatures
from fieldguide.data.text_values import count_values, numbers_to_text

MAX_QUANTILES = 1000
MIN_PROBABILITY = 1e-7  # minimum distance of probabilities from 0 and 1: limits values to about +-5.2
MAX_FULL_CATEGORIES = 20  # with more distinct values than this, values seen once are coded as unseen,
MAX_CATEGORIES = 10_000  # and only the most frequent are kept; the code for unseen values is therefore also trained
PARTS: dict[str, tuple[str, ...]] = {
    "date": ("time", "year-sin", "year-cos", "hour-sin", "hour-cos", "weekday", "missing")
}  # of its values
DAY_MICROSECONDS = 86_400_000_000  # microseconds


@dataclass(frozen=True)
class Number:
    """A numeric feature: its column, the derived part, and the quantiles of its training values."""

    column: str
    part: str  # value | time | year-sin | year-cos | hour-sin | hour-cos | text-0 | text-1 | ...
    quantiles: tuple[float, ...] = ()


@dataclass(frozen=True)
class Category:
    """A categorical feature: code 0 is unseen, 1 ... the values in order, and the last missing if training had it."""

    column: str
    part: str  # value | weekday | missing
    values: tuple[str, ...]
    missing: bool = False

    @property
    def size(self) -> int:
        """Number of codes."""
        return 1 + len(self.values) + self.missing

    def index(self, text: pl.Series) -> dict[str, int]:
        """Return the code of each value, and of other spellings of it that occur in `text`."""
        return index_values(self.values, text, 1) if self.part == "value" else {v: k for k, v in enumerate(self.values, 1)}


class TablePreparer:
    """Converts rows to `numbers` (float32, N x n) and `categories` (int64 codes, N x k)."""

    STATE: ClassVar[Mapping[str, Any]] = {  # types of the values of `to_json`
        "numbers": list[Number],
        "categories": list[Category],
        "texts?": dict[str, TextFeatures.STATE],  # type: ignore[valid-type]
    }

    def __init__(
        self, numbers: Iterable[Number], categories: Iterable[Category], texts: Mapping[str, TextFeatures] | None = None
    ) -> None:
        self.numbers, self.categories = tuple(numbers), tuple(categories)
        self.texts = dict(texts or {})  # text column -> its features, which are among `numbers`
        self.unseen: dict[str, int] = {}  # column -> number of unseen values in the last `apply`
        self.unseen_rows: dict[str, np.ndarray] = {}  # column -> their rows

    @classmethod
    def fit(cls, rows: pl.DataFrame, columns: Iterable[Column]) -> TablePreparer:
        """Fit on training rows. Constant columns and types other than number, boolean, category, date and text are
        skipped."""
        numbers: list[Number] = []
        categories: list[Category] = []
        texts: dict[str, TextFeatures] = {}
        for column in columns:
            name, values = column.name, rows[column.name]
            if column.kind in ("number", "date"):
                parts = ["value"] if column.kind == "number" else ["time", "year-sin", "year-cos"]
                if column.kind == "date" and np.nansum(hour_of_day(values)) > 0:
                    parts += ["hour-sin", "hour-cos"]
                for part in parts:
                    raw = extract_part(values, part)
                    raw = raw[~np.isnan(raw)]
                    if raw.size and raw.min() < raw.max():
                        knots = fit_quantiles(raw) if part in ("value", "time") else ()
                        numbers.append(Number(name, part, knots))
                if column.kind == "date":
                    categories += fit_category(name, "weekday", category_text(values, "weekday"))
                if 0 < values.null_count() < values.len():
                    categories.append(Category(name, "missing", ("no", "yes")))
            elif column.kind == "text" and (found := TextFeatures.fit(values.to_list())):
                texts[name] = found
                for i, raw in enumerate(found.apply(values.to_list()).T):
                    if raw.min() < raw.max():
                        numbers.append(Number(name, f"text-{i}", fit_quantiles(raw)))
            elif column.kind in ("category", "boolean"):
                categories += fit_category(name, "value", category_text(values, "value"))
        return cls(numbers, categories, texts)

    def check_columns(self, kinds: Mapping[str, str]) -> None:
        """Raise `ValueError` if a feature is made of a column that the table lacks, or of a part that its type has not."""
        features: list[Number | Category] = [*self.numbers, *self.categories]
        for feature in features:
            kind = kinds.get(feature.column)
            parts = PARTS.get(kind or "", ("value", "missing"))
            if kind == "text":
                texts = self.texts.get(feature.column)
                parts = tuple(f"text-{i}" for i in range(texts.dimensions if texts else 0))
            if kind is None or feature.part not in parts:
                raise ValueError(f"no column of the inputs has the part {feature.part!r} of {feature.column!r}")

    @property
    def cardinalities(self) -> list[int]:
        """Number of codes of each category, including 0."""
        return [c.size for c in self.categories]

    @property
    def width(self) -> int:
        """Number of columns of `vector`."""
        return len(self.numbers) + sum(c.size - 1 for c in self.categories)

    def apply(self, rows: pl.DataFrame, scale: str = "normal") -> tuple[np.ndarray, np.ndarray]:
        """Return numbers (float32, N x n) and categories (int64, N x k). Counts unseen values in `unseen`.

        With `scale="standard"`, numbers are scaled linearly instead: mean 0 and standard deviation 1, and 0 if missing.
        """
        normalize = to_normal if scale == "normal" else to_standard
        numbers = np.empty((rows.height, len(self.numbers)), dtype=np.float32)
        codes = np.empty((rows.height, len(self.categories)), dtype=np.int64)
        self.unseen, self.unseen_rows = {}, {}
        texts = {name: features.apply(rows[name].to_list()) for name, features in self.texts.items()}
        for i, n in enumerate(self.numbers):
            is_text = n.part.startswith("text-")
            raw = texts[n.column][:, int(n.part[5:])] if is_text else extract_part(rows[n.column], n.part)
            numbers[:, i] = np.nan_to_num(normalize(raw, n.quantiles) if n.quantiles else raw)
        given = [category_text(rows[c.column], c.part).alias(str(i)) for i, c in enumerate(self.categories)]
        if given:  # all columns at once: on single rows, the time is that of the calls of polars
            coded = [
                pl.col(text.name).replace_strict(c.index(text), default=0, return_dtype=pl.Int64)
                for c, text in zip(self.categories, given)
            ]
            codes[:] = pl.DataFrame(given).select(coded).to_numpy()
        for i, (c, text) in enumerate(zip(self.categories, given)):
            unseen = codes[:, i] == 0
            if text.null_count():
                missing = text.is_null().to_numpy()
                codes[missing, i] = c.size - 1 if c.missing else 0
                unseen &= ~missing
            if unseen.any():
                self.unseen[c.column] = int(unseen.sum())
                if c.part == "value":
                    self.unseen_rows[c.column] = np.flatnonzero(unseen)
        return numbers, codes

    def vector(self, rows: pl.DataFrame) -> np.ndarray:
        """Return one matrix, float32, N x width: numbers, then one-hot categories; an unseen value is all zeros."""
        numbers, codes = self.apply(rows)
        return np.concatenate([numbers, self.one_hot(codes)], axis=1)

    def one_hot(self, codes: np.ndarray) -> np.ndarray:
        """Return the one-hot encoding of categories, float32, N x (width - n)."""
        out = np.zeros((codes.shape[0], self.width - len(self.numbers)), dtype=np.float32)
        start = -1
        for i, c in enumerate(self.categories):
            known = np.flatnonzero(codes[:, i])
            out[known, start + codes[known, i]] = 1
            start += c.size - 1
        return out

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-compatible dictionary."""
        texts = {name: features.to_json() for name, features in self.texts.items()}
        return {
            "version": 1,
            "numbers": [asdict(n) for n in self.numbers],
            "categories": [asdict(c) for c in self.categories],
            **({"texts": texts} if texts else {}),
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> TablePreparer:
        """Restore from `to_json`."""
        return cls(
            [Number(n["column"], n["part"], tuple(n["quantiles"])) for n in saved["numbers"]],
            [Category(c["column"], c["part"], tuple(c["values"]), c["missing"]) for c in saved["categories"]],
            {name: TextFeatures.from_json(features) for name, features in saved.get("texts", {}).items()},
        )


def fit_quantiles(values: np.ndarray) -> tuple[float, ...]:
    """Return quantiles of training values at equally spaced probabilities: one per 30 values, between 10 and 1000."""
    count = max(10, min(values.size // 30, MAX_QUANTILES))
    found = np.quantile(values, np.linspace(0, 1, count))
    return tuple(np.maximum.accumulate(found).tolist())  # rounding errors may break the order


def to_normal(values: np.ndarray, knots: tuple[float, ...]) -> np.ndarray:
    """Return standard normal scores. A value equal to several quantiles gets the mean of their probabilities, computed by
    interpolation from both sides."""
    at, p = np.array(knots), np.linspace(0, 1, len(knots))
    below, above = np.interp(values, at, p), -np.interp(-values, -at[::-1], -p[::-1])
    return ndtri(np.clip((below + above) / 2, MIN_PROBABILITY, 1 - MIN_PROBABILITY))


def to_standard(values: np.ndarray, knots: tuple[float, ...]) -> np.ndarray:
    """Return values minus the mean of the quantiles, divided by their standard deviation."""
    at = np.array(knots)
    return (values - at.mean()) / (at.std() or 1.0)


def extract_part(values: pl.Series, part: str) -> np.ndarray:
    """Return one number per value of a column, float64, NaN if missing."""
    if part == "value":
        numbers = values if values.dtype == pl.Float64 else values.cast(pl.Float64)
        return (numbers.fill_null(np.nan) if numbers.null_count() else numbers).to_numpy()
    if part == "time":
        return (values.cast(pl.Int64).cast(pl.Float64) / DAY_MICROSECONDS).fill_null(np.nan).to_numpy()
    turn = (
        hour_of_day(values) / 24
        if part.startswith("hour")
        else (values.dt.ordinal_day().cast(pl.Float64).fill_null(np.nan).to_numpy() - 1) / 365.25
    )
    return (np.sin if part.endswith("sin") else np.cos)(2 * np.pi * turn)


def hour_of_day(values: pl.Series) -> np.ndarray:
    """Return the hour of the day including fractions, NaN if the date is missing."""
    within = (values.cast(pl.Int64) % DAY_MICROSECONDS).cast(pl.Float64) / (DAY_MICROSECONDS / 24)
    return within.fill_null(np.nan).to_numpy()


def category_text(values: pl.Series, part: str) -> pl.Series:
    """Return the text of a part of a column's values, to be encoded as a category."""
    if part == "missing":
        return values.is_null().replace_strict({True: "yes", False: "no"}, return_dtype=pl.String)
    if part == "weekday":
        return values.dt.weekday().cast(pl.String)
    return numbers_to_text(values)


def fit_category(column: str, part: str, text: pl.Series) -> list[Category]:
    """Return the category of a column in a list, or an empty list if all rows have the same value."""
    names, seen = count_values(text.drop_nulls())
    if len(names) > MAX_FULL_CATEGORIES:
        names = [n for n, s in zip(names, seen) if s > 1][:MAX_CATEGORIES]
    missing = text.null_count() > 0
    if len(names) + missing + (len(names) < len(seen)) < 2:
        return []
    return [Category(column, part, tuple(sorted(names)), missing)]

"""Texts of a table as numbers: TF-IDF of words and pairs of words, projected to a few dimensions.

The projection is a truncated singular value decomposition of the training texts (latent semantic analysis; Deerwester et al. 1990).
Idf is ln((1 + N) / (1 + n)) + 1 and tf is 1 + ln(count), as in scikit-learn; rows have length 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from scipy.sparse import csr_matrix

from fieldguide.core.words import find_words

MAX_TERMS = 4000
MAX_DIMENSIONS = 24
MIN_ROWS_PER_DIMENSION = 8  # training rows for each dimension
MIN_TERM_ROWS = 2  # training rows that hold a term


@dataclass(frozen=True)
class TextFeatures:
    """Fitted features of a text column: terms, their idf, and the projection (terms x dimensions)."""

    terms: tuple[str, ...]
    idf: np.ndarray
    projection: np.ndarray

    STATE: ClassVar[Mapping[str, Any]] = {
        "terms": list[str],
        "idf": list[float],
        "projection": list[list[float]],
    }  # of `to_json`

    @classmethod
    def fit(cls, texts: Sequence[str | None]) -> TextFeatures | None:
        """Fit on training texts. Returns None if no term is in several of them, but not in all."""
        from sklearn.utils.extmath import randomized_svd

        found = [set(find_terms(text)) for text in texts]
        counts: dict[str, int] = {}
        for terms in found:
            for term in terms:
                counts[term] = counts.get(term, 0) + 1
        useful = [term for term, n in counts.items() if MIN_TERM_ROWS <= n < len(texts)]
        names = sorted(sorted(useful, key=lambda t: (-counts[t], t))[:MAX_TERMS])
        dimensions = min(MAX_DIMENSIONS, len(names), len(texts) // MIN_ROWS_PER_DIMENSION)
        if dimensions < 1:
            return None
        idf = np.log((1 + len(texts)) / (1 + np.array([counts[t] for t in names]))) + 1
        fitted = cls(tuple(names), idf, np.eye(len(names), 0))
        matrix = fitted.weigh(texts)
        if min(matrix.shape) <= dimensions:
            projection = np.linalg.svd(matrix.toarray(), full_matrices=False)[2][:dimensions].T
        else:
            projection = randomized_svd(matrix, dimensions, random_state=0)[2].T
        return cls(fitted.terms, idf, np.round(projection, 6))

    def weigh(self, texts: Sequence[str | None]) -> csr_matrix:
        """Return the TF-IDF matrix of texts, N x terms, with rows of length 1."""
        index = {term: i for i, term in enumerate(self.terms)}
        columns: list[int] = []
        values: list[float] = []
        ends = [0]
        for text in texts:
            counts: dict[int, int] = {}
            for term in find_terms(text):
                if (place := index.get(term)) is not None:
                    counts[place] = counts.get(place, 0) + 1
            weights = (1 + np.log(list(counts.values()))) * self.idf[list(counts)] if counts else np.zeros(0)
            columns += counts
            values += (weights / max(float(np.linalg.norm(weights)), 1e-12)).tolist()
            ends.append(len(columns))
        return csr_matrix((values, columns, ends), shape=(len(texts), len(self.terms)))

    def apply(self, texts: Sequence[str | None]) -> np.ndarray:
        """Return the features of texts, float64, N x dimensions."""
        return np.asarray(self.weigh(texts) @ self.projection)

    @property
    def dimensions(self) -> int:
        """Number of features."""
        return self.projection.shape[1]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-compatible dictionary."""
        return {"terms": list(self.terms), "idf": self.idf.tolist(), "projection": self.projection.tolist()}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> TextFeatures:
        """Restore from `to_json`."""
        return cls(tuple(saved["terms"]), np.array(saved["idf"]), np.array(saved["projection"]))


def find_terms(text: str | None) -> list[str]:
    """Return the words of a text in lower case, and its pairs of neighboring words."""
    words = find_words((text or "").lower())
    return words + [f"{a} {b}" for a, b in pairwise(words)]

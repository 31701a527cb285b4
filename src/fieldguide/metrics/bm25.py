"""BM25: ranking of texts by the words that they share with a query, as a baseline.

Robertson and Zaragoza 2009, doi:10.1561/1500000019, equation 3.15, with the inverse document frequency of Lucene, which is never
negative: log(1 + (N - n + 0.5) / (n + 0.5)) for a word in n of N texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from fieldguide.core.words import find_words

SATURATION, LENGTH_NORMALIZATION = 1.5, 0.75  # k1 and b


class BM25:
    """Statistics of words in a collection of texts. Texts that are scored need not be in the collection."""

    def __init__(self, collection: Sequence[str], k1: float = SATURATION, b: float = LENGTH_NORMALIZATION):
        self.k1, self.b = k1, b
        self.vocabulary: dict[str, int] = {}
        for text in collection:
            for word in split_words(text):
                self.vocabulary.setdefault(word, len(self.vocabulary))
        counts = self.count_words(collection)
        self.mean_length = max(float(counts.sum()) / max(len(collection), 1), 1e-9)
        containing = np.asarray((counts > 0).sum(0)).ravel()
        self.idf = np.log1p((len(collection) - containing + 0.5) / (containing + 0.5))

    def count_words(self, texts: Sequence[str]) -> sparse.csr_matrix:  # -> texts words
        """Return how often each known word occurs in each text."""
        rows, columns = [], []
        for row, text in enumerate(texts):
            known = [code for word in split_words(text) if (code := self.vocabulary.get(word)) is not None]
            columns += known
            rows += [row] * len(known)
        shape = (len(texts), max(len(self.vocabulary), 1))
        return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape)

    def weigh(self, texts: Sequence[str]) -> sparse.csr_matrix:  # -> texts words
        """Return what each word of each text adds to the score of a query that contains the word once."""
        counts = self.count_words(texts).tocoo()
        lengths = np.array([len(split_words(text)) for text in texts], dtype=np.float64)
        norm = self.k1 * (1 - self.b + self.b * lengths / self.mean_length)
        values = self.idf[counts.col] * counts.data * (self.k1 + 1) / (counts.data + norm[counts.row])
        return sparse.csr_matrix((values, (counts.row, counts.col)), shape=counts.shape)

    def score_all(self, queries: Sequence[str], texts: Sequence[str]) -> np.ndarray:  # -> queries texts
        """Return the score of each text for each query."""
        return (self.count_words(queries) @ self.weigh(texts).T).toarray()

    def score_pairs(self, queries: Sequence[str], texts: Sequence[str]) -> np.ndarray:  # -> pairs
        """Return the score of each text for the query in the same place."""
        return np.asarray(self.count_words(queries).multiply(self.weigh(texts)).sum(1)).ravel()


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return find_words(text.lower())

"""Scores of captions against several references for each image: BLEU (Papineni et al. 2002, doi:10.3115/1073083.1073135) and
CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726, sections 3 and 5).

Words are runs of letters and digits in lower case, without punctuation, as for COCO; in scripts without spaces between words each
character is a word.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fieldguide.metrics.rouge import split_words

ORDERS = (1, 2, 3, 4)  # lengths of the n-grams
LENGTH_SIGMA = 6.0  # words by which lengths may differ, in CIDEr-D's penalty
CIDER_SCALE = 10.0
Words = Sequence[str]


def count_ngrams(words: Words, order: int) -> Counter[tuple[str, ...]]:
    """Return how often each n-gram of `order` words occurs."""
    return Counter(zip(*(words[i:] for i in range(order))))


def count_matches(said: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:  # N texts -> N 10
    """Return for each text what BLEU sums: matched n-grams of 1 to 4 words, n-grams, words, words of the closest reference.

    A match counts as often as in the reference that holds it most often. Of references that are equally close in length, the
    shorter one counts.
    """
    rows = np.zeros((len(said), 10), dtype=np.int64)
    for row, words, known in zip(rows, said, references, strict=True):
        for place, order in enumerate(ORDERS):
            limit: Counter[tuple[str, ...]] = Counter()
            for reference in known:
                limit |= count_ngrams(reference, order)  # the maximum of both counts
            mine = count_ngrams(words, order)
            row[place], row[4 + place] = (mine & limit).total(), mine.total()
        row[8] = len(words)
        row[9] = min((abs(len(reference) - len(words)), len(reference)) for reference in known)[1] if known else 0
    return rows


def compute_bleu(counts: np.ndarray, order: int = 4) -> np.ndarray:  # ... 10 -> ...
    """Return BLEU, 0 to 100, of sums of counts over texts, with n-grams of up to `order` words and without smoothing."""
    counts = np.asarray(counts, dtype=np.float64)
    matches, totals = counts[..., :order], counts[..., 4 : 4 + order]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(matches > 0, np.log(matches) - np.log(totals), -np.inf).mean(-1)
        penalty = np.minimum(0.0, 1 - counts[..., 9] / counts[..., 8])  # too short a text
        return 100 * np.exp(logs + np.where(counts[..., 8] > 0, penalty, -np.inf))


class Cider:
    """CIDEr-D with the rarity of n-grams in the references of a set of images."""

    def __init__(self, references: Sequence[Sequence[Words]]):
        self.images = len(references)
        self.frequency = [
            Counter(ngram for known in references for ngram in set().union(*(count_ngrams(words, order) for words in known)))
            for order in ORDERS
        ]

    def weigh(self, words: Words) -> list[dict[tuple[str, ...], float]]:
        """Return the weight of each n-gram of a text by order: its count times the logarithm of its rarity (equation 1)."""
        whole = math.log(max(self.images, 1))
        return [
            {ngram: count * (whole - math.log(max(1, seen[ngram]))) for ngram, count in count_ngrams(words, order).items()}
            for order, seen in zip(ORDERS, self.frequency)
        ]

    def score(self, words: Words, known: Sequence[Words]) -> float:
        """Return CIDEr-D of a text: 10 times the mean, over references and orders, of the clipped cosine of the weights, reduced
        where lengths differ (equations 2 and 3, and section 5)."""
        if not known:
            return 0.0
        mine, total = self.weigh(words), 0.0
        for reference in known:
            penalty = math.exp(-((len(words) - len(reference)) ** 2) / (2 * LENGTH_SIGMA**2))
            for a, b in zip(mine, self.weigh(reference)):
                size = math.sqrt(sum(w * w for w in a.values()) * sum(w * w for w in b.values()))
                shared = sum(min(w, b[ngram]) * b[ngram] for ngram, w in a.items() if ngram in b)
                total += penalty * shared / size if size else 0.0
        return CIDER_SCALE * total / (len(known) * len(ORDERS))


def score_captions(said: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the counts for BLEU (N 10) and CIDEr-D (N) of texts with several references each."""
    mine, known = [split_words(text) for text in said], [[split_words(text) for text in texts] for texts in references]
    cider = Cider(known)
    return count_matches(mine, known), np.array([cider.score(words, texts) for words, texts in zip(mine, known)])

"""Exact match and F1 of extractive question answering, as defined by SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250,
section 6.1; for questions without an answer: Rajpurkar et al. 2018, arXiv:1806.03822, section 5).

Texts are compared with composed characters (NFC), in lower case, without ASCII punctuation and English articles, and
with normalized whitespace. Of several references the best match counts. The right answer to a question without
references is the empty string.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import regex

from fieldguide.core.words import compose

ARTICLES = regex.compile(r"\b(a|an|the)\b", regex.WORD)
PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))


def normalize_text(text: str) -> str:
    """Normalize a text for comparison."""
    return " ".join(ARTICLES.sub(" ", compose(text).lower().translate(PUNCTUATION)).split())


def f1_score(predicted: str, reference: str) -> float:
    """Return the F1 score of the shared words, with multiplicity. If a text has no words, return whether both have none."""
    mine, theirs = Counter(normalize_text(predicted).split()), Counter(normalize_text(reference).split())
    if not mine or not theirs:
        return float(mine == theirs)
    return 2 * (mine & theirs).total() / (mine.total() + theirs.total())


def score_answers(predicted: Iterable[str], references: Iterable[Sequence[str]]) -> np.ndarray:  # N texts, N lists -> N 2
    """Return exact match and F1 of each answer with the best of its references; `""` means no answer."""
    rows = [(text, options or ("",)) for text, options in zip(predicted, references, strict=True)]
    return np.array(
        [
            (max(float(normalize_text(text) == normalize_text(r)) for r in options), max(f1_score(text, r) for r in options))
            for text, options in rows
        ]
    ).reshape(-1, 2)


def find_threshold(margins: np.ndarray, answered: np.ndarray, silent: np.ndarray) -> float:  # N each
    """Return the margin over no answer above which an answer is given, such that the sum of scores is maximal.

    An example scores `answered` if its answer is given, and `silent` if not. This is `na_prob_thresh` of SQuAD 2.0's
    script. The threshold lies halfway between two margins.
    """
    order = np.argsort(-margins, kind="stable")
    margins, gain = margins[order], (answered - silent)[order]
    # Score with the first k answers given; only k between different margins are possible.
    total = np.concatenate([[0.0], np.cumsum(gain)])
    edges = np.concatenate([[margins[0] + 2.0], margins, [margins[-1] - 2.0]]) if len(margins) else np.zeros(2)
    possible = edges[:-1] > edges[1:]
    best = int(np.argmax(np.where(possible, total, -np.inf)))
    return float((edges[best] + edges[best + 1]) / 2)

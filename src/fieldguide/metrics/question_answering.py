"""How near answers come to those that people gave: exact match and F1, as SQuAD counts them (Rajpurkar et al. 2016,
arXiv:1606.05250, section 6.1; of questions that have no answer: Rajpurkar et al. 2018, arXiv:1806.03822, section 5).

Texts are compared in lower case, without ASCII punctuation, without the English articles, and whatever blanks stand between
their words. Of several references the nearest counts. A question that has none is answered rightly by nothing.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))


def normalize_text(text: str) -> str:
    """A text as it is compared."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def f1_score(said: str, right: str) -> float:
    """F1 of the words that both have, each as often as both have it; where one has no words, whether both have none."""
    mine, theirs = Counter(normalize_text(said).split()), Counter(normalize_text(right).split())
    if not mine or not theirs:
        return float(mine == theirs)
    return 2 * (mine & theirs).total() / (mine.total() + theirs.total())


def score_answers(said: Sequence[str], right: Sequence[Sequence[str]]) -> np.ndarray:  # N texts, N lists -> N 2
    """Exact match and F1 of each answer with the nearest of its references; `""` says that there is no answer."""
    rows = [(text, references or ("",)) for text, references in zip(said, right, strict=True)]
    return np.array(
        [
            (max(float(normalize_text(text) == normalize_text(r)) for r in references), max(f1_score(text, r) for r in references))
            for text, references in rows
        ]
    ).reshape(-1, 2)


def find_threshold(margins: np.ndarray, answered: np.ndarray, silent: np.ndarray) -> float:  # N each
    """How much better than none an answer must be to be given: what makes the sum of scores largest, where an answer scores
    `answered` if it is given and `silent` if not (the `na_prob_thresh` of SQuAD 2.0's own script). Between two margins."""
    order = np.argsort(-margins, kind="stable")
    margins, gain = margins[order], (answered - silent)[order]
    # With the first k answers given, the rest not; k only where the next margin is another.
    total = np.concatenate([[0.0], np.cumsum(gain)])
    edges = np.concatenate([[margins[0] + 2.0], margins, [margins[-1] - 2.0]]) if len(margins) else np.zeros(2)
    possible = edges[:-1] > edges[1:]
    best = int(np.argmax(np.where(possible, total, -np.inf)))
    return float((edges[best] + edges[best + 1]) / 2)

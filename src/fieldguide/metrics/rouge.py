"""ROUGE: how much of a reference summary a summary says (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries").

Words are runs of letters and digits in lower case, without stemming, as in Google's `rouge_score`; there letters are those
of ASCII, here of every script, and where a script has no blanks between words each character is one. For ASCII texts the
numbers are the same. All are F-measures, from 0 to 1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fieldguide.metrics.scripts import HAN, OTHER_UNSPACED

WORD = re.compile(f"[{HAN}{OTHER_UNSPACED}]|[^\\W_{HAN}{OTHER_UNSPACED}]+")
ROUGE_NAMES = ("rouge1", "rouge2", "rougeL")


def split_words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def f_measure(shared: int, said: int, right: int) -> float:
    """F-measure of what is shared of so much that was said and so much that was right to say."""
    return 2 * shared / (said + right) if shared else 0.0


def rouge_n(said: Sequence[str], right: Sequence[str], size: int) -> float:
    """ROUGE-N: runs of `size` words that both have, each as often as both have it (section 2)."""
    mine, theirs = (Counter(zip(*(row[i:] for i in range(size)))) for row in (said, right))
    return f_measure((mine & theirs).total(), mine.total(), theirs.total())


def rouge_l(said: Sequence[str], right: Sequence[str]) -> float:
    """ROUGE-L: the longest row of words that both have in this order, not necessarily side by side (section 3.1)."""
    if not said or not right:
        return 0.0
    number = {word: i for i, word in enumerate(dict.fromkeys(right))}
    row, want = np.array([number.get(word, -1) for word in said]), np.array([number[word] for word in right])
    best = np.zeros(len(want) + 1, dtype=np.int64)  # for the words so far: with the first j of the reference
    for word in row:
        best[1:] = np.maximum(best[1:], best[:-1] + (want == word))
        best = np.maximum.accumulate(best)
    return f_measure(int(best[-1]), len(row), len(want))


def score_texts(said: Sequence[str], right: Sequence[str]) -> np.ndarray:  # N texts, N references -> N 3
    """ROUGE-1, ROUGE-2 and ROUGE-L of each text."""
    rows = [(split_words(a), split_words(b)) for a, b in zip(said, right, strict=True)]
    return np.array([(rouge_n(a, b, 1), rouge_n(a, b, 2), rouge_l(a, b)) for a, b in rows]).reshape(-1, len(ROUGE_NAMES))

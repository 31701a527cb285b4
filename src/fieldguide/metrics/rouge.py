"""ROUGE: overlap of a summary with a reference (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries").

Words are runs of letters and digits in lower case, without stemming, as in Google's `rouge_score`, but with letters
of every script, with their combining marks, instead of ASCII only. In scripts without spaces between words each
character is a word. For ASCII texts the scores are equal. All scores are F-measures from 0 to 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import regex

from fieldguide.core.words import compose
from fieldguide.metrics.scripts import HAN, OTHER_UNSPACED

WORD = regex.compile(rf"[{HAN}{OTHER_UNSPACED}]\p{{M}}*|(?:(?![_{HAN}{OTHER_UNSPACED}])[\w\p{{N}}])+")
ROUGE_NAMES = ("rouge1", "rouge2", "rougeL")


def split_words(text: str) -> list[str]:
    """Split a text into lower-case words."""
    return WORD.findall(compose(text).lower())


def f_measure(shared: int, predicted: int, reference: int) -> float:
    """Return the F-measure of `shared` units, given the numbers of predicted and reference units."""
    return 2 * shared / (predicted + reference) if shared else 0.0


def rouge_n(predicted: Sequence[str], reference: Sequence[str], size: int) -> float:
    """Return ROUGE-N, the overlap of n-grams of `size` words, with multiplicity (section 2)."""
    mine, theirs = (Counter(zip(*(row[i:] for i in range(size)))) for row in (predicted, reference))
    return f_measure((mine & theirs).total(), mine.total(), theirs.total())


def rouge_l(predicted: Sequence[str], reference: Sequence[str]) -> float:
    """Return ROUGE-L, based on the longest common subsequence of words (section 3.1)."""
    if not predicted or not reference:
        return 0.0
    number = {word: i for i, word in enumerate(dict.fromkeys(reference))}
    row, want = np.array([number.get(word, -1) for word in predicted]), np.array([number[word] for word in reference])
    best = np.zeros(len(want) + 1, dtype=np.int64)  # length for the words so far and the first j words of the reference
    for word in row:
        best[1:] = np.maximum(best[1:], best[:-1] + (want == word))
        best = np.maximum.accumulate(best)
    return f_measure(int(best[-1]), len(row), len(want))


def score_texts(predicted: Iterable[str], references: Iterable[str]) -> np.ndarray:  # N texts, N references -> N 3
    """Return ROUGE-1, ROUGE-2 and ROUGE-L of each text."""
    rows = [(split_words(a), split_words(b)) for a, b in zip(predicted, references, strict=True)]
    return np.array([(rouge_n(a, b, 1), rouge_n(a, b, 2), rouge_l(a, b)) for a, b in rows]).reshape(-1, len(ROUGE_NAMES))

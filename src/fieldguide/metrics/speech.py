"""Word and character error rates of speech recognition.

The edit distances of a corpus are computed together, one row of the Levenshtein table at a time for all pairs. Texts are
compared as they are; normalize both before (see `fieldguide.data.preprocessing.transcripts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fieldguide.core.errors import DataError

Unit = Literal["words", "characters"]
MAX_TABLE_CELLS = 4_000_000  # cells of a table row over all pairs: 32 MB


@dataclass(frozen=True)
class Edits:
    """Edit counts of N transcripts, int64. Among the shortest edit sequences, one with the fewest substitutions is counted."""

    substitutions: np.ndarray
    deletions: np.ndarray  # in the reference only
    insertions: np.ndarray  # in the hypothesis only
    length: np.ndarray  # words or characters of the reference

    @property
    def errors(self) -> np.ndarray:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Error rate of the corpus: errors divided by reference length; may exceed 1.

        Raises `DataError` if all references are empty.
        """
        if not self.length.sum():
            raise DataError("all reference transcripts are empty, so the error rate is undefined")
        return float(self.errors.sum() / self.length.sum())

    def totals(self) -> dict[str, int]:
        """Return the counts summed over the corpus."""
        return {
            "substitutions": int(self.substitutions.sum()),
            "deletions": int(self.deletions.sum()),
            "insertions": int(self.insertions.sum()),
            "length": int(self.length.sum()),
        }


def split_units(text: str, unit: Unit) -> list[str]:
    """Split a text into words, or into characters with one space between words."""
    words = text.split()
    return words if unit == "words" else list(" ".join(words))


def count_edits(references: Sequence[str], hypotheses: Sequence[str], unit: Unit = "words") -> Edits:
    """Count the edits from each reference to its hypothesis. Raises `DataError` for lists of unequal length."""
    if len(references) != len(hypotheses):
        raise DataError(f"there are {len(references)} reference transcripts but {len(hypotheses)} hypotheses")
    known: dict[str, int] = {}
    number = lambda text: np.array([known.setdefault(u, len(known)) for u in split_units(text, unit)], dtype=np.int64)
    reference, hypothesis = [number(text) for text in references], [number(text) for text in hypotheses]
    n, m = np.array([len(r) for r in reference], np.int64), np.array([len(h) for h in hypothesis], np.int64)
    distance, substitutions = np.zeros(len(n), np.int64), np.zeros(len(n), np.int64)
    order, first = np.argsort(n, kind="stable"), 0
    while first < len(order):  # pairs of similar length share a table
        last = first + 1
        while last < len(order) and (last + 1 - first) * (n[order[last]] + 1) <= MAX_TABLE_CELLS:
            last += 1
        rows, first = order[first:last], last
        distance[rows], substitutions[rows] = levenshtein([reference[i] for i in rows], [hypothesis[i] for i in rows])
    # The other edits are deletions and insertions; their difference is that of the lengths.
    deletions = (distance - substitutions + n - m) // 2
    return Edits(substitutions, deletions, distance - substitutions - deletions, n)


def levenshtein(reference: Sequence[np.ndarray], hypothesis: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the edit distance and the minimum number of substitutions at that distance, for each pair of int64 arrays.

    Both are packed into one number, `distance * base + substitutions`, so that minimizing it minimizes both in order.
    """
    n, m = np.array([len(r) for r in reference], np.int64), np.array([len(h) for h in hypothesis], np.int64)
    base = int(max(n.max(initial=0), m.max(initial=0))) + 1
    across, down = pad_rows(reference), pad_rows(hypothesis)
    steps = base * np.arange(across.shape[1] + 1)
    row = np.broadcast_to(steps, (len(n), len(steps))).copy()  # empty hypothesis: all words deleted
    best = row.copy()  # the row after the last word of each hypothesis
    for i in range(down.shape[1]):
        other = across != down[:, i : i + 1]
        new = row + base  # an insertion
        np.minimum(new[:, 1:], row[:, :-1] + np.where(other, base + 1, 0), out=new[:, 1:])
        row = np.minimum.accumulate(new - steps, axis=1) + steps  # any number of deletions
        done = m == i + 1
        best[done] = row[done]
    packed = best[np.arange(len(n)), n]
    return packed // base, packed % base


def pad_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Stack rows in one table, padded with 0; the padding does not affect the result."""
    sizes = np.array([len(r) for r in rows])
    table = np.zeros((len(rows), sizes.max(initial=0)), np.int64)
    table[np.arange(table.shape[1]) < sizes[:, None]] = np.concatenate([*rows, np.empty(0, np.int64)])
    return table


def wer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Return the word error rate of the corpus."""
    return count_edits(references, hypotheses, "words").rate


def cer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Return the character error rate of the corpus, including spaces between words."""
    return count_edits(references, hypotheses, "characters").rate


def compare(reference: str, hypothesis: str, unit: Unit = "words") -> list[tuple[str, str]]:
    """Align a single reference with its hypothesis, consistently with `count_edits`.

    The result is a list of pairs: ("the", "a") is a substitution, ("the", "") a deletion, ("", "the") an insertion.
    """
    expected, actual = split_units(reference, unit), split_units(hypothesis, unit)
    cost = [[(j, 0) for j in range(len(expected) + 1)]]
    for i, h in enumerate(actual, 1):
        line = [(i, 0)]
        for j, s in enumerate(expected, 1):
            (d, u), (a, b), (c, e) = cost[-1][j - 1], cost[-1][j], line[-1]
            line.append(min((d + (s != h), u + (s != h)), (a + 1, b), (c + 1, e)))
        cost.append(line)
    pairs, i, j = [], len(actual), len(expected)
    while i or j:
        d, u = cost[i][j]
        differ = int(bool(i and j) and expected[j - 1] != actual[i - 1])
        if i and j and cost[i - 1][j - 1] == (d - differ, u - differ):
            i, j = i - 1, j - 1
            pairs.append((expected[j], actual[i]))
        elif j and cost[i][j - 1] == (d - 1, u):
            j -= 1
            pairs.append((expected[j], ""))
        else:
            i -= 1
            pairs.append(("", actual[i]))
    return pairs[::-1]

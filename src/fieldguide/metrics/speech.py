"""Speech: how many words, or characters, must be changed, left out or put in to make what was heard what was said.

The whole corpus at once: one row of Levenshtein's table is advanced for all pairs together, so that a thousand
transcripts take about as long as the longest. Texts are compared as they are; bring both to one form before (see
`fieldguide.data.preprocessing.transcripts.normal`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fieldguide.core.errors import DataError

Unit = Literal["words", "characters"]
MAX_TABLE_CELLS = 4_000_000  # cells of a row of the table, over all pairs in it: 32 MB


@dataclass(frozen=True)
class Edits:
    """Counts of each pair, int64: N transcripts. Of the shortest ways the one with the fewest substitutions is counted,
    which keeps the most words."""

    substitutions: np.ndarray
    deletions: np.ndarray  # said, but not heard
    insertions: np.ndarray  # heard, but not said
    length: np.ndarray  # words or characters that were said

    @property
    def errors(self) -> np.ndarray:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Of the corpus: all errors by all that was said. May be above 1. Raises `DataError` where nothing was said."""
        if not self.length.sum():
            raise DataError("all reference transcripts are empty: there is no error rate of nothing")
        return float(self.errors.sum() / self.length.sum())

    def totals(self) -> dict[str, int]:
        return {
            "substitutions": int(self.substitutions.sum()),
            "deletions": int(self.deletions.sum()),
            "insertions": int(self.insertions.sum()),
            "length": int(self.length.sum()),
        }


def split_units(text: str, unit: Unit) -> list[str]:
    """Words, or characters with one space between words."""
    words = text.split()
    return words if unit == "words" else list(" ".join(words))


def count_edits(references: Sequence[str], hypotheses: Sequence[str], unit: Unit = "words") -> Edits:
    """Edits from what was said to what was heard, pair by pair. Raises `DataError` for lists of unequal length."""
    if len(references) != len(hypotheses):
        raise DataError(f"{len(references)} reference transcripts stand beside {len(hypotheses)} hypotheses")
    known: dict[str, int] = {}
    number = lambda text: np.array([known.setdefault(u, len(known)) for u in split_units(text, unit)], dtype=np.int64)
    said, heard = [number(text) for text in references], [number(text) for text in hypotheses]
    n, m = np.array([len(s) for s in said], np.int64), np.array([len(h) for h in heard], np.int64)
    distance, substitutions = np.zeros(len(n), np.int64), np.zeros(len(n), np.int64)
    order, first = np.argsort(n, kind="stable"), 0
    while first < len(order):  # pairs of similar length share a table
        last = first + 1
        while last < len(order) and (last + 1 - first) * (n[order[last]] + 1) <= MAX_TABLE_CELLS:
            last += 1
        rows, first = order[first:last], last
        distance[rows], substitutions[rows] = levenshtein([said[i] for i in rows], [heard[i] for i in rows])
    # What is left are deletions and insertions, and they differ by as much as the lengths do.
    deletions = (distance - substitutions + n - m) // 2
    return Edits(substitutions, deletions, distance - substitutions - deletions, n)


def levenshtein(said: Sequence[np.ndarray], heard: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(distance, fewest substitutions among the shortest ways) of each pair of int64 arrays.

    Both are one number while the table is made, `distance * BASE + substitutions`, so that the smaller is the better.
    """
    n, m = np.array([len(s) for s in said], np.int64), np.array([len(h) for h in heard], np.int64)
    base = int(max(n.max(initial=0), m.max(initial=0))) + 1
    across, down = pad_rows(said), pad_rows(heard)
    steps = base * np.arange(across.shape[1] + 1)
    row = np.broadcast_to(steps, (len(n), len(steps))).copy()  # nothing heard yet: all deleted
    best = row.copy()  # the row after the last word heard
    for i in range(down.shape[1]):
        other = across != down[:, i : i + 1]
        new = row + base  # an insertion
        np.minimum(new[:, 1:], row[:, :-1] + np.where(other, base + 1, 0), out=new[:, 1:])
        row = np.minimum.accumulate(new - steps, axis=1) + steps  # deletions, however many
        done = m == i + 1
        best[done] = row[done]
    packed = best[np.arange(len(n)), n]
    return packed // base, packed % base


def pad_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows as one table, filled up at the end with anything: what stands there is never looked at."""
    sizes = np.array([len(r) for r in rows])
    table = np.zeros((len(rows), sizes.max(initial=0)), np.int64)
    table[np.arange(table.shape[1]) < sizes[:, None]] = np.concatenate([*rows, np.empty(0, np.int64)])
    return table


def wer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Word error rate of the corpus."""
    return count_edits(references, hypotheses, "words").rate


def cer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Character error rate of the corpus, spaces between words included."""
    return count_edits(references, hypotheses, "characters").rate


def compare(reference: str, hypothesis: str, unit: Unit = "words") -> list[tuple[str, str]]:
    """What was said beside what was heard, word by word; an empty text stands for nothing: ("the", "a") is a
    substitution, ("the", "") a deletion, ("", "the") an insertion. Counts as `edits` does. For single transcripts."""
    said, heard = split_units(reference, unit), split_units(hypothesis, unit)
    cost = [[(j, 0) for j in range(len(said) + 1)]]
    for i, h in enumerate(heard, 1):
        line = [(i, 0)]
        for j, s in enumerate(said, 1):
            (d, u), (a, b), (c, e) = cost[-1][j - 1], cost[-1][j], line[-1]
            line.append(min((d + (s != h), u + (s != h)), (a + 1, b), (c + 1, e)))
        cost.append(line)
    pairs, i, j = [], len(heard), len(said)
    while i or j:
        d, u = cost[i][j]
        differ = int(bool(i and j) and said[j - 1] != heard[i - 1])
        if i and j and cost[i - 1][j - 1] == (d - differ, u - differ):
            i, j = i - 1, j - 1
            pairs.append((said[j], heard[i]))
        elif j and cost[i][j - 1] == (d - 1, u):
            j -= 1
            pairs.append((said[j], ""))
        else:
            i -= 1
            pairs.append(("", heard[i]))
    return pairs[::-1]

"""Word and character error rates against a slow table and an exhaustive search."""

from __future__ import annotations

import functools
import random
import time

import numpy as np
import pytest

from fieldguide.core.errors import DataError
from fieldguide.metrics import speech
from fieldguide.metrics.speech import cer, compare, count_edits, wer


def slow(said: tuple, heard: tuple) -> tuple[int, int, int, int]:
    """Return (errors, substitutions, deletions, insertions) of the best alignment, found by trying all."""

    @functools.cache
    def best(i: int, j: int) -> tuple[int, int, int, int]:
        if i == len(said) and j == len(heard):
            return 0, 0, 0, 0
        ways = []
        if i < len(said) and j < len(heard):
            e, s, d, n = best(i + 1, j + 1)
            wrong = said[i] != heard[j]
            ways.append((e + wrong, s + wrong, d, n))
        if i < len(said):
            e, s, d, n = best(i + 1, j)
            ways.append((e + 1, s, d + 1, n))
        if j < len(heard):
            e, s, d, n = best(i, j + 1)
            ways.append((e + 1, s, d, n + 1))
        return min(ways)

    return best(0, 0)


def corpus(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    rng = random.Random(seed)
    words = ["a", "ab", "b", "ba", "the"]
    said = [" ".join(rng.choices(words, k=rng.randrange(9))) for _ in range(count)]
    heard = []
    for text in said:
        row = [w for w in text.split() if rng.random() > 0.2]
        row = [rng.choice(words) if rng.random() < 0.3 else w for w in row]
        for _ in range(rng.randrange(3)):
            row.insert(rng.randrange(len(row) + 1), rng.choice(words))
        heard.append(" ".join(row))
    return said, heard


@pytest.mark.parametrize("unit", ["words", "characters"])
@pytest.mark.parametrize("together", [speech.MAX_TABLE_CELLS, 40])
def test_edits_equal_an_exhaustive_search(unit, together, monkeypatch):
    monkeypatch.setattr(speech, "MAX_TABLE_CELLS", together)
    said, heard = corpus(300)
    got = count_edits(said, heard, unit)
    for row, (a, b) in enumerate(zip(said, heard)):
        want = slow(tuple(speech.split_units(a, unit)), tuple(speech.split_units(b, unit)))
        assert (got.errors[row], got.substitutions[row], got.deletions[row], got.insertions[row]) == want, (a, b)
    assert got.length.tolist() == [len(speech.split_units(text, unit)) for text in said]
    assert got.rate == got.errors.sum() / got.length.sum()
    assert got.totals() == {
        "substitutions": got.substitutions.sum(),
        "deletions": got.deletions.sum(),
        "insertions": got.insertions.sum(),
        "length": got.length.sum(),
    }


@pytest.mark.parametrize("unit", ["words", "characters"])
def test_alignment_agrees_with_the_counts(unit):
    said, heard = corpus(200, seed=1)
    got = count_edits(said, heard, unit)
    for row, (a, b) in enumerate(zip(said, heard)):
        pairs = compare(a, b, unit)
        assert [x for x, _ in pairs if x] == speech.split_units(a, unit) and [y for _, y in pairs if y] == speech.split_units(
            b, unit
        )
        kinds = [(bool(x), bool(y)) for x, y in pairs if x != y]
        assert [kinds.count(k) for k in ((True, True), (True, False), (False, True))] == [
            got.substitutions[row],
            got.deletions[row],
            got.insertions[row],
        ]


def test_known_rates():
    assert wer(["the cat sat", "on"], ["the bat sat down", ""]) == 3 / 4
    assert cer(["abc  d"], ["abd d"]) == 1 / 5  # spaces count, once
    assert wer(["a b"], ["c d e f g"]) == 2.5
    assert compare("the cat sat", "cat sits down") == [("the", ""), ("cat", "cat"), ("", "sits"), ("sat", "down")]
    assert count_edits(["a b c"], ["b x"]).totals() == {"substitutions": 1, "deletions": 1, "insertions": 0, "length": 3}
    assert count_edits([], []).errors.shape == (0,) and count_edits(["", "a"], ["", "a"]).rate == 0


def test_invalid_inputs_are_rejected():
    with pytest.raises(DataError, match="2 reference transcripts but 1"):
        wer(["a", "b"], ["a"])
    with pytest.raises(DataError, match="error rate is undefined"):
        wer([""], ["a"])


def test_large_corpus_is_fast():
    """3,000 sentences of 20 words, 100 characters: a Python table for each would take minutes."""
    rng = np.random.default_rng(0)
    said = ["".join(row) for row in rng.choice(list("abcdefgh "), (3_000, 100))]
    heard = ["".join(row) for row in rng.choice(list("abcdefgh "), (3_000, 100))]
    started = time.perf_counter()
    assert 0.5 < cer(said, heard) < 1 and 0.5 < wer(said, heard) < 1.2
    assert time.perf_counter() - started < 20

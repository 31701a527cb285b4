"""BLEU and CIDEr-D of captions: against sacreBLEU, and against a slow computation over vectors of all n-grams."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from fieldguide.metrics.captions import compute_bleu, count_matches, score_captions
from fieldguide.metrics.rouge import split_words


def album(count=30, seed=0):
    """Return random texts of a few words with one to four references each; some share much, some nothing."""
    rng = np.random.default_rng(seed)
    words = "a red blue green cat dog bird sits runs on under the mat tree".split()
    write = lambda: " ".join(rng.choice(words, rng.integers(1, 12)))
    references = [[write() for _ in range(rng.integers(1, 5))] for _ in range(count)]
    said = [
        " ".join(w for w in known[0].split() if rng.random() < 0.8) if rng.random() < 0.7 else write() for known in references
    ]
    return said, references


@pytest.mark.parametrize("seed", [0, 1])
def test_bleu_equals_sacrebleu(seed):
    said, references = album(seed=seed)
    counts, _ = score_captions(said, references)
    streams = [[known[i] if i < len(known) else None for known in references] for i in range(4)]
    for order in (1, 2, 3, 4):
        theirs = BLEU(tokenize="none", smooth_method="none", max_ngram_order=order, force=True)
        assert compute_bleu(counts.sum(0), order) == pytest.approx(theirs.corpus_score(said, streams).score, abs=1e-9)
    assert 5 < compute_bleu(counts.sum(0)) < 95


def slow_cider(said, references):
    """Compute CIDEr-D with dense vectors: one element for each n-gram of all texts (equations 1 to 3; section 5: clipping and
    the penalty of lengths with sigma = 6, times 10)."""
    grams = lambda words, n: [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    mine, known = [text.split() for text in said], [[t.split() for t in texts] for texts in references]
    total = np.zeros(len(said))
    for n in (1, 2, 3, 4):
        every = sorted({g for texts in known for t in texts for g in grams(t, n)} | {g for t in mine for g in grams(t, n)})
        place = {gram: i for i, gram in enumerate(every)}
        documents = np.zeros(len(every))
        for texts in known:
            for gram in {g for t in texts for g in grams(t, n)}:
                documents[place[gram]] += 1
        rarity = np.log(len(said) / np.maximum(documents, 1))

        def vector(words, n=n, place=place, rarity=rarity):
            x = np.zeros(len(place))
            for gram in grams(words, n):
                x[place[gram]] += 1
            return x * rarity

        for row, (words, texts) in enumerate(zip(mine, known)):
            for other in texts:
                a, b = vector(words), vector(other)
                size = np.linalg.norm(a) * np.linalg.norm(b)
                penalty = math.exp(-((len(words) - len(other)) ** 2) / 72)
                total[row] += 10 * penalty * (np.minimum(a, b) @ b) / size / len(texts) / 4 if size else 0
    return total


@pytest.mark.parametrize("seed", [0, 1])
def test_cider_equals_a_slow_computation(seed):
    said, references = album(seed=seed)
    found = score_captions(said, references)[1]
    np.testing.assert_allclose(found, slow_cider(said, references), rtol=1e-12, atol=1e-12)
    assert found.min() >= 0 and found.max() <= 10 + 1e-9 and found.std() > 0.5


def test_perfect_and_empty_captions():
    references = [["A red cat sits here."], ["two dogs run fast today", "dogs"], ["one bird flies over trees"]]
    counts, cider = score_captions(
        ["a red cat, sits HERE", "Two dogs run fast today!", "one bird flies over trees"], references
    )
    assert compute_bleu(counts.sum(0)) == pytest.approx(100) and cider[0] == pytest.approx(10), "case and marks do not count"
    counts, cider = score_captions(["", "", ""], references)
    assert compute_bleu(counts.sum(0)) == 0 and not cider.any()
    repeated, once = (
        score_captions(["cat " * 9, "x", "y"], references)[1][0],
        score_captions(["cat", "x", "y"], references)[1][0],
    )
    assert repeated < once, "repetition is clipped and its length punished"


def test_length_of_the_closest_reference():
    words = [text.split() for text in ("a b c d", "a b c d e f", "a b")]
    assert count_matches([words[0]], [words[1:]])[0, 9] == 2, "of equally close lengths the shorter one counts"
    assert split_words("一只猫 sits") == ["一", "只", "猫", "sits"]

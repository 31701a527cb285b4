"""ROUGE by hand and compared with Google's package."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fieldguide.metrics.rouge import ROUGE_NAMES, rouge_l, rouge_n, score_texts, split_words


def test_by_hand():
    right, said = "police killed the gunman".split(), "police kill the gunman".split()  # Lin 2004, section 3.1
    assert rouge_l(said, right) == 3 / 4 and rouge_l("the gunman kill police".split(), right) == 1 / 2
    assert rouge_n(said, right, 1) == 3 / 4 and rouge_n(said, right, 2) == 1 / 3
    assert rouge_n(["a", "a", "a"], ["a", "a", "b"], 1) == 2 / 3  # as often as both have it
    assert rouge_l("a b c d".split(), "c a x b".split()) == 2 / 4
    assert score_texts(["", "x"], ["x", ""]).tolist() == [[0.0] * 3] * 2 and score_texts([], []).shape == (0, 3)
    assert split_words("It's 3,000 U.S. dollars_ägypten!") == ["it", "s", "3", "000", "u", "s", "dollars", "ägypten"]
    assert split_words("我喜欢 PyTorch2。猫が好き") == [*"我喜欢", "pytorch2", *"猫が好き"]


def test_equals_google():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(list(ROUGE_NAMES))
    rng = random.Random(0)
    some = ["the", "cat", "Cat", "sat", "on", "a-mat", "3.5", "it's", "U.S.", "end", "x_y"]
    text = lambda: " ".join(rng.choices(some, k=rng.randint(0, 25))) + rng.choice(["", ".", "!\n"])
    pairs = [[text(), text()] for _ in range(300)]
    want = [[scorer.score(right, said)[kind].fmeasure for kind in ROUGE_NAMES] for said, right in pairs]
    np.testing.assert_allclose(score_texts(*zip(*pairs)), want, rtol=1e-12, atol=1e-15)
    assert 0.2 < np.mean(want) < 0.8

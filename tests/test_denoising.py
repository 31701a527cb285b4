"""Corruption of texts: examples by hand, reconstruction, and the fractions and lengths of the papers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from fieldguide.objectives import denoising
from fieldguide.objectives.denoising import apply_infilling, corrupt_spans, sample_infill_masks, sample_partitions, sample_spans

SENTINELS = np.arange(99, 79, -1)  # as T5's: the first is the highest number


def test_t5_example_of_the_paper():
    """Figure 2 of T5: two spans with a sentinel each; the target ends with one more."""
    # Thank you [for inviting] me to your party [last] week.
    tokens = np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 3, 0, 0, 0, 0, 0, 0, 0]])
    span = np.array([[0, 0, 1, 1, 0, 0, 0, 0, 2, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]])
    source, mask, target = corrupt_spans(tokens, span, np.array([10, 3]), SENTINELS, end=50, pad=0)
    assert source.tolist() == [[1, 2, 99, 5, 6, 7, 8, 98, 10, 50], [1, 99, 3, 50, 0, 0, 0, 0, 0, 0]]
    assert mask.sum(1).tolist() == [10, 4] and mask[1].tolist() == [True] * 4 + [False] * 6
    assert target.tolist() == [[99, 3, 4, 98, 9, 97, 50], [99, 2, 98, 50, -1, -1, -1]]


def test_adjacent_spans_are_separate():
    source, _, target = corrupt_spans(np.array([[1, 2, 3, 4]]), np.array([[0, 1, 2, 2]]), np.array([4]), SENTINELS, 50, 0)
    assert source.tolist() == [[1, 99, 98, 50]] and target.tolist() == [[99, 2, 98, 3, 4, 97, 50]]
    with pytest.raises(ValueError, match="2 spans in a row need 3 sentinels, but the tokenizer has 2"):
        corrupt_spans(np.array([[1, 2, 3, 4]]), np.array([[0, 1, 2, 2]]), np.array([4]), SENTINELS[:2], 50, 0)


def test_partitions_are_uniform_and_sum_to_the_total():
    rng = np.random.default_rng(0)
    found = sample_partitions(np.full(12_000, 5), np.full(12_000, 3), rng)
    assert (found.sum(1) == 5).all() and (found >= 1).all()
    kinds, counts = np.unique(found, axis=0, return_counts=True)
    assert len(kinds) == 6 and abs(counts / 2000 - 1).max() < 0.1  # 4 choose 2
    mixed = sample_partitions(np.array([7, 1, 4, 9]), np.array([2, 1, 4, 1]), rng)
    assert mixed.sum(1).tolist() == [7, 1, 4, 9] and (mixed > 0).sum(1).tolist() == [2, 1, 4, 1]


def test_fraction_and_length_of_spans():
    lengths = np.concatenate([np.full(500, 512), np.arange(0, 200)])
    span = sample_spans(lengths, 512, np.random.default_rng(0))
    real = np.arange(512)[None] < lengths[:, None]
    assert not span[~real].any() and (span[:500] > 0).sum(1).tolist() == [77] * 500 and (span[:500].max(1) == 26).all()
    gone, count = (span > 0).sum(1), span.max(1)
    want = np.clip(np.round(lengths * 0.15), 1, np.maximum(lengths - 1, 0))
    assert gone.tolist() == want.tolist() and not gone[500:502].any() and (gone[502:] > 0).all()
    # Spans are numbered from left to right, a token at least between two; the first token stays, the last real one is gone.
    for row, length in zip(span, lengths):
        if length < 2:
            continue
        runs = [k for k, before in zip(row, [0, *row]) if k and k != before]
        assert runs == list(range(1, len(runs) + 1)) and row[0] == 0 and row[length - 1] == len(runs)
        assert all(a == b or 0 in (a, b) for a, b in pairwise(row))
    assert 2.9 < (gone[:500] / count[:500]).mean() < 3.1
    assert len({tuple(row) for row in span[:500]}) == 500


def test_corrupted_row_and_target_contain_the_text():
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 60, 200)
    tokens = np.where(np.arange(60)[None] < lengths[:, None], rng.integers(1, 50, (200, 60)), 0)
    source, mask, target = corrupt_spans(tokens, sample_spans(lengths, 60, rng), lengths, SENTINELS, 50, 0)
    for i in range(200):
        said: dict[int, list[int]] = {}
        for t in target[i][target[i] >= 0][:-1]:
            said.setdefault(t, []) if t > 50 else said[list(said)[-1]].append(t)
        text = [t for s in source[i][mask[i]][:-1] for t in (said[s] if s > 50 else [s])]
        assert text == tokens[i, : lengths[i]].tolist() and target[i][target[i] >= 0][-1] == source[i][mask[i]][-1] == 50


class Fixed:
    """A random generator with given results."""

    def __init__(self, lengths, order):
        self.lengths, self.order = lengths, order

    def poisson(self, mean, shape):
        assert mean == denoising.BART_INFILLING[1]
        return np.broadcast_to(np.array(self.lengths)[: shape[1]], shape).copy()

    def random(self, shape):
        lot = np.ones(shape)
        lot[:, self.order] = np.linspace(0, 0.5, len(self.order))
        return lot


def test_infilling_by_hand():
    tokens, size = np.arange(1, 11)[None], np.array([10])
    cut = lambda lengths, order, share: sample_infill_masks(size, 10, Fixed(lengths, order), share)
    row = lambda *how: apply_infilling(tokens, size, 77, 0, *cut(*how))[0][0].tolist()
    assert row([2, 1, 9], [3, 7, 0], 0.3) == [1, 2, 3, 77, 6, 7, 77, 9, 10]
    assert row([0, 3, 9], [5, 0, 9], 0.3) == [77, 4, 5, 77, 6, 7, 8, 9, 10]  # nothing is lost where 77 stands alone
    assert row([9, 9, 9], [2, 0, 1], 0.3) == [1, 2, 77, 6, 7, 8, 9, 10]  # cut to the share
    assert row([4, 1, 1, 1, 1], [2, 4, 9, 0, 1], 0.5) == [1, 2, 77, 77, 6, 7, 8, 9, 10]  # one begins inside another


def test_infilling_keeps_order_and_fraction():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([np.full(300, 200), [0, 1, 2, 5]])
    tokens = np.where(np.arange(200)[None] < lengths[:, None], np.arange(1, 201)[None], 0)
    begins, gone = sample_infill_masks(lengths, 200, rng)
    source, mask = apply_infilling(tokens, lengths, 999, 0, begins, gone)
    assert (source[~mask] == 0).all()
    for row, real, length in zip(source, mask, lengths):
        kept = row[real & (row != 999)]
        assert (np.diff(kept) > 0).all() and (kept >= 1).all() and (kept <= length).all()
    for row, real, own, at in zip(source, mask, tokens, gone):
        assert set(own[at]) == set(own[own > 0]) - set(row[real])  # what is gone is what is to be found out
    lost = 1 - (mask & (source != 999))[:300].sum(1) / 200
    assert 0.22 < lost.mean() < 0.3 and lost.max() <= 0.3 + 1e-9
    marks = (source[:300] == 999).sum(1)
    assert 17 < marks.mean() < 24  # 60 tokens in spans of 3
    assert not mask[300].any() and mask[301].sum() == 1

"""Metrics of rankings with known relevant items: recall, reciprocal rank, NDCG and average precision.

Ties are broken against the ranking: a wrong item with the same score as a relevant one comes first.
"""

from __future__ import annotations

import numpy as np

CHUNK = 1000  # queries that are compared with all candidates at once
CUTOFF = 10  # of reciprocal rank and NDCG


def rank_relevant(
    queries: np.ndarray, candidates: np.ndarray, pairs: np.ndarray, banned: np.ndarray | None = None
) -> np.ndarray:  # Q D, C D, N 2 -> N
    """Return the rank of each relevant candidate among all candidates by dot product: 1 is the best.

    `pairs` holds distinct pairs (query, relevant candidate), `banned` pairs that are left out, such as a query that is itself
    a candidate.
    """
    ranks = np.zeros(len(pairs), dtype=np.int64)
    for first in range(0, len(queries), CHUNK):
        scores = queries[first : first + CHUNK] @ candidates.T
        mine = (pairs[:, 0] >= first) & (pairs[:, 0] < first + CHUNK)
        if mine.any():
            left_out = [] if banned is None else [(q - first, c) for q, c in banned if first <= q < first + CHUNK]
            for query, candidate in left_out:
                scores[query, candidate] = -np.inf
            ranks[mine] = rank_scores(scores, pairs[mine] - (first, 0))
    return ranks


def rank_scores(scores: np.ndarray, pairs: np.ndarray) -> np.ndarray:  # Q C, N 2 -> N
    """Return the rank of each relevant candidate of a matrix of scores. `pairs` holds distinct pairs (query, candidate)."""
    relevant = np.zeros(scores.shape, dtype=bool)
    relevant[pairs[:, 0], pairs[:, 1]] = True
    wrong = np.sort(np.where(relevant, -np.inf, scores), axis=1)
    ranks = np.zeros(len(pairs), dtype=np.int64)
    own = scores[pairs[:, 0], pairs[:, 1]]
    order = np.lexsort((np.arange(len(pairs)), -own, pairs[:, 0]))
    before = -1
    place = 0
    for i in order:
        query = pairs[i, 0]
        place = 0 if query != before else place + 1
        before = query
        ranks[i] = 1 + place + scores.shape[1] - np.searchsorted(wrong[query], own[i], "left")
    return ranks


def rank_groups(group: np.ndarray, scores: np.ndarray, relevance: np.ndarray) -> np.ndarray:  # N, N, N -> N
    """Return the rank of each row among the rows of its group by descending score."""
    order = np.lexsort((relevance, -scores, group))
    starts = np.r_[True, np.diff(group[order]) != 0]
    first = np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order)) - first + 1
    return ranks


def score_queries(
    query: np.ndarray, rank: np.ndarray, gain: np.ndarray | None = None, recalls: tuple[int, ...] = (1, 5, 10)
) -> dict[str, np.ndarray]:
    """Return the metrics of each query with a relevant item, from one entry for each relevant item of a query.

    `rank` is the rank of the item, `gain` its relevance (1 by default). The metrics are `recall_K`, the fraction of the relevant
    items among the first K; `mrr_10`, the reciprocal rank of the first relevant item if it is at most 10 (Craswell 2009);
    `ndcg_10` (Järvelin and Kekäläinen 2002, doi:10.1145/582415.582418, gains as they are); `map`, the mean over relevant items of
    the precision at their rank (Manning et al. 2008, section 8.4).
    """
    _, code, count = np.unique(query, return_inverse=True, return_counts=True)
    gain = np.ones(len(rank)) if gain is None else gain
    total = lambda values: np.bincount(code, values, minlength=len(count))
    found = {f"recall_{k}": total(rank <= k) / count for k in recalls}
    best = np.full(len(count), np.iinfo(np.int64).max)
    np.minimum.at(best, code, rank)
    found["mrr_10"] = np.where(best <= CUTOFF, 1 / best, 0)
    discounted = np.where(rank <= CUTOFF, gain / np.log2(1 + rank.astype(np.float64)), 0)
    ideal_place = rank_groups(code, gain, np.zeros(len(gain)))
    ideal = np.where(ideal_place <= CUTOFF, gain / np.log2(1 + ideal_place.astype(np.float64)), 0)
    found["ndcg_10"] = total(discounted) / total(ideal)
    among_relevant = rank_groups(code, -rank.astype(np.float64), np.zeros(len(gain)))
    found["map"] = total(among_relevant / rank) / count
    return found


def resample_means(values: dict[str, np.ndarray], repeats: int = 300) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of the mean of each metric by resampling queries (Efron 1979; percentile method)."""
    rng, count = np.random.default_rng(0), len(next(iter(values.values())))
    drawn = [rng.integers(0, count, count) for _ in range(repeats)]
    return {
        name: tuple(np.percentile([each[rows].mean() for rows in drawn], [2.5, 97.5]).tolist()) for name, each in values.items()
    }

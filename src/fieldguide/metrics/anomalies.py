"""Scores of anomaly detection, from the anomaly score of each example. Every example counts once: there is no adjustment that
counts a whole stretch as found if one of its points is (Kim et al. 2021, arXiv:2109.05257, show that random scores then look good).
"""

from __future__ import annotations

import numpy as np

THRESHOLDS = 1000  # at which pixels are counted


def average_precision(score: np.ndarray, is_anomaly: np.ndarray) -> float:
    """Return the mean precision at each anomaly, in order of score (equal scores are one step); NaN without both kinds."""
    if not is_anomaly.any() or is_anomaly.all():
        return float("nan")
    hits, flagged = count_at_thresholds(score, is_anomaly)
    return float(np.sum(np.diff(np.append(0, hits)) / is_anomaly.sum() * hits / flagged))


def roc_auc(score: np.ndarray, is_anomaly: np.ndarray) -> float:
    """Return the chance that an anomaly has a higher score than a normal example, ties counting one half."""
    if not is_anomaly.any() or is_anomaly.all():
        return float("nan")
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = ((last - counts + 1 + last) / 2)[place]
    n = int(is_anomaly.sum())
    return float((ranks[is_anomaly].sum() - n * (n + 1) / 2) / (n * (len(score) - n)))


def best_f1(score: np.ndarray, is_anomaly: np.ndarray) -> float:
    """Return the largest F1 of all thresholds. Which threshold that is cannot be known without the labels."""
    if not is_anomaly.any() or is_anomaly.all():
        return float("nan")
    hits, flagged = count_at_thresholds(score, is_anomaly)
    return float((2 * hits / (flagged + is_anomaly.sum())).max())


def count_at_thresholds(score: np.ndarray, is_anomaly: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many anomalies, and how many examples, have at least each distinct score, from the highest on."""
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    return np.cumsum(is_anomaly[order])[ends], ends + 1


def choose_threshold(normal: np.ndarray, rate: float) -> float:
    """Return the threshold that a new normal example exceeds with at most the given chance, if it is exchangeable with these.

    It is the k-th smallest of n scores with k = ceil((n + 1) (1 - rate)) (Vovk et al. 2005), or a little above the largest if n is
    too small for the rate.
    """
    ordered = np.sort(normal)
    k = int(np.ceil((len(ordered) + 1) * (1 - rate)))
    top = float(ordered[min(k, len(ordered)) - 1])
    return max(top, 1e-12) if k <= len(ordered) else max(1.05 * top, 1e-12)


def count_by_threshold(maps: np.ndarray, is_anomaly: np.ndarray, is_known: np.ndarray) -> np.ndarray:  # N H W each -> N 2 T
    """Return how many normal pixels and pixels of anomalies of each image have a score between two neighboring thresholds.

    Thresholds are quantiles of both kinds of pixels; the area under the ROC curve from these counts differs from that of all pixels
    by less than 0.001.
    """
    levels = np.linspace(0, 1, THRESHOLDS // 2)
    kinds = [maps[is_known & ~is_anomaly], maps[is_known & is_anomaly]]
    edges = np.unique(np.concatenate([np.quantile(values, levels) for values in kinds if len(values)] or [[0.0]]))
    counts = np.zeros((len(maps), 2, len(edges) + 1), dtype=np.int32)
    for i, (values, wrong, known) in enumerate(zip(maps, is_anomaly, is_known)):
        for kind, which in enumerate((known & ~wrong, known & wrong)):
            counts[i, kind] = np.bincount(np.searchsorted(edges, values[which], "right"), minlength=len(edges) + 1)
    return counts


def roc_auc_of_counts(counts: np.ndarray) -> float:  # 2 T, normal and anomalous
    """Return the area under the ROC curve from counts between thresholds, in ascending order; equal places count one half."""
    normal, anomalous = counts
    if not normal.sum() or not anomalous.sum():
        return float("nan")
    below = np.cumsum(normal) - normal
    return float((anomalous * (below + normal / 2)).sum() / (normal.sum() * anomalous.sum()))

"""Scores of anomaly detection, from the anomaly score of each example. Every example counts once: there is no adjustment that
counts a whole stretch as found if one of its points is (Kim et al. 2021, arXiv:2109.05257, show that random scores then look good).
"""

from __future__ import annotations

import numpy as np


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

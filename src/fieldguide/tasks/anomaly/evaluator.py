"""Scores of anomaly detection: ranking of the examples, alarms at the threshold, and detectors without a network."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from fieldguide.metrics.anomalies import average_precision, best_f1, choose_threshold, roc_auc
from fieldguide.tasks.evaluator import Arrays, Baseline, Evaluator, bootstrap_intervals
from fieldguide.tasks.spec import Metric

NEIGHBORS = 5
MAX_REFERENCE_ROWS = 5000  # training rows of the baselines, drawn at random
TREES = 100
NEED_ANOMALIES = ("average_precision", "auc", "best_f1", "f1", "detected")  # scores that are undefined without any
UNDEFINED = (float("nan"), float("nan"))
MIN_STRETCHES = 3  # with anomalies, from which on resampling stretches gives an interval
KEPT_SCORES = 1000  # quantiles of the normal validation scores that are stored, for thresholds of other rates


class AnomalyEvaluator(Evaluator):
    """Scores `score` B, where 1 is the threshold, against `label` (1 anomaly, 0 normal, -1 unknown).

    Without labels, only the reconstruction error and the fraction of alarms are known.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("average_precision", "max", "mean precision over the anomalies, ranked", label="average precision"),
        Metric("auc", "max", "chance that an anomaly ranks above a normal example", label="AUC"),
        Metric("best_f1", "max", "largest F1 of all thresholds, chosen with the labels", label="best F1"),
        Metric("f1", "max", "F1 at the threshold of the stated false-alarm rate", label="F1"),
        Metric("detected", "max", "of anomalies above the threshold", percent=True, label="detected"),
        Metric(
            "false_alarms", "near the stated rate", "of normal examples above the threshold", percent=True, label="false alarms"
        ),
        Metric("alarms", "near the stated rate", "of all examples above the threshold", percent=True),
        Metric("reconstruction", "min", "mean squared error of normal examples", label="reconstruction error"),
    )
    monitor: ClassVar[str] = "reconstruction"  # what is known without labels
    options: Any
    scale: list[float]  # mean error of each feature on normal validation rows
    normal_scores: list[float]  # quantiles of the scores of these rows
    is_labeled: bool

    def rank(self, errors: np.ndarray) -> np.ndarray:  # B F -> B
        """Return the mean error over features, each relative to what is usual for it."""
        return (errors.astype(np.float64) / np.array(self.scale)).mean(1)

    def find_threshold(self, rate: float | None = None) -> float:
        """Return the score that a normal example exceeds with the stated chance."""
        return choose_threshold(np.array(self.normal_scores), rate or self.options.false_alarms)

    def calibrate(self, outputs: Arrays, targets: Arrays) -> None:
        """Fit the scale of each feature and the threshold on validation rows that are not known to be anomalies."""
        errors = outputs["errors"][targets["label"] != 1].astype(np.float64)
        self.scale = np.maximum(errors.mean(0), 1e-6).tolist()
        scores = np.sort(self.rank(errors))
        at = np.linspace(0, len(scores) - 1, min(len(scores), KEPT_SCORES)).round().astype(int)
        self.normal_scores = scores[at].tolist()

    def postprocess(self, outputs: Arrays) -> Arrays:
        return {**outputs, "score": self.rank(outputs["errors"]) / self.find_threshold()}

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        label = targets["label"]
        known, is_anomaly = label >= 0, label == 1
        nan = float("nan")
        found = {m.name: nan for m in self.metrics}
        if "errors" in outputs:
            found[self.monitor] = float(outputs["errors"][~is_anomaly].mean()) if (~is_anomaly).any() else nan
        score = outputs["score"] if "score" in outputs else outputs["errors"].mean(1)
        if "score" in outputs:
            found["alarms"] = float((score >= 1).mean())
        if not known.any() or not self.is_labeled:
            return found
        score, is_anomaly = score[known], is_anomaly[known]
        found |= {
            "average_precision": average_precision(score, is_anomaly),
            "auc": roc_auc(score, is_anomaly),
            "best_f1": best_f1(score, is_anomaly),
        }
        if "score" in outputs:
            alarm = score >= 1
            hits = int((alarm & is_anomaly).sum())
            if is_anomaly.any():
                found["f1"] = 2 * hits / (alarm.sum() + is_anomaly.sum())
                found["detected"] = hits / is_anomaly.sum()
            if (~is_anomaly).any():
                found["false_alarms"] = float(alarm[~is_anomaly].mean())
        return {name: float(value) for name, value in found.items()}

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        """Return 95 % intervals from resampling examples, or, for steps of series, stretches of neighboring steps.

        Intervals of scores that need anomalies are undefined (NaN) if fewer than `MIN_STRETCHES` stretches have one.
        """
        block = targets.get("block")
        if block is None:
            return bootstrap_intervals(self, outputs, targets)
        _, block = np.unique(block, return_inverse=True)
        order = np.argsort(block, kind="stable")
        rows = np.split(order, np.flatnonzero(np.diff(block[order])) + 1)
        rng = np.random.default_rng(0)
        drawn = []
        for _ in range(100):
            chosen = np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])
            drawn.append(self.score({k: v[chosen] for k, v in outputs.items()}, {k: v[chosen] for k, v in targets.items()}))
        found: dict[str, tuple[float, float]] = {}
        for name in drawn[0]:
            values = np.array([scores[name] for scores in drawn])
            known = values[np.isfinite(values)]
            found[name] = tuple(np.quantile(known, [0.025, 0.975]).tolist()) if len(known) else UNDEFINED
        if sum(bool((targets["label"][some] == 1).any()) for some in rows) < MIN_STRETCHES:
            found |= dict.fromkeys(NEED_ANOMALIES, UNDEFINED)  # resamples of one event would all have its score
        return found

    def find_doubts(self, targets: Arrays) -> list[str]:
        label = targets["label"]
        if self.is_labeled and not (label == 1).any():
            return ["no row is an anomaly, so detection cannot be scored"]
        if not self.is_labeled:
            title = next(m.title for m in self.metrics if m.name == self.monitor)
            return [f"there are no labels: only the {title} and the fraction of alarms are known"]
        return []

    def detect(self, reference: np.ndarray, held: np.ndarray) -> list[Baseline]:  # N F, M F
        """Return detectors without a network, fitted on normal training rows. Their thresholds are quantiles of these rows."""
        from sklearn.ensemble import IsolationForest
        from sklearn.neighbors import NearestNeighbors

        rng = np.random.default_rng(0)
        if len(reference) > MAX_REFERENCE_ROWS:
            reference = reference[np.sort(rng.permutation(len(reference))[:MAX_REFERENCE_ROWS])]
        mean, std = reference.mean(0), reference.std(0)
        std = np.where(std > 1e-9, std, 1.0)
        largest = lambda x: np.abs((x - mean) / std).max(1)
        near = NearestNeighbors(n_neighbors=min(NEIGHBORS, len(reference) - 1)).fit((reference - mean) / std)
        own = near.kneighbors()[0][:, -1]  # without the row itself
        forest = IsolationForest(n_estimators=TREES, random_state=0).fit(reference)
        pairs = {
            "z-score": ("the largest deviation of a feature, in standard deviations", largest(reference), largest(held)),
            "nearest neighbors": (
                f"distance to the neighbor number {near.n_neighbors} among {len(reference):,} training rows",
                own,
                near.kneighbors((held - mean) / std)[0][:, -1],
            ),
            "isolation forest": (
                f"{TREES} random trees (Liu et al. 2008)",
                -forest.score_samples(reference),
                -forest.score_samples(held),
            ),
        }
        return [
            Baseline(name, what, {"score": of_held / choose_threshold(of_reference, self.options.false_alarms)})
            for name, (what, of_reference, of_held) in pairs.items()
        ]

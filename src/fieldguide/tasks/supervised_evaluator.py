"""Evaluators of tasks with one known target per example: scores of classes and of measurements, calibration, baselines."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax

from fieldguide.core.numbers import format_plain
from fieldguide.data.dataset import Data
from fieldguide.data.preprocessing import Standardizer
from fieldguide.tasks.evaluator import Arrays, Baseline, Evaluator
from fieldguide.tasks.spec import Metric

RARE_CLASS_SHARE = 0.2  # of the rarer of two classes; below it, accuracy says little
FREQUENT_CLASS_SHARE = 0.7  # of the most frequent of several classes; above it, accuracy says little
RANKING_METRICS = (
    "average_precision",
    "auc",
    "macro_f1",
)  # with these, the threshold of two classes is chosen on validation rows


class ClassificationEvaluator(Evaluator):
    """Scores probabilities against class codes.

    A code of -1 is a class that is not in the training data: the row counts as wrong, and as one further class of the scores
    over classes. Log loss and AUC are computed over the rows of known classes.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("accuracy", "max", "correct", percent=True),
        Metric("balanced_accuracy", "max", "mean recall over classes", percent=True),
        Metric("macro_f1", "max", "F1 averaged over classes", label="macro F1"),
        Metric("log_loss", "min", "nats per example"),
        Metric("auc", "max", "area under the ROC curve, one versus rest", label="AUC"),
        Metric(
            "average_precision", "max", "area under the precision-recall curve of the rarer class", label="average precision"
        ),
        Metric("calibration_error", "min", "mean gap between confidence and accuracy"),
    )

    labels: list[str]
    counts: list[int]  # of each class in the training rows
    metric: str = ""
    temperature: float = 1.0  # divisor of the logits, set by `calibrate`
    threshold: float | None = None  # of two classes: probability from which on the rarer one is predicted; None = one half

    @property
    def positive(self) -> int:
        """Return the rarer of two classes; of equally frequent ones, the second."""
        counts = getattr(self, "counts", ())  # an evaluator without training data has none
        return int(np.argmin(counts[::-1])) ^ 1 if len(counts) == 2 else -1

    def suggest_metric(self) -> tuple[str, str]:
        share = np.array(self.counts, dtype=float) / max(sum(self.counts), 1)
        if len(share) == 2 and share.min() < RARE_CLASS_SHARE:
            name, most = self.labels[self.positive], 100 * share.max()
            return "average_precision", (
                f"only {100 * share.min():.1f} % of the training rows are {name!r}, so accuracy says little: always predicting "
                f"{self.labels[1 - self.positive]!r} is {most:.1f} % correct"
            )
        if len(share) > 2 and share.max() > FREQUENT_CLASS_SHARE:
            name = self.labels[int(share.argmax())]
            return "macro_f1", f"{100 * share.max():.1f} % of the training rows are {name!r}, so accuracy says little"
        return "", ""

    def decide(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the predicted class of each row: the most probable one, or the rarer of two from the threshold on."""
        if self.threshold is None or len(self.labels) != 2:
            return probabilities.argmax(1)
        return np.where(probabilities[:, self.positive] >= self.threshold, self.positive, 1 - self.positive)

    def find_doubts(self, targets: Arrays) -> list[str]:
        present = np.unique(targets["label"])
        if len(targets["label"]) > 1 and len(present) == 1 and present[0] >= 0:
            return [
                f"all {len(targets['label']):,} rows have the class {self.labels[present[0]]!r}: always predicting it is 100 % correct, "
                "and balanced scores and AUC say nothing"
            ]
        return []

    def calibrate(self, outputs: Arrays, targets: Arrays) -> None:
        """Fit the temperature (Guo et al. 2017, arXiv:1706.04599, section 4.2), with a penalty that keeps it near 1 if
        rows are few.
        """
        known = targets["label"] >= 0
        if not known.any():
            return
        logits, y = np.log(np.clip(outputs["probabilities"][known].astype(np.float64), 1e-12, 1)), targets["label"][known]
        rows = np.arange(len(logits))

        def cost(log_temperature: float) -> float:
            scaled = logits / np.exp(log_temperature)
            return float((logsumexp(scaled, axis=1) - scaled[rows, y]).sum() + 4 * log_temperature**2)

        self.temperature = float(np.exp(minimize_scalar(cost, bounds=(-4, 4), method="bounded").x))
        self.threshold = None
        if self.metric in RANKING_METRICS and len(self.labels) == 2 and len(np.unique(y)) == 2:
            p = self.postprocess({"probabilities": outputs["probabilities"][known]})["probabilities"][:, self.positive]
            self.threshold = find_f1_threshold(p, y == self.positive)

    def postprocess(self, outputs: Arrays) -> Arrays:
        logits = np.log(np.clip(outputs["probabilities"].astype(np.float64), 1e-30, 1)) / self.temperature
        return {**outputs, "probabilities": softmax(logits, axis=1)}

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        p, y = outputs["probabilities"].astype(np.float64), targets["label"]
        guess = self.decide(p)
        right = guess == y
        known, present, f1, recall = y >= 0, np.unique(y), [], []
        for c in present:
            hits = np.sum(right & (y == c))
            recall.append(hits / np.sum(y == c))
            f1.append(2 * hits / (np.sum(y == c) + np.sum(guess == c)))
        return {
            "accuracy": float(right.mean()),
            "balanced_accuracy": float(np.mean(recall)),
            "macro_f1": float(np.mean(f1)),
            "log_loss": float(-np.log(np.clip(p[known, y[known]], 1e-12, 1)).mean()) if known.any() else float("nan"),
            "auc": roc_auc(p[known], y[known], present[present >= 0]),
            "average_precision": average_precision(p[known], y[known], self.positive),
            "calibration_error": calibration_error(p.max(1), p.argmax(1) == y),
        }

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        right = int((self.decide(outputs["probabilities"]) == targets["label"]).sum())
        return {**super().intervals(outputs, targets), "accuracy": binomial_interval(right, len(targets["label"]))}

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        frequencies = np.array(self.counts, dtype=float) / sum(self.counts)
        shown = np.tile(frequencies, (len(test), 1))
        name = self.labels[int(frequencies.argmax())]
        return [Baseline("majority class", f"always predicts {name!r}", {"probabilities": shown})]


class RegressionEvaluator(Evaluator):
    """Scores standardized predictions against targets in their own unit."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("rmse", "min", "root mean squared error", label="RMSE"),
        Metric("mae", "min", "mean absolute error", label="MAE"),
        Metric("r2", "max", "of the variance explained", percent=True, label="R²"),
    )

    standard: Standardizer

    def find_doubts(self, targets: Arrays) -> list[str]:
        values = targets["value"]
        if len(values) > 1 and np.ptp(values) == 0:
            return [f"all {len(values):,} targets are {format_plain(float(values[0]))}: the variance explained is undefined"]
        return []

    def to_target_unit(self, outputs: Arrays) -> np.ndarray:
        return self.standard.inverse(outputs["values"][:, 0])

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        guess, y = self.to_target_unit(outputs), targets["value"]
        spread = float(np.mean((y - y.mean()) ** 2))
        mse = float(np.mean((guess - y) ** 2))
        return {"rmse": mse**0.5, "mae": float(np.abs(guess - y).mean()), "r2": 1 - mse / spread if spread else float("nan")}

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        return [Baseline("mean", f"always predicts {format_plain(self.standard.mean)}", {"values": np.zeros((len(test), 1))})]


def binomial_interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    from scipy.stats import binomtest  # imported here because it takes half a second

    interval = binomtest(right, count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def roc_auc(p: np.ndarray, y: np.ndarray, present: np.ndarray) -> float:
    """Return the mean one-versus-rest area under the ROC curve over the classes that occur, computed from ranks."""
    if len(present) < 2:
        return float("nan")
    areas = []
    for c in present:
        order = p[:, c].argsort(kind="stable")
        _, place, counts = np.unique(p[order, c], return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        ranks = ((last - counts + 1 + last) / 2)[place]  # ties share their mean rank
        mine = (y == c)[order]
        n = mine.sum()
        areas.append((ranks[mine].sum() - n * (n + 1) / 2) / (n * (len(y) - n)))
    return float(np.mean(areas))


def average_precision(p: np.ndarray, y: np.ndarray, positive: int) -> float:
    """Return the mean precision at each row of a class, in order of probability (equal probabilities count as one step).

    Of two classes, that of the class `positive`; of more, the mean over the classes that occur (`positive` is -1).
    """
    classes = [positive] if positive >= 0 else np.unique(y)
    values = []
    for c in classes:
        hit = y == c
        if not hit.any() or hit.all():
            continue
        order = np.argsort(-p[:, c], kind="stable")
        ends = np.flatnonzero(np.append(np.diff(p[order, c]) != 0, True))
        found = np.cumsum(hit[order])[ends]
        values.append(float(np.sum(np.diff(np.append(0, found)) / hit.sum() * found / (ends + 1))))
    return float(np.mean(values)) if values else float("nan")


def find_f1_threshold(p: np.ndarray, positive: np.ndarray) -> float:
    """Return the threshold with the highest F1: halfway between the last probability that counts and the next one."""
    order = np.argsort(-p, kind="stable")
    falling = p[order]
    ends = np.flatnonzero(np.append(np.diff(falling) != 0, True))
    hits = np.cumsum(positive[order])[ends]
    best = int((2 * hits / (ends + 1 + positive.sum())).argmax())
    last = falling[ends[best]]
    following = falling[ends[best] + 1] if ends[best] + 1 < len(falling) else 0.0
    return float((last + following) / 2)


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Return the expected calibration error over equal-width bins (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[which == b].sum() - right[which == b].sum()) for b in np.unique(which)]
    return float(sum(gaps) / len(right))

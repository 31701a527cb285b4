"""Report builders of tasks with one known target per example: confusion, calibration, errors."""

from __future__ import annotations

from typing import Any

import numpy as np

from fieldguide.core.numbers import format_plain
from fieldguide.core.report_elements import Bars, Lines, Matrix, ReportElement, Scatter, Table
from fieldguide.data.dataset import Column, Data
from fieldguide.objectives import Objective
from fieldguide.tasks.evaluator import Arrays
from fieldguide.tasks.report_builder import ReportBuilder


class ClassificationReport(ReportBuilder):
    """Builds the confusion matrix, the scores by class, the calibration curve and the worst mistakes."""

    labels: list[str]

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        p, y = outputs["probabilities"], targets["label"]
        guess, classes = p.argmax(1), len(self.labels)
        known = y >= 0
        counts = np.bincount(y[known] * classes + guess[known], minlength=classes * classes).reshape(classes, classes)
        rows: list[tuple[Any, ...]] = []
        for c, label in enumerate(self.labels):
            said, is_ = int((guess == c).sum()), counts[c].sum()
            precision, recall = (counts[c, c] / said if said else float("nan")), (counts[c, c] / is_ if is_ else float("nan"))
            rows.append((label, int(is_), precision, recall, 2 * counts[c, c] / (said + is_) if said + is_ else float("nan")))
        if not known.all():
            rows.append(("(not in training)", int((~known).sum()), float("nan"), 0.0, 0.0))
        confidence, right = p.max(1), guess == y
        edges = np.unique(np.quantile(confidence, np.linspace(0, 1, 11)))
        bins = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, max(len(edges) - 2, 0))
        groups = [bins == b for b in range(len(edges)) if (bins == b).any()]
        calibration = Lines(
            "Calibration",
            "When the model is 80 % confident, is it correct 80 % of the time? The closer to the diagonal, "
            "the better. Each point is a tenth of the test examples.",
            x="confidence",
            y="share that is right",
            diagonal=True,
            lines={"this network": ([float(confidence[g].mean()) for g in groups], [float(right[g].mean()) for g in groups])},
        )
        return {
            "Errors": [
                Matrix("Confusion", "Rows are the true classes, columns the predicted classes.", self.labels, counts.tolist()),
                Table(
                    "By class",
                    "Precision: fraction of the predictions of a class that are correct. Recall: "
                    "fraction of a class that is predicted.",
                    ("class", "examples", "precision", "recall", "F1"),
                    rows,
                    heat=("precision", "recall", "F1"),
                ),
                *self.worst_mistakes(test, p, y),
            ],
            "Calibration": [calibration],
        }

    def worst_mistakes(self, test: Data, probabilities: np.ndarray, targets: np.ndarray) -> list[ReportElement]:
        """Return elements of the most confident mistakes."""
        return []

    def mistakes(self, probabilities: np.ndarray, targets: np.ndarray, most: int) -> list[tuple[int, str]]:
        """Return the wrongly predicted rows, most confident first, each with a caption."""
        names = [*self.labels, "a class that is not in the training data"]  # at -1
        wrong = np.flatnonzero(probabilities.argmax(1) != targets)
        order = wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")][:most]
        return [
            (
                int(i),
                f"is {names[targets[i]]}, predicted {self.labels[probabilities[i].argmax()]} "
                f"({100 * probabilities[i].max():.0f} % confident)",
            )
            for i in order
        ]


class RegressionReport(ReportBuilder):
    """Builds the scatter of predictions against targets, the histogram of errors and the worst rows."""

    columns: list[Column]

    @property
    def target(self) -> Column:
        """Return the target column; the preprocessor defines it."""
        raise NotImplementedError

    def to_target_unit(self, outputs: Arrays) -> np.ndarray:
        """Return predictions in the unit of the target; the evaluator defines it."""
        raise NotImplementedError

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        guess, y = self.to_target_unit(outputs), targets["value"]
        shown = np.random.default_rng(0).permutation(len(y))[:1500]
        size = np.histogram(guess - y, bins=21)
        centres = (size[1][1:] + size[1][:-1]) / 2
        worst = np.argsort(-np.abs(guess - y))[:12]
        columns = [c.name for c in self.columns if c.role == "feature"][:8]
        rows = [
            (
                test.locate_row(int(i)),
                *(test.rows[c][int(i)] for c in columns),
                float(y[i]),
                float(guess[i]),
                float(guess[i] - y[i]),
            )
            for i in worst
        ]
        return {
            "Errors": [
                Scatter(
                    "Prediction against target",
                    "Each point is a test row; points on the line are exact.",
                    x=f"true {self.target.name}",
                    y="predicted",
                    diagonal=True,
                    points=[(float(y[i]), float(guess[i])) for i in shown],
                ),
                Bars(
                    "Size of the errors",
                    "Number of test rows in each range of error.",
                    {format_plain(c): int(n) for c, n in zip(centres, size[0])},
                    unit="rows",
                ),
                Table(
                    "Worst rows", "The largest errors on the test rows.", ("row", *columns, "truth", "predicted", "error"), rows
                ),
            ]
        }

"""Report builders of tasks with one known target per example: confusion, calibration, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from torch import Tensor

from fieldguide.core.numbers import format_plain
from fieldguide.core.report_elements import (
    Bars,
    Gallery,
    Lines,
    Matrix,
    Picture,
    Quote,
    Quotes,
    ReportElement,
    Scatter,
    Table,
)
from fieldguide.data.dataset import Column, Data
from fieldguide.objectives import Objective
from fieldguide.tasks.analysis.context import ReportContext
from fieldguide.tasks.analysis.importance import build_importance
from fieldguide.tasks.analysis.occlusion import CELLS, MAX_PARTS, draw_weights, weigh_pixels, weigh_words
from fieldguide.tasks.analysis.thresholds import build_thresholds
from fieldguide.tasks.evaluator import Arrays
from fieldguide.tasks.report_builder import ReportBuilder
from fieldguide.tasks.spec import Metric

if TYPE_CHECKING:
    from fieldguide.tasks.evaluator import Evaluator
    from fieldguide.tasks.preprocessor import Preprocessor
    from fieldguide.tasks.supervised_evaluator import ClassificationEvaluator


MEDIA_KINDS = ("image", "audio", "video")
MAX_EXPLAINED = 6  # examples whose inputs are weighed, half of them mistakes
EXPLANATION_FRACTION = 0.4  # of the time of all analyses


class SupervisedReport(ReportBuilder):
    """Builds the importance of the columns."""

    metrics: ClassVar[tuple[Metric, ...]]
    main_metric: Callable[[], Metric]  # of the task

    def explain(self, context: ReportContext) -> list[ReportElement]:
        columns = [c for c in self.input_columns() if c.name in context.test.rows.columns]
        has_media = any(c.kind in MEDIA_KINDS for c in columns)
        return build_importance(cast("Evaluator", self), self.main_metric(), [c.name for c in columns], context, has_media)


class ClassificationReport(SupervisedReport):
    """Builds the confusion matrix, the scores by class, thresholds, the calibration curve, mistakes, and what they depend on."""

    labels: list[str]
    threshold: float | None
    decide: Callable[[np.ndarray], np.ndarray]  # of the evaluator

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        p, y = outputs["probabilities"], targets["label"]
        guess, classes = self.decide(p), len(self.labels)
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
            y="fraction correct",
            diagonal=True,
            lines={"this model": ([float(confidence[g].mean()) for g in groups], [float(right[g].mean()) for g in groups])},
        )
        c = cast("ClassificationEvaluator", self).positive
        thresholds = build_thresholds(p[known, c], y[known] == c, self.labels[c], self.threshold) if classes == 2 else []
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
                *self.show_predictions(test, p, y),
            ],
            **({"Thresholds": thresholds} if thresholds else {}),
            "Calibration": [calibration],
        }

    def show_predictions(self, test: Data, probabilities: np.ndarray, targets: np.ndarray) -> list[ReportElement]:
        """Return the most confident mistakes next to random correct predictions."""
        return []

    def explain(self, context: ReportContext) -> list[ReportElement]:
        p, y = context.outputs["probabilities"], context.targets["label"]
        kinds = {c.kind: c for c in reversed(self.input_columns()) if c.name in context.test.rows.columns}
        rows = self.choose_explained(p, y)
        shown: list[ReportElement] = []
        if "text" in kinds:
            shown += self.weigh_texts(context, kinds["text"].name, rows)
        if "image" in kinds:
            shown += self.weigh_images(context, rows)
        return [*shown, *super().explain(context)]

    def choose_explained(self, probabilities: np.ndarray, targets: np.ndarray) -> list[int]:
        """Return the most confident mistakes and random correct rows."""
        wrong = [row for row, _ in self.mistakes(probabilities, targets, MAX_EXPLAINED // 2)]
        return [*wrong, *self.correct(probabilities, targets, MAX_EXPLAINED - len(wrong))]

    def weigh_texts(self, context: ReportContext, column: str, rows: Sequence[int]) -> list[ReportElement]:
        """Return texts with the words that speak for and against the prediction."""
        deadline, quotes = context.deadline.part(EXPLANATION_FRACTION), []
        p, y = context.outputs["probabilities"], context.targets["label"]
        for row in rows:
            if deadline.is_over or context.seconds_per_example * MAX_PARTS > deadline.left:
                break
            predict = lambda data: context.predict(data)["probabilities"]
            weights = weigh_words(predict, context.test, column, row, int(p[row].argmax()))
            quotes.append(
                Quote(
                    context.test.rows[column][row] or "",
                    self.describe(p, y, row),
                    self.decide(p[row : row + 1])[0] != y[row],
                    weights,
                )
            )
        note = (
            "Blue words speak for the predicted class: its probability falls without them. Orange words speak against it. "
            "Mistakes first."
        )
        return [Quotes("Words that matter", note, quotes)] if any(quote.weights for quote in quotes) else []

    def weigh_images(self, context: ReportContext, rows: Sequence[int]) -> list[ReportElement]:
        """Return images with the parts that speak for and against the prediction."""
        deadline, pictures = context.deadline.part(EXPLANATION_FRACTION), []
        p, y = context.outputs["probabilities"], context.targets["label"]
        for row in rows:
            if deadline.is_over or context.seconds_per_example * CELLS**2 > 2 * deadline.left:
                break
            batch = context.make_batch(context.test.take([row]))
            name = "image" if "image" in batch else "vector"
            image = batch[name][0] if name == "image" else batch[name][0].view(*self.image_shape())

            def predict(variants: Tensor, batch: dict[str, Tensor] = batch, name: str = name) -> np.ndarray:
                repeated = {k: t.expand(len(variants), *t.shape[1:]) for k, t in batch.items()}
                return context.predict_batch({**repeated, name: variants if name == "image" else variants.flatten(1)})[
                    "probabilities"
                ]

            weights = weigh_pixels(predict, image, int(p[row].argmax()))
            plain, colored = draw_weights(image, weights)
            caption = self.describe(p, y, row)
            pictures.append(
                Picture(
                    plain,
                    caption,
                    bool(self.decide(p[row : row + 1])[0] != y[row]),
                    view="image",
                    views={"what matters": colored},
                )
            )
        note = (
            "Blue parts speak for the predicted class: its probability falls if they are hidden. Orange parts speak against it. "
            "Mistakes first."
        )
        return [Gallery("Parts that matter", note, pictures)] if pictures else []

    def image_shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of an image that the network reads as a vector."""
        dims = cast("Preprocessor", self).model_dims()
        return dims["channels"], dims["image"], dims["image"]

    def describe(self, probabilities: np.ndarray, targets: np.ndarray, row: int) -> str:
        """Return the caption of a row."""
        names = [*self.labels, "a class that is not in the training data"]  # at -1
        guess = int(self.decide(probabilities[row : row + 1])[0])
        said = f"{self.labels[guess]} ({100 * probabilities[row, guess]:.0f} % confident)"
        return said if guess == targets[row] else f"is {names[targets[row]]}, predicted {said}"

    def correct(self, probabilities: np.ndarray, targets: np.ndarray, most: int) -> list[int]:
        """Return random correctly predicted rows."""
        right = np.flatnonzero(self.decide(probabilities) == targets)
        return [int(i) for i in np.random.default_rng(0).permutation(right)[:most]]

    def mistakes(self, probabilities: np.ndarray, targets: np.ndarray, most: int) -> list[tuple[int, str]]:
        """Return the wrongly predicted rows, most confident first, each with a caption."""
        wrong = np.flatnonzero(self.decide(probabilities) != targets)
        order = wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")][:most]
        return [(int(i), self.describe(probabilities, targets, int(i))) for i in order]


class RegressionReport(SupervisedReport):
    """Builds the scatter of predictions against targets, the histogram of errors and the worst rows."""

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
        order = np.argsort(-np.abs(guess - y), kind="stable")
        columns = [c.name for c in self.input_columns()][:8]

        def list_rows(some: Iterable[int]) -> list[tuple[Any, ...]]:
            cells = lambda i: (test.rows[c][i] for c in columns)
            return [(test.locate_row(i), *cells(i), float(y[i]), float(guess[i]), float(guess[i] - y[i])) for i in some]

        header = ("row", *columns, "truth", "predicted", "error")
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
                Table("Worst rows", "The largest errors on the test rows.", header, list_rows(order[:8].tolist())),
                Table(
                    "Typical rows",
                    "Test rows whose errors are around the median.",
                    header,
                    list_rows(median_rows(order).tolist()),
                ),
            ]
        }


def median_rows(order: np.ndarray, count: int = 8) -> np.ndarray:
    """Return the rows in the middle of a ranking."""
    start = max(0, len(order) // 2 - count // 2)
    return order[start : start + count]

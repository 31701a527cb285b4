"""Base classes of tasks with one known target per example: classification and regression, their scores and charts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError, nearest
from fieldguide.core.report_elements import Bars, Exhibit, Lines, Matrix, Scatter, Table
from fieldguide.core.settings import Settings
from fieldguide.data.dataset import Column, Data
from fieldguide.data.preprocessing import Labels, Standardizer
from fieldguide.objectives import Classification, Objective, Regression, Supervised
from fieldguide.tasks.base import Arrays, Baseline, Metric, Task

MAX_LINEAR_BASELINE_ROWS = 20_000  # maximum rows for fitting the linear baseline; stated in its description


def is_discrete(column: Column) -> bool:
    """Return whether a target column holds classes rather than measurements."""
    return column.kind in ("category", "boolean", "identifier", "constant")


class SupervisedTask(Task):
    """A task with a target column."""

    output_types = ("label",)

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        return None if data.target else "a target column (name it with --target)"

    def read_one(self, source: Any, answered: bool) -> Data:
        data = super().read_one(source, answered)
        if answered and self.target.name not in data.rows.columns:
            raise DataError(
                f"{data.source}: evaluation needs the target column {self.target.name!r}, which is "
                f"missing.{nearest(self.target.name, data.rows.columns)} To predict without targets, use "
                "`fieldguide predict`."
            )
        return data

    def target_state(self) -> dict[str, Any]:
        """Return the fitted target information as JSON values, for `load_target_state`."""
        raise NotImplementedError

    def load_target_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def linear_features(self, train: Data, test: Data) -> tuple[Any, Any]:
        """Return the feature matrices of the linear baseline, fitted on the training rows."""
        raise NotImplementedError


class ClassificationTask(SupervisedTask):
    """A classification task."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("accuracy", "max", "correct", percent=True),
        Metric("balanced_accuracy", "max", "mean recall over classes", percent=True),
        Metric("macro_f1", "max", "F1 averaged over classes"),
        Metric("log_loss", "min", "nats per example"),
        Metric("auc", "max", "area under the ROC curve, one versus rest"),
        Metric("calibration_error", "min", "mean gap between confidence and accuracy"),
    )

    labels: list[str]
    counts: list[int]  # of each class in the training rows
    temperature: float = 1.0  # divisor of the logits, set by `calibrate`

    def fit_labels(self, data: Data) -> None:
        fitted = Labels.fit(data.rows[self.target.name])
        self.labels = list(fitted.names)
        self.counts = np.bincount(fitted.apply(data.rows[self.target.name]), minlength=len(fitted)).tolist()
        if len(self.labels) < 2:
            raise DataError(
                f"{data.source}: the training rows hold only one class, {self.labels[0]!r} in column "
                f"{self.target.name!r}. Add rows of another class."
            )

    def targets(self, data: Data) -> Arrays:
        values = data.rows[self.target.name]
        codes = Labels(tuple(self.labels)).apply(values)
        if (codes < 0).any():
            strange = sorted({str(v) for v in values.filter(pl.Series(codes < 0)).to_list()})
            raise DataError(
                f"{data.source}: column {self.target.name!r} has classes that are not in the training data: "
                f"{', '.join(map(repr, strange[:5]))}. Known classes: {', '.join(self.labels[:20])}. Correct or "
                "remove those rows."
            )
        return {"label": codes.copy()}  # polars returns read-only memory

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        weights = None
        if settings.class_weights:
            inverse = sum(self.counts) / (len(self.counts) * np.maximum(np.array(self.counts), 1))
            weights = inverse.tolist()
        return Supervised(model, card.inputs, Classification(settings.label_smoothing, weights))

    def preprocessing_state(self) -> dict[str, Any]:
        return {key: value for key, value in self.state().items() if key not in self.target_state()}

    def teacher_inputs(self, other: Task, card: Card) -> Callable[[dict[str, Any]], Sequence[Any]]:
        if self.labels != other.labels:
            raise SettingsError(
                f"the teacher's classes ({', '.join(other.labels[:10])}) differ from those of this data "
                f"({', '.join(self.labels[:10])}). They must be the same."
            )
        return super().teacher_inputs(other, card)

    def calibrate(self, outputs: Arrays, targets: Arrays) -> None:
        """Fit the temperature (Guo et al. 2017, arXiv:1706.04599, section 4.2), with a penalty that keeps it near 1 if
        rows are few.
        """
        logits = np.log(np.clip(outputs["probabilities"].astype(np.float64), 1e-12, 1))
        rows, y = np.arange(len(logits)), targets["label"]

        def cost(log_temperature: float) -> float:
            scaled = logits / np.exp(log_temperature)
            return float((logsumexp(scaled, axis=1) - scaled[rows, y]).sum() + 4 * log_temperature**2)

        self.temperature = float(np.exp(minimize_scalar(cost, bounds=(-1.5, 1.5), method="bounded").x))

    def postprocess(self, outputs: Arrays) -> Arrays:
        logits = np.log(np.clip(outputs["probabilities"].astype(np.float64), 1e-30, 1)) / self.temperature
        return {**outputs, "probabilities": softmax(logits, axis=1)}

    def target_state(self) -> dict[str, Any]:
        return {"labels": self.labels, "counts": self.counts, "temperature": self.temperature}

    def load_target_state(self, state: dict[str, Any]) -> None:
        self.labels, self.counts, self.temperature = state["labels"], state["counts"], state["temperature"]

    @staticmethod
    def label_state(names: list[str]) -> dict[str, Any]:
        """Return the target state of a task whose class names are known but not its training rows."""
        return {"labels": names, "counts": [0] * len(names), "temperature": 1.0}

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        p, y = outputs["probabilities"].astype(np.float64), targets["label"]
        guess = p.argmax(1)
        right = guess == y
        present, f1, recall = np.unique(y), [], []
        for c in present:
            hits = np.sum(right & (y == c))
            recall.append(hits / np.sum(y == c))
            f1.append(2 * hits / (np.sum(y == c) + np.sum(guess == c)))
        return {
            "accuracy": float(right.mean()),
            "balanced_accuracy": float(np.mean(recall)),
            "macro_f1": float(np.mean(f1)),
            "log_loss": float(-np.log(np.clip(p[np.arange(len(y)), y], 1e-12, 1)).mean()),
            "auc": roc_auc(p, y, present),
            "calibration_error": calibration_error(p.max(1), right),
        }

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        right = int((outputs["probabilities"].argmax(1) == targets["label"]).sum())
        return {**super().intervals(outputs, targets), "accuracy": binomial_interval(right, len(targets["label"]))}

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        p = outputs["probabilities"]
        return [
            {
                "label": self.labels[row.argmax()],
                "probability": float(row.max()),
                "probabilities": dict(zip(self.labels, map(float, row))),
            }
            for row in p
        ]

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        frequencies = np.array(self.counts, dtype=float) / sum(self.counts)
        shown = np.tile(frequencies, (len(test), 1))
        name = self.labels[int(frequencies.argmax())]
        return [Baseline("majority class", f"always predicts {name!r}", {"probabilities": shown}), self.logistic(train, test)]

    def logistic(self, train: Data, test: Data) -> Baseline:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        sample, note = subsample(train)
        x, x_test = self.linear_features(sample, test)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            y = self.targets(sample)["label"]
            fitted = LogisticRegression(max_iter=300).fit(x, y)
        probabilities = np.zeros((len(test), len(self.labels)))
        probabilities[:, fitted.classes_] = fitted.predict_proba(x_test)
        return Baseline("logistic regression", f"a linear model of the same inputs{note}", {"probabilities": probabilities})

    def exhibits(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[Exhibit]]:
        p, y = outputs["probabilities"], targets["label"]
        guess, classes = p.argmax(1), len(self.labels)
        counts = np.bincount(y * classes + guess, minlength=classes * classes).reshape(classes, classes)
        rows = []
        for c, label in enumerate(self.labels):
            said, is_ = counts[:, c].sum(), counts[c].sum()
            precision, recall = (counts[c, c] / said if said else float("nan")), (counts[c, c] / is_ if is_ else float("nan"))
            rows.append((label, int(is_), precision, recall, 2 * counts[c, c] / (said + is_) if said + is_ else float("nan")))
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

    def worst_mistakes(self, test: Data, probabilities: np.ndarray, targets: np.ndarray) -> list[Exhibit]:
        """Return exhibits of the most confident mistakes."""
        return []

    def mistakes(self, probabilities: np.ndarray, targets: np.ndarray, most: int) -> list[tuple[int, str]]:
        """Return the wrongly predicted rows, most confident first, each with a caption."""
        wrong = np.flatnonzero(probabilities.argmax(1) != targets)
        order = wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")][:most]
        return [
            (
                int(i),
                f"is {self.labels[targets[i]]}, predicted {self.labels[probabilities[i].argmax()]} "
                f"({100 * probabilities[i].max():.0f} % confident)",
            )
            for i in order
        ]


class RegressionTask(SupervisedTask):
    """A regression task. Targets are standardized for training; scores and predictions are in the target's unit."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("rmse", "min", "root mean squared error"),
        Metric("mae", "min", "mean absolute error"),
        Metric("r2", "max", "of the variance explained", percent=True),
    )

    standard: Standardizer

    def fit_scale(self, data: Data) -> None:
        self.standard = Standardizer.fit(self.values(data))

    def values(self, data: Data) -> np.ndarray:
        return data.rows[self.target.name].cast(pl.Float64).to_numpy()

    def targets(self, data: Data) -> Arrays:
        return {"value": self.values(data)}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return Supervised(model, card.inputs, Regression())

    def target_state(self) -> dict[str, Any]:
        return {"standard": self.standard.to_json()}

    def load_target_state(self, state: dict[str, Any]) -> None:
        self.standard = Standardizer.from_json(state["standard"])

    def to_target_unit(self, outputs: Arrays) -> np.ndarray:
        return self.standard.inverse(outputs["values"][:, 0])

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        guess, y = self.to_target_unit(outputs), targets["value"]
        spread = float(np.mean((y - y.mean()) ** 2))
        mse = float(np.mean((guess - y) ** 2))
        return {"rmse": mse**0.5, "mae": float(np.abs(guess - y).mean()), "r2": 1 - mse / spread if spread else float("nan")}

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        return [{self.target.name: float(v)} for v in self.to_target_unit(outputs)]

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        from sklearn.linear_model import Ridge

        sample, note = subsample(train)
        x, x_test = self.linear_features(sample, test)
        fitted = Ridge().fit(x, self.standard.apply(self.values(sample)))
        return [
            Baseline("mean", f"always predicts {self.standard.mean:.4g}", {"values": np.zeros((len(test), 1))}),
            Baseline(
                "ridge regression", f"a linear model of the same inputs{note}", {"values": fitted.predict(x_test)[:, None]}
            ),
        ]

    def exhibits(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[Exhibit]]:
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
                    {f"{c:.4g}": int(n) for c, n in zip(centres, size[0])},
                    unit="rows",
                ),
                Table(
                    "Worst rows", "The largest errors on the test rows.", ("row", *columns, "truth", "predicted", "error"), rows
                ),
            ]
        }


def subsample(data: Data) -> tuple[Data, str]:
    """Return at most `LINEAR_ROWS` rows, and a note if rows were left out."""
    if len(data) <= MAX_LINEAR_BASELINE_ROWS:
        return data, ""
    rows = np.sort(np.random.default_rng(0).permutation(len(data))[:MAX_LINEAR_BASELINE_ROWS])
    return data.take(rows), f", fitted on {MAX_LINEAR_BASELINE_ROWS:,} rows"


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


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Return the expected calibration error over equal-width bins (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[which == b].sum() - right[which == b].sum()) for b in np.unique(which)]
    return float(sum(gaps) / len(right))


def mix_pairs(
    batch: dict[str, torch.Tensor], inputs: Sequence[str], classes: int, alpha: float, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Apply mixup (Zhang et al. 2018, arXiv:1710.09412, eq. 1): mix pairs of examples and their labels in one
    proportion.
    """
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    part, order = float(rng.beta(alpha, alpha)), torch.randperm(len(batch["target"]), generator=generator)
    one_hot = torch.nn.functional.one_hot(batch["target"], classes).float()
    mixed = {name: torch.lerp(batch[name][order], batch[name], part) for name in inputs}
    return {**batch, **mixed, "target": torch.lerp(one_hot[order], one_hot, part)}


def fill_options(options: Any, **values: Any) -> Any:
    """Return the options with `values` for those that the user has not set."""
    return replace(options, **{k: v for k, v in values.items() if getattr(options, k) is None})

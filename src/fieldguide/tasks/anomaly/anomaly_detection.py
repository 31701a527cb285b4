"""Anomaly detection in tables and series: how unusual is an example, compared with mostly normal training data?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError, nearest
from fieldguide.core.report_elements import ReportElement
from fieldguide.core.settings import Settings
from fieldguide.core.signature import Axis, InputField, RecordField, RecordUnit, Step, TensorSpec
from fieldguide.core.structure import Limits
from fieldguide.data import read
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import Column, Data, Kind
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import ImageTransform, TablePreparer
from fieldguide.data.text_values import count_values
from fieldguide.data.timeseries import steps
from fieldguide.data.timeseries.steps import STEP, Steps, build_steps
from fieldguide.data.validation import checks
from fieldguide.objectives import Objective, Reconstruction
from fieldguide.tasks.anomaly import report
from fieldguide.tasks.anomaly.evaluator import AnomalyEvaluator
from fieldguide.tasks.base import Arrays, Baseline, Task
from fieldguide.tasks.signature_parts import describe_column
from fieldguide.tasks.spec import Metric

ANOMALY_WORDS = (
    "1",
    "true",
    "yes",
    "anomaly",
    "anomalous",
    "abnormal",
    "outlier",
    "attack",
    "fraud",
    "fault",
    "failure",
    "anomalie",
)
NORMAL_WORDS = ("0", "false", "no", "normal", "ok", "good", "inlier", "benign", "regular")
TABLE_KINDS: tuple[Kind, ...] = ("number", "category", "boolean", "date")
MIN_NORMAL_ROWS = 20
BASELINE_STEPS = 8  # of a series that the baselines see at once
MAX_ANOMALY_FRACTION = 0.5


class AnomalyDetection(AnomalyEvaluator, Task):
    """Scores of rows of a table, or, with a time column, of the steps of series, or of images.

    Fitted to images, it becomes an `ImageAnomalyDetection`.
    """

    name = "anomaly-detection"
    reads = (
        "a table of rows, or of series with a time column (and a series column, if there are several); or images, in folders of labels "
        "(train/good, test/good, test/scratch, ...), in one folder or named in a table; labels (anomaly, label, ...) are used for scores "
        "only"
    )
    input_types: tuple[str, ...] = ("vector", "series", "image")
    output_types: tuple[str, ...] = ("reconstruction", "anomaly-map")
    column_spec = ColumnSpec(
        target="named",
        names=("anomaly", "is_anomaly", "anomalous", "outlier", "is_outlier", "attack", "fraud", "is_fraud", "fault"),
        roles=("series", "time"),
        kinds={"series": "category", "target": "category"},
        checks=(checks.check_columns, steps.check),
        new_classes=True,
    )
    recipe: ClassVar = {"patience": 10}
    record_for: ClassVar[RecordUnit] = "row"

    @dataclass(frozen=True)
    class Options:
        false_alarms: Annotated[float, Limits(0.0001, 0.5)] = 0.01  # of normal examples that may exceed the threshold
        anomaly: str = ""  # the label of anomalies; by default 1, true, anomaly, ..., else all but the most frequent label
        length: Annotated[int, Limits(2, 4096)] = 32  # steps of a series that the network rebuilds at once
        side: Annotated[int, Limits(8, 4096)] | None = None  # pixels per side of an image
        channels: int | None = None  # of an image: 1 gray, 3 color
        pixels: str | None = None  # mean and standard deviation of each channel, from 0 to 1: mean,mean,mean/std,std,std

    @dataclass(frozen=True)
    class PredictOptions:
        false_alarms: Annotated[float | None, Limits(0.0001, 0.5)] = None  # another rate than that of training

    preparer: TablePreparer | None  # of rows; None for steps of series
    channels: list[str]  # of series
    mean: list[float]
    std: list[float]
    normal_label: list[str]
    request: Data

    # Matching data

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if data.features("image"):
            return None if len(data.features("image")) == 1 else "one image column"
        if data.columns_with_role("time"):
            return None if steps.find_channels(data) else "numeric columns"
        return None if data.features(*TABLE_KINDS) else "numeric, categorical, boolean or date columns"

    @classmethod
    def select_columns(cls, data: Data) -> Data:
        if not data.features("image"):
            return data
        out = lambda c: replace(c, role="ignored", why=f"{cls.name} in images reads only images")
        other = lambda c: c.role in ("feature", "time", "series") and c.kind != "image"
        return replace(data, columns={n: out(c) if other(c) else c for n, c in data.columns.items()})

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        return build_steps(data) if data.columns_with_role("time") else data

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        if data.features("image"):
            from fieldguide.tasks.anomaly.images import ImageAnomalyDetection

            return ImageAnomalyDetection.fit(data, options)  # type: ignore[return-value]  # the same task in another class
        context = data.context if isinstance(data.context, Steps) else None
        task = cls(list((context.columns if context else data.columns).values()), options)
        normal = task.fit_labels(data)
        if context is not None:
            task.preparer, task.channels = None, context.channels
            values = context.values[data.rows[STEP].to_numpy()[normal]]
            known = np.isfinite(values)
            amount = np.maximum(known.sum(0), 1)
            mean = np.where(known, values, 0).sum(0) / amount
            std = np.sqrt((np.where(known, values - mean, 0) ** 2).sum(0) / amount)
            if not (std > 0).any():
                raise DataError(f"{data.source}: no channel changes in the training steps ({', '.join(task.channels[:8])}).")
            task.mean, task.std = mean.tolist(), np.where(std > 0, std, 1.0).tolist()
            task.read_only("series")
            task.add_note(f"{len(task.channels)} channels; the network rebuilds {task.options.length} steps (task.length)")
        else:
            task.channels, task.mean, task.std = [], [], []
            task.read_only("vector")
            task.preparer = TablePreparer.fit(data.rows[normal], task.inputs())
            if not task.preparer.width:
                raise DataError(f"{data.source}: no column varies in the normal training rows.")
        task.scale = [1.0] * len(task.list_features())
        return task

    def fit_labels(self, data: Data) -> np.ndarray:
        """Fit the labels of normal rows, and return the numbers of the training rows that are not anomalies.

        Raises `DataError` if too many rows are anomalies, or too few are normal.
        """
        self.normal_label, self.is_labeled = self.find_normal_labels(data), data.target is not None
        self.scale, self.normal_scores = [], [1.0]  # until they are calibrated
        label = self.targets(data)["label"]
        if (label == 1).mean() > MAX_ANOMALY_FRACTION:
            raise DataError(
                f"{data.source}: {100 * (label == 1).mean():.0f} % of the training rows are anomalies. Training needs mostly normal rows; "
                "is it the other label that marks anomalies? Name it with task.anomaly=LABEL."
            )
        normal = np.flatnonzero(label != 1)
        if len(normal) < MIN_NORMAL_ROWS:
            raise DataError(
                f"{data.source}: only {len(normal)} training rows are normal; at least {MIN_NORMAL_ROWS} are needed."
            )
        if count := int((label == 1).sum()):
            self.add_note(f"{count:,} training rows labeled as anomalies are left out of training")
        return normal

    def read_only(self, input_type: str) -> None:
        """Restrict the networks to those with this input. Steps of series are no rows of their own: those before them count."""
        self.input_types = (input_type,)
        vars(self)["record_for"] = "step" if input_type == "series" else "row"

    def main_metric(self) -> Metric:
        """Return the metric that results are summarized with. Without labels, only the monitored one is known."""
        unlabeled = None if self.is_labeled else next(m for m in self.metrics if m.name == self.monitor)
        return unlabeled or super().main_metric()

    def find_normal_labels(self, data: Data) -> list[str]:
        """Return the labels of normal rows."""
        if data.target is None:
            return []
        names, _ = count_values(data.rows[data.target.name].cast(pl.String).drop_nulls())
        if wanted := self.options.anomaly:
            if wanted not in names:
                raise SettingsError(
                    f"task.anomaly={wanted!r} is no label.{nearest(wanted, names)} Labels: {', '.join(names[:10])}."
                )
            return [name for name in names if name != wanted]
        if any(name.lower() in NORMAL_WORDS for name in names):
            return [name for name in names if name.lower() in NORMAL_WORDS]
        if any(name.lower() in ANOMALY_WORDS for name in names):
            return [name for name in names if name.lower() not in ANOMALY_WORDS]
        self.add_note(
            f"rows labeled {names[0]!r}, the most frequent label, are taken as normal, all others as anomalies (task.anomaly)"
        )
        return names[:1]

    def inputs(self) -> list[Column]:
        return [c for c in self.columns if c.role == "feature" and c.kind in TABLE_KINDS]

    def input_columns(self) -> list[Column]:
        return self.inputs()

    def list_features(self) -> list[str]:
        """Return the column of each number that is rebuilt."""
        if self.preparer is None:
            return self.channels
        names = [number.column for number in self.preparer.numbers]
        return [*names, *(c.column for c in self.preparer.categories for _ in range(c.size - 1))]

    def model_dims(self) -> dict[str, Any]:
        if self.preparer is None:
            return {"channels": len(self.channels), "length": self.options.length}
        return {"features": self.preparer.width}

    def data_facts(self) -> dict[str, Any]:
        return {"channels": len(self.channels), "columns": len(self.inputs())}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return Reconstruction(model, card.inputs[0])

    # Rows to batches

    def targets(self, data: Data) -> Arrays:
        """Return 1 for anomalies, 0 for normal rows, -1 for rows without a label; `block` numbers stretches of steps."""
        label = np.full(len(data), -1)
        target = next((c.name for c in self.columns if c.role == "target"), None)
        if target is not None and target in data.rows.columns:
            text = data.rows[target].cast(pl.String)
            label = np.where(text.is_in(self.normal_label).fill_null(False).to_numpy(), 0, 1)
            label = np.where(text.is_null().to_numpy(), -1, label)
        if isinstance(data.context, Steps):
            at = data.rows[STEP].to_numpy()
            return {
                "label": label,
                "block": data.context.begin[at] * 10_000_000 + at // (4 * self.options.length),
            }
        return {"label": label}

    def vectors(self, data: Data) -> np.ndarray:  # -> N F
        """Return the numbers of rows, scaled linearly so that extreme values stay extreme, and one-hot categories."""
        assert self.preparer is not None
        numbers, codes = self.preparer.apply(data.rows, "standard")
        return np.concatenate([numbers, self.preparer.one_hot(codes)], 1)

    def standardize(self, context: Steps) -> np.ndarray:  # -> N C
        """Return all steps of all series, standardized; missing values are the last before them."""
        return context.fill((context.values - np.array(self.mean)) / np.array(self.std)).astype(np.float32)

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        if self.preparer is not None:
            vectors = torch.from_numpy(self.vectors(data))
            return Batches(len(data), lambda index, generator: {"vector": vectors[torch.from_numpy(index)]})
        context, at = data.context, data.rows[STEP].to_numpy()
        filled, length = self.standardize(context), self.options.length

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            return {"series": torch.from_numpy(context.cut(at[index], length, filled))}

        return Batches(len(data), make)

    def train_batches(self, data: Data, card: Card, settings: Settings) -> Batches:
        normal = np.flatnonzero(self.targets(data)["label"] != 1)
        return self.batches(data.take(normal), card, settings)

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        normal = train.take(np.flatnonzero(self.targets(train)["label"] != 1))
        return self.detect(self.describe_rows(normal), self.describe_rows(test))

    def describe_rows(self, data: Data) -> np.ndarray:  # -> N F
        """Return what the baselines see of each example: the row, or the latest steps."""
        if self.preparer is not None:
            return self.vectors(data)
        length = min(BASELINE_STEPS, self.options.length)
        return data.context.cut(data.rows[STEP].to_numpy(), length, self.standardize(data.context)).reshape(len(data), -1)

    # Predictions

    def read(self, sources: Sequence[Any], *, answered: bool = False) -> Data:
        data = Task.read(self, sources, answered=answered)
        if self.preparer is None and not isinstance(data.context, Steps):
            data = build_steps(data)
            data.splits = None
        self.request = data
        return data

    def read_one(self, source: Any, answered: bool) -> Data:
        return read(source, schema=self.columns, column_spec=self.column_spec, labels_optional=True, lenient=not answered)

    def postprocess(self, outputs: Arrays) -> Arrays:
        rate = getattr(self.predict_options, "false_alarms", None)
        return {**outputs, "score": self.rank(outputs["errors"]) / self.find_threshold(rate)}

    def find_shares(self, errors: np.ndarray) -> tuple[np.ndarray, list[str]]:  # B F -> B columns
        """Return the share of each column in the scores."""
        names = self.list_features()
        columns = list(dict.fromkeys(names))
        parts = errors / np.array(self.scale)
        shares = np.stack([parts[:, [i for i, n in enumerate(names) if n == c]].sum(1) for c in columns], 1)
        return shares / np.maximum(shares.sum(1, keepdims=True), 1e-12), columns

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        shares, columns = self.find_shares(outputs["errors"])
        records = []
        for row, (score, share) in enumerate(zip(outputs["score"], shares)):
            top = np.argsort(-share)[:3]
            record: dict[str, Any] = {
                "anomaly": bool(score >= 1),
                "score": float(score),
                "due_to": {columns[i]: float(share[i]) for i in top},
            }
            if isinstance(self.request.context, Steps):
                at = int(self.request.rows[STEP][row])
                record = {"series": self.request.context.names[at], "time": str(self.request.context.times[at]), **record}
            records.append(record)
        return records

    # Report

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        score, label = outputs["score"], targets["label"]
        shares, columns = self.find_shares(outputs["errors"])
        reasons = [", ".join(f"{columns[i]} {100 * s[i]:.0f} %" for i in np.argsort(-s)[:2]) for s in shares]
        shown = columns[:6]
        cells = list(test.rows.select(shown).iter_rows())
        errors: list[ReportElement] = [report.draw_scores(score, label)]
        if (label == 1).any() and (label == 0).any():
            errors.append(report.draw_precision({"this model": score}, label))
        errors += report.draw_causes(shares, columns, score >= 1)
        errors += report.list_examples([test.locate_row(i) for i in range(len(test))], score, label, reasons, cells, shown)
        found = {"Alarms": errors}
        if isinstance(test.context, Steps):
            at = test.rows[STEP].to_numpy()
            names = [test.context.names[i] for i in at]
            values = self.standardize(test.context)[at]
            found = {"Over time": report.draw_timeline(names, score, label, values, self.channels), **found}
        return found

    # How the model is called

    def describe_inputs(self) -> Sequence[InputField]:
        if self.preparer is not None:
            return [replace(describe_column(c), nullable=True) for c in self.inputs()]
        found = []
        for column in self.columns:
            if column.role in ("series", "time"):
                about = "name of the series" if column.role == "series" else "time of the step"
                found.append(describe_column(column, nullable=False, about=about))
            elif column.name in self.channels:
                found.append(describe_column(column, nullable=True, about="a channel"))
        return found

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        if self.preparer is not None:
            return [
                Step("parse_cells", "read numbers, dates and truth values in the format of each column", False),
                Step(
                    "standardize_numbers",
                    "mean 0 and standard deviation 1 of the quantiles; missing is 0",
                    True,
                    state="preparer",
                ),
                Step("encode_one_hot", "one-hot codes after the numbers", True, {"width": self.preparer.width}),
            ]
        return [
            Step("parse_cells", "read numbers and times in the format of each column", False),
            Step("arrange", "steps of each series in order of time; missing values are the last before them", False),
            Step(
                "standardize", "by mean and deviation of each channel in training", True, {"mean": self.mean, "std": self.std}
            ),
            Step("cut", "the steps until each one", False, {"length": self.options.length}),
        ]

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        if self.preparer is not None:
            return tensors
        fix = lambda axis: Axis("time", self.options.length) if axis.name == "time" else axis
        return [replace(spec, axes=tuple(fix(axis) for axis in spec.axes)) for spec in tensors]

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        return [
            Step("square_errors", "squared differences between input and output, of the last step", True),
            Step("weigh", "divided by the usual error of each feature, and averaged", True, {"scale": self.scale}),
            Step(
                "threshold",
                "divided by the score that normal examples rarely exceed",
                True,
                {"threshold": self.find_threshold()},
            ),
        ]

    def describe_record(self) -> Sequence[RecordField]:
        place = [RecordField("series", "string", "name of the series"), RecordField("time", "string", "time of the step")]
        return [
            *(place if self.preparer is None else []),
            RecordField("anomaly", "boolean", "whether the score reaches 1"),
            RecordField("score", "number", "how unusual it is; 1 is the threshold"),
            RecordField("due_to", "map", "columns with the largest shares of the score", items=RecordField("", "number")),
        ]

    # Saved with the run

    STATE: ClassVar = {
        "preparer?": TablePreparer.STATE,
        "pictures?": ImageTransform.STATE,
        "channels": list[str],
        "mean": list[float],
        "std": list[float],
        "normal_label": list[str],
        "is_labeled": bool,
        "scale": list[float],
        "normal_scores": list[float],
    }

    def state(self) -> dict[str, Any]:
        prepared = {} if self.preparer is None else {"preparer": self.preparer.to_json()}
        names = ("channels", "mean", "std", "normal_label", "is_labeled", "scale", "normal_scores")
        return {**prepared, **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        if "pictures" in state:
            from fieldguide.tasks.anomaly.images import ImageAnomalyDetection

            return ImageAnomalyDetection.from_state(columns, options, state, folder)  # type: ignore[return-value]  # the same task in another class
        task = cls(columns, options)
        task.preparer = TablePreparer.from_json(state["preparer"]) if "preparer" in state else None
        for name in ("channels", "mean", "std", "normal_label", "is_labeled", "scale", "normal_scores"):
            setattr(task, name, state[name])
        task.read_only("series" if task.preparer is None else "vector")
        return task


TASKS = (AnomalyDetection,)

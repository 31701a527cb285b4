"""Time series classification: one label per series."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError
from fieldguide.core.report_elements import Lines, Numbers, ReportElement
from fieldguide.core.settings import Settings
from fieldguide.core.signature import InputField, RecordUnit, Step
from fieldguide.core.structure import Limits
from fieldguide.data import read
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing.series import SeriesPreparer
from fieldguide.data.timeseries import cases
from fieldguide.data.timeseries.cases import CASE, Cases, build_cases
from fieldguide.tasks.analysis.context import ReportContext
from fieldguide.tasks.base import Task
from fieldguide.tasks.signature_parts import describe_column
from fieldguide.tasks.supervised import ClassificationTask, fill_options, is_discrete, mix_pairs

SHOWN_SERIES = 6  # in each group of charts
SHOWN_CHANNELS = 4
SHOWN_CLASSES = 8
PARTS = 16  # of a series that are hidden one by one
JITTER, STRETCH = 0.05, 0.1  # standard deviations of the noise and of the scale in augmentation


class SeriesClassification(ClassificationTask):
    """One label per series. Rows of `Data` are series, whose values are in `Data.context`."""

    name = "time-series-classification"
    has_own_rows = False
    reads = (
        "`.ts` files of the UCR and UEA archives; a table with one series per row and a column of labels; or one step per row, with a "
        "series column and a column of labels"
    )
    input_types = ("series",)
    baseline_models: ClassVar = ("rocket",)
    column_spec = ColumnSpec(
        roles=("series", "time"),
        kinds={"series": "category", "target": "category"},
        gaps=True,
        checks=(cases.check,),
    )
    recipe: ClassVar = {"augmentation": "light", "label_smoothing": 0.05, "weight_decay": 0.01}
    record_for: ClassVar[RecordUnit] = "series"

    @dataclass(frozen=True)
    class Options:
        length: Annotated[int | None, Limits(2, 100_000)] = None  # steps that a network reads; longer series are averaged
        by_series: bool = False  # standardize each series by itself, instead of each channel by its training values

    preparer: SeriesPreparer
    channels: list[str]
    layout: str
    request: Data

    # Matching data

    @classmethod
    def match(cls, data: Data) -> str | None:
        if not data.columns_with_role("series") or data.target is None or not is_discrete(data.target):
            return None
        return f"labeled series and {data.target.distinct} classes"

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if lack := super().missing_requirements(data):
            return lack
        if not is_discrete(data.required_target):
            return "a column of classes"
        return None if any(values.dtype.is_numeric() for values in data.rows.iter_columns()) else "numeric columns"

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        return build_cases(data)

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.context.columns.values()), options)
        found = task.list_series(data)
        task.channels, task.layout = data.context.channels, data.context.layout
        task.preparer = SeriesPreparer.fit(found, options.length, options.by_series)
        task.options = fill_options(options, length=task.preparer.length)
        task.fit_labels(data)
        many = f"{len(task.channels)} channels" if len(task.channels) > 1 else "one channel"
        shortened = f", averaged over {task.preparer.factor:.3g} steps each" if task.preparer.factor > 1 else ""
        task.add_note(f"series of {many}; {task.preparer.length} steps are read{shortened} (task.length)")
        return task

    def list_series(self, data: Data) -> list[np.ndarray]:  # each C T
        return [data.context.values[i] for i in data.rows[CASE].to_list()]

    def model_dims(self) -> dict[str, Any]:
        return {"num_classes": len(self.labels), "channels": len(self.channels), "length": self.preparer.length}

    def data_facts(self) -> dict[str, Any]:
        return {"num_classes": len(self.labels), "channels": len(self.channels), "length": self.preparer.length}

    # Series to batches

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        found = self.list_series(data)
        if not settings and (cut := self.preparer.count_cut(found)):
            self.add_note(f"{cut:,} series are longer than those of training; their end is not read")
        series = torch.from_numpy(self.preparer.apply(found))
        target = torch.from_numpy(self.targets(data)["label"]) if settings else None
        how = settings.augmentation if settings else "none"

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            rows = torch.from_numpy(index)
            batch = {"series": series[rows]}
            if generator is not None and how != "none":
                batch["series"] = augment(batch["series"], generator)
            if target is not None:
                batch["target"] = target[rows]
            if generator is not None and settings and settings.mixup:
                batch = mix_pairs(batch, ("series",), len(self.labels), settings.mixup, generator)
            return batch

        return Batches(len(data), make)

    # Predictions

    def read(self, sources: Sequence[Any], *, answered: bool = False) -> Data:
        data = Task.read(self, sources, answered=answered)
        found = build_cases(data, is_labeled=answered)
        made: Cases = found.context
        if made.channels != self.channels:
            if len(made.channels) != len(self.channels):
                raise DataError(
                    f"{data.source} has {len(made.channels)} channels ({', '.join(made.channels[:8])}), but the model reads "
                    f"{len(self.channels)} ({', '.join(self.channels[:8])})."
                )
            self.add_note(f"the channels {', '.join(made.channels[:8])} are read as {', '.join(self.channels[:8])}")
        for finding in cases.arrange_cases(data, answered)[1]:
            if finding.severity == "warning":
                self.add_note(str(finding))
        self.request = found
        return found

    def read_one(self, source: Any, answered: bool) -> Data:
        return read(source, schema=self.columns, column_spec=self.column_spec, labels_optional=not answered)

    def format_predictions(self, outputs: Any) -> list[dict[str, Any]]:
        names = self.request.context.names
        return [{"series": name, **record} for name, record in zip(names, super().format_predictions(outputs))]

    # Report

    def preview_data(self, training: Data) -> list[ReportElement]:
        series, codes = self.preparer.apply(self.list_series(training)), self.targets(training)["label"]
        steps = np.arange(self.preparer.length) * self.preparer.factor
        found: list[ReportElement] = []
        for channel in range(min(len(self.channels), SHOWN_CHANNELS)):
            lines: dict[str, tuple[Numbers, Numbers]] = {}
            for code in range(min(len(self.labels), SHOWN_CLASSES)):
                mine = series[codes == code][:, :, channel]
                if len(mine):
                    lines[self.labels[code]] = (steps, np.median(mine, 0))
            found.append(
                Lines(
                    f"Classes: {self.channels[channel]}",
                    "The median of the training series of each class, standardized.",
                    x="step",
                    lines=lines,
                )
            )
        return found

    def show_predictions(self, test: Data, probabilities: np.ndarray, targets: np.ndarray) -> list[ReportElement]:
        wrong = self.mistakes(probabilities, targets, SHOWN_SERIES)
        right = [
            (row, self.describe(probabilities, targets, row)) for row in self.correct(probabilities, targets, SHOWN_SERIES)
        ]
        names = test.context.names
        found: list[ReportElement] = []
        for title, rows in (("Mistake", wrong), ("Correct", right)):
            for row, words in rows:
                values = test.context.values[test.rows[CASE][row]]
                lines: dict[str, tuple[Numbers, Numbers]] = {
                    name: (np.arange(values.shape[1]), channel) for name, channel in zip(self.channels[:SHOWN_CHANNELS], values)
                }
                found.append(Lines(f"{title}: {names[test.rows[CASE][row]]}", words, x="step", lines=lines))
        return found

    def explain(self, context: ReportContext) -> list[ReportElement]:
        """Return for some series how much the probability of the predicted class falls without a part of the time."""
        p, y = context.outputs["probabilities"], context.targets["label"]
        found: list[ReportElement] = []
        for row in self.choose_explained(p, y):
            if context.deadline.is_over:
                break
            batch = context.make_batch(context.test.take([row]))
            series = batch["series"]  # 1 T C
            steps = min(
                series.shape[1],
                max(round(context.test.context.lengths[context.test.rows[CASE][row]] / self.preparer.factor), 1),
            )
            edges = np.unique(np.linspace(0, steps, PARTS + 1).round().astype(int))
            hidden = series.repeat(len(edges), 1, 1)
            for part, (low, high) in enumerate(itertools.pairwise(edges), 1):
                hidden[part, low:high] = series[0, :steps].mean(0)
            chances = context.predict_batch({"series": hidden})["probabilities"][:, p[row].argmax()]
            falls = np.repeat(chances[0] - chances[1:], np.diff(edges))
            at = np.arange(steps) * self.preparer.factor
            lines = {
                name: (at, channel) for name, channel in zip(self.channels[:SHOWN_CHANNELS], series[0, :steps].T.cpu().numpy())
            }
            found.append(
                Lines(
                    f"Parts that matter: {context.test.context.names[context.test.rows[CASE][row]]}",
                    f"{self.describe(p, y, row)}. The probability of the predicted class falls by this much if the part has the mean "
                    "of the series.",
                    x="step",
                    lines={"fall of the probability": (at, falls), **lines},
                    faint=tuple(lines),
                )
            )
        return found

    # How the model is called

    def describe_inputs(self) -> Sequence[InputField]:
        is_long = self.layout == "long"
        found = []
        for column in self.columns:
            if column.role == "series" or (column.role == "time" and is_long):
                about = "name of the series" if column.role == "series" else "order of the steps"
                found.append(describe_column(column, nullable=False, about=about))
            elif column.role == "feature" and column.kind == "number":
                about = "a channel" if is_long else "a step of the series; empty after its end"
                found.append(describe_column(column, nullable=True, about=about))
        return found

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        own = self.preparer.by_series
        return [
            Step("parse_cells", "read numbers in the format of each column", False),
            Step("group", "the steps of each series in order of time", False),
            Step("standardize", "by mean and deviation of each channel", True, state="preparer"),
            Step("interpolate", "missing values between known ones", False),
            *([Step("standardize_series", "each series by its own mean and deviation", True)] if own else []),
            Step("average", f"means over {self.preparer.factor:.4g} steps", False, {"factor": self.preparer.factor}),
            Step("pad", "zeros at the end", True, {"length": self.preparer.length}),
        ]

    def describe_record(self) -> Any:
        from fieldguide.core.signature import RecordField

        return [RecordField("series", "string", "name of the series"), *super().describe_record()]

    # Saved with the run

    STATE: ClassVar = {
        "preparer": {"length": int, "factor": float, "mean": list[float], "std": list[float], "by_series": bool},
        "channels": list[str],
        "layout": str,
    }

    def state(self) -> dict[str, Any]:
        return {
            "preparer": self.preparer.to_json(),
            "channels": self.channels,
            "layout": self.layout,
            **self.target_state(),
        }

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.preparer = SeriesPreparer.from_json(state["preparer"])
        task.channels, task.layout = state["channels"], state["layout"]
        task.load_target_state(state)
        return task


def augment(series: Tensor, generator: torch.Generator) -> Tensor:  # B T C -> B T C
    """Return the series with another scale for each channel, and with noise."""
    scale = 1 + STRETCH * torch.randn(series.shape[0], 1, series.shape[2], generator=generator)
    return series * scale + JITTER * torch.randn(series.shape, generator=generator)


TASKS = (SeriesClassification,)

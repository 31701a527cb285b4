"""Tabular classification and regression."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError
from fieldguide.core.report_elements import ReportElement, Table
from fieldguide.core.settings import Settings
from fieldguide.data.dataset import CellProblems, Column, Data, Kind
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import TablePreparer
from fieldguide.data.timeseries.panel import find_plain_series
from fieldguide.data.validation.findings import MAX_PROBLEM_EXAMPLES, describe_problems
from fieldguide.tasks.supervised import ClassificationTask, RegressionTask, SupervisedTask, is_discrete, mix_pairs
from fieldguide.tasks.tabular.signature import TabularSignature

TABLE_KINDS: tuple[Kind, ...] = ("number", "category", "boolean", "date")
USABLE_KINDS: tuple[Kind, ...] = (*TABLE_KINDS, "text")


class Tabular(TabularSignature, SupervisedTask):
    """Base class of the tabular tasks, with the preprocessing of rows."""

    input_types: tuple[str, ...] = ("table", "vector")
    baseline_models: ClassVar = ("linear", "gradient-boosting")
    recipe: ClassVar = {"weight_decay": 3e-4}

    @dataclass(frozen=True)
    class Options:
        pass

    preparer: TablePreparer

    @classmethod
    def describe_features(cls, data: Data) -> str | None:
        """Return a description of the usable features, or None if there are none or if there are images."""
        usable, texts = data.features(*TABLE_KINDS), len(data.features("text"))
        if not usable or data.features("image"):
            return None
        if data.columns_with_role("series") or find_plain_series(data):  # rows are steps of series
            return None
        found = f"{len(usable)} numeric or categorical column{'s' if len(usable) > 1 else ''}"
        return f"{found}, {texts} text column{'s' if texts > 1 else ''}" if texts else found

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        return (
            super().missing_requirements(data)
            if data.features(*USABLE_KINDS)
            else "numeric, categorical, boolean, date or text columns"
        )

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        task.preparer = TablePreparer.fit(data.rows, task.inputs())
        if not task.preparer.width:
            raise DataError(
                f"{data.source}: no usable feature column is left. Features must vary and be numeric, "
                "categorical, boolean, dates or texts."
            )
        used = {n.column for n in task.preparer.numbers} | {c.column for c in task.preparer.categories}
        left = [c.name for c in task.columns if c.role == "feature" and c.name not in used]
        task.columns = [replace(c, role="ignored") if c.name in left else c for c in task.columns]
        if left:
            task.notes.append(
                "columns not used, since they do not vary in the training rows, hold no value twice, or are neither numbers, categories, "
                f"booleans, dates nor texts: {', '.join(left)}"
            )
        task.fit_target(data)
        return task

    def inputs(self) -> list[Column]:
        return [c for c in self.columns if c.role == "feature" and c.kind in USABLE_KINDS]

    def input_columns(self) -> list[Column]:
        return self.inputs()

    def fit_target(self, data: Data) -> None:
        raise NotImplementedError

    def model_dims(self) -> dict[str, Any]:
        prepared = self.preparer
        return {
            "num_classes": self.width(),
            "numbers": len(prepared.numbers),
            "categories": tuple(prepared.cardinalities),
            "features": prepared.width,
        }

    def width(self) -> int:
        raise NotImplementedError

    def data_facts(self) -> dict[str, Any]:
        return {
            "columns": len(self.inputs()),
            "numbers": len(self.preparer.numbers),
            "categories": len(self.preparer.categories),
            "num_classes": self.width(),
        }

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        if card.input_type == "vector":
            tensors = {"vector": torch.from_numpy(self.preparer.vector(data.rows))}
        else:
            numbers, categories = self.preparer.apply(data.rows, card.number_scale)
            tensors = {"numbers": torch.from_numpy(numbers), "categories": torch.from_numpy(categories)}
        if not settings:
            self.note_unseen(data)
        if settings:
            tensors["target"] = self.target_tensor(data)

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, torch.Tensor]:
            rows = torch.from_numpy(index)
            batch = {name: t[rows] for name, t in tensors.items()}
            # mixup needs continuous inputs, not category codes
            if (
                generator is not None
                and settings
                and settings.mixup
                and "vector" in batch
                and isinstance(self, ClassificationTask)
            ):
                batch = mix_pairs(batch, ("vector",), self.width(), settings.mixup, generator)
            return batch

        return Batches(len(data), make)

    def note_unseen(self, data: Data) -> None:
        """Keep the categories that training did not have, and add a note about them."""
        found = []
        for name, rows in self.preparer.unseen_rows.items():
            shown = [(data.locate_row(int(i)), str(data.rows[name][int(i)])) for i in rows[:MAX_PROBLEM_EXAMPLES]]
            detail = "not seen in training, treated as unknown"
            found.append(CellProblems(name, "unseen", detail, len(rows), tuple(map(int, rows)), tuple(shown)))
        self.problems += found
        for line in describe_problems(found):
            self.add_note(line)

    def target_tensor(self, data: Data) -> torch.Tensor:
        raise NotImplementedError

    STATE: ClassVar = {"preparer": TablePreparer.STATE}

    def state(self) -> dict[str, Any]:
        return {"preparer": self.preparer.to_json(), **self.target_state()}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.preparer = TablePreparer.from_json(state["preparer"])
        task.preparer.check_columns({c.name: c.kind for c in task.inputs()})
        task.load_target_state(state)
        return task


class TabularClassification(Tabular, ClassificationTask):
    name = "tabular-classification"
    reads = "a table (CSV, Parquet, JSON Lines) with a class column"

    @classmethod
    def match(cls, data: Data) -> str | None:
        why = cls.describe_features(data)
        target = data.target
        return f"{why} and a target with {target.distinct} classes" if why and target and is_discrete(target) else None

    def fit_target(self, data: Data) -> None:
        self.fit_labels(data)

    def width(self) -> int:
        return len(self.labels)

    def target_tensor(self, data: Data) -> torch.Tensor:
        return torch.from_numpy(self.targets(data)["label"])

    def show_predictions(self, test: Data, probabilities: np.ndarray, targets: np.ndarray) -> list[ReportElement]:
        columns = [c.name for c in self.inputs()][:10]
        right = [(row, self.describe(probabilities, targets, row)) for row in self.correct(probabilities, targets, 8)]
        list_rows = lambda some: [(test.locate_row(i), words, *(test.rows[c][i] for c in columns)) for i, words in some]
        header = ("row", "prediction", *columns)
        tables = [
            Table(
                "Worst mistakes",
                "Test rows that are wrong with the highest confidence.",
                header,
                list_rows(self.mistakes(probabilities, targets, 15)),
            ),
            Table("Correct predictions", "Random test rows.", header, list_rows(right)),
        ]
        return [table for table in tables if table.rows]


class TabularRegression(Tabular, RegressionTask):
    name = "tabular-regression"
    reads = "a table (CSV, Parquet, JSON Lines) with a numeric target column"

    @classmethod
    def match(cls, data: Data) -> str | None:
        why, target = cls.describe_features(data), data.target
        if not why or not target or target.kind != "number" or is_discrete(target):
            return None
        return f"{why} and a numeric target with {target.distinct} values"

    def fit_target(self, data: Data) -> None:
        self.fit_scale(data)

    def width(self) -> int:
        return 1

    def target_tensor(self, data: Data) -> torch.Tensor:
        return torch.from_numpy(self.standard.apply(self.values(data)))[:, None]


TASKS = (TabularClassification, TabularRegression)

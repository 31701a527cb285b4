"""Tasks with one known target per example: classification and regression."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError, nearest
from fieldguide.core.settings import Settings
from fieldguide.data.dataset import Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import Labels, Standardizer
from fieldguide.objectives import Classification, Objective, Regression, Supervised
from fieldguide.tasks.base import Arrays, Task
from fieldguide.tasks.supervised_evaluator import ClassificationEvaluator, RegressionEvaluator
from fieldguide.tasks.supervised_report import ClassificationReport, RegressionReport
from fieldguide.tasks.supervised_signature import ClassificationSignature, RegressionSignature


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


class ClassificationTask(SupervisedTask, ClassificationEvaluator, ClassificationReport, ClassificationSignature):
    """A classification task."""

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
        """Return the class index of each row; -1 for a class that is not in the training data.

        Raises `DataError` if no row has a known class.
        """
        values = data.rows[self.target.name]
        codes = Labels(tuple(self.labels)).apply(values)
        if (codes < 0).any():
            unseen = sorted({str(v) for v in values.filter(pl.Series(codes < 0)).to_list()})
            shown = f"{', '.join(map(repr, unseen[:5]))}{', ...' if len(unseen) > 5 else ''}"
            if (codes < 0).all():
                raise DataError(
                    f"{data.source}: no class in column {self.target.name!r} is in the training data. It has {shown}; the model "
                    f"knows {', '.join(map(repr, self.labels[:10]))}. Check the spelling, leading zeros and the column."
                )
            self.add_note(
                f"{int((codes < 0).sum())} rows have classes that are not in the training data ({shown}); they count as wrong"
            )
        return {"label": codes.copy()}  # polars returns read-only memory

    def loss_batches(self, data: Data, card: Card, settings: Settings) -> Batches:
        known = np.flatnonzero(self.targets(data)["label"] >= 0)  # there is no loss for a class that training did not have
        return super().loss_batches(data.take(known), card, settings)

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        weights = None
        if settings.class_weights:
            inverse = sum(self.counts) / (len(self.counts) * np.maximum(np.array(self.counts), 1))
            weights = inverse.tolist()
        return Supervised(model, card.inputs, Classification(settings.label_smoothing, weights))

    def preprocessing_state(self) -> dict[str, Any]:
        return {key: value for key, value in self.state().items() if key not in {*self.target_state(), "threshold"}}

    def teacher_inputs(self, other: Any, card: Card) -> Callable[[dict[str, Any]], Sequence[Any]]:
        if self.labels != other.labels:
            raise SettingsError(
                f"the teacher's classes ({', '.join(other.labels[:10])}) differ from those of this data "
                f"({', '.join(self.labels[:10])}). They must be the same."
            )
        return super().teacher_inputs(other, card)

    STATE: ClassVar = {"labels": list[str], "counts": list[float], "temperature": float, "threshold?": float | None}

    def target_state(self) -> dict[str, Any]:
        state = {"labels": self.labels, "counts": self.counts, "temperature": self.temperature}
        return state if self.threshold is None else {**state, "threshold": self.threshold}

    def load_target_state(self, state: dict[str, Any]) -> None:
        self.labels, self.counts, self.temperature = state["labels"], state["counts"], state["temperature"]
        self.threshold = state.get("threshold")

    @staticmethod
    def label_state(names: list[str]) -> dict[str, Any]:
        """Return the target state of a task whose class names are known but not its training rows."""
        return {"labels": names, "counts": [0] * len(names), "temperature": 1.0}

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        p = outputs["probabilities"]
        return [
            {
                "label": self.labels[code],
                "probability": float(row[code]),
                "probabilities": dict(zip(self.labels, map(float, row))),
            }
            for code, row in zip(self.decide(p), p)
        ]

    def collect_outputs(self, records: Sequence[Mapping[str, Any]]) -> Arrays | None:
        if not all("probabilities" in record for record in records):
            return None
        return {"probabilities": np.array([[record["probabilities"][name] for name in self.labels] for record in records])}


class RegressionTask(SupervisedTask, RegressionEvaluator, RegressionReport, RegressionSignature):
    """A regression task. Targets are standardized for training; scores and predictions are in the target's unit."""

    def fit_scale(self, data: Data) -> None:
        self.standard = Standardizer.fit(self.values(data))

    def values(self, data: Data) -> np.ndarray:
        return data.rows[self.target.name].cast(pl.Float64).to_numpy()

    def targets(self, data: Data) -> Arrays:
        return {"value": self.values(data)}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return Supervised(model, card.inputs, Regression())

    STATE: ClassVar = {"standard": {"mean": float, "std": float}}

    def target_state(self) -> dict[str, Any]:
        return {"standard": self.standard.to_json()}

    def load_target_state(self, state: dict[str, Any]) -> None:
        self.standard = Standardizer.from_json(state["standard"])

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        return [{self.target.name: float(v)} for v in self.to_target_unit(outputs)]

    def collect_outputs(self, records: Sequence[Mapping[str, Any]]) -> Arrays | None:
        return {"values": self.standard.apply(np.array([record[self.target.name] for record in records]))[:, None]}


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

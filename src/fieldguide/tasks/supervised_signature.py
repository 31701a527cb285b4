"""Signatures of classification and regression: postprocessing and records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fieldguide.core.signature import Axis, RecordField, Step, TensorSpec
from fieldguide.data.dataset import Column
from fieldguide.data.preprocessing import Standardizer
from fieldguide.tasks.signature_builder import SignatureBuilder
from fieldguide.tasks.signature_parts import describe_classes


def average_members(members: int) -> list[Step]:
    """Return the step that joins the members of an ensemble, if the network is one."""
    return [Step("average", "mean over the members of the ensemble", True, {"axis": 1})] if members else []


class ClassificationSignature(SignatureBuilder):
    """The signature of a task that predicts one of several classes."""

    labels: list[str]
    temperature: float
    threshold: float | None

    @property
    def positive(self) -> int:
        raise NotImplementedError

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        steps = [Step("softmax", "probabilities of the classes", True), *average_members(members)]
        about = "calibrate: divide log-probabilities by the temperature, softmax again"
        steps.append(Step("temperature", about, True, {"temperature": self.temperature}))
        if self.threshold is None:
            steps.append(Step("argmax", "the most probable class", True))
        else:
            about = "the positive class if its probability reaches the threshold"
            steps.append(Step("threshold", about, True, {"threshold": self.threshold, "positive": self.positive}))
        return [*steps, Step("name_classes", "names of the classes by their index", True, {"count": len(self.labels)})]

    def describe_record(self) -> Sequence[RecordField]:
        return describe_classes(self.labels)


class RegressionSignature(SignatureBuilder):
    """The signature of a task that predicts a number."""

    standard: Standardizer

    @property
    def target(self) -> Column:
        raise NotImplementedError

    def describe_outputs(self, outputs: Sequence[TensorSpec], network: Any) -> Sequence[TensorSpec]:
        rename = lambda axis: Axis("values", axis.size) if axis.name == "classes" else axis
        about = "the standardized value"
        return [replace(out, name="value", about=about, axes=tuple(rename(axis) for axis in out.axes)) for out in outputs]

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        scaling = self.standard.to_json()
        return [*average_members(members), Step("rescale", "value * std + mean: the unit of the target", True, scaling)]

    def describe_record(self) -> Sequence[RecordField]:
        return [RecordField(self.target.name, "number", "the predicted value, in the unit of the target")]

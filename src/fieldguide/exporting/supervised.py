"""Graphs of classification and regression: calibration, the choice of a class, the unit of the target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fieldguide.core.signature import TensorSpec
from fieldguide.exporting.graph import Graph, Names, build_pipeline

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

LEAST_PROBABILITY = 1e-30  # as in `ClassificationEvaluator.postprocess`


class Calibrate(nn.Module):
    """Calibrate probabilities, and choose a class: `ClassificationEvaluator.postprocess` and `decide`."""

    def __init__(self, task: Any):
        super().__init__()
        self.temperature, self.threshold, self.positive = task.temperature, task.threshold, task.positive
        self.has_threshold = task.threshold is not None and len(task.labels) == 2

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = outputs["probabilities"].double().clamp(min=LEAST_PROBABILITY).log() / self.temperature
        p = logits.softmax(1)
        if self.has_threshold:
            code = torch.where(p[:, self.positive] >= self.threshold, self.positive, 1 - self.positive)
        else:
            code = p.argmax(1)
        return {"probabilities": p.float(), "code": code}


class Rescale(nn.Module):
    """Return values in the unit of the target."""

    def __init__(self, standard: Any):
        super().__init__()
        self.mean, self.std = standard.mean, standard.std

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"value": (outputs["values"][:, 0].double() * self.std + self.mean).float()}


def finish(predictor: TaskPredictor, front: nn.Module, inputs: tuple[TensorSpec, ...], **parts: Any) -> Graph:
    """Return the graph of a task that predicts a class or a number."""
    task: Any = predictor.task
    back: nn.Module
    outputs: tuple[str, ...]
    if hasattr(task, "labels"):
        back, outputs, values = Calibrate(task), ("probabilities", "code"), {"labels": list(task.labels)}
        parts["names"] = (Names("label", "code", tuple(task.labels)),)
    else:
        back, outputs, values = Rescale(task.standard), ("value",), {}
    answer = parts.pop("answer", task.describe_record()[0].name)
    module = build_pipeline(predictor, front, back, outputs)
    values |= {"answer": answer} | parts.pop("values", {})
    return Graph(module, inputs, outputs, values=values, **parts)

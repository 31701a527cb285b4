"""Graphs of anomaly detection: rows of a table, or the steps until each one of a series -> score and shares of columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.number_formats import list_replacements
from fieldguide.data.text_values import MISSING_MARKERS
from fieldguide.exporting.cases import StandardizeChannels, describe_steps
from fieldguide.exporting.forecasting import describe_target
from fieldguide.exporting.graph import BATCH, ExportError, Graph, build_pipeline
from fieldguide.exporting.tables import READING, describe_table

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

OUTPUTS = ("score", "shares")


def build_anomaly_detection(predictor: TaskPredictor) -> Graph:
    """Return the graph of anomaly detection in rows of a table."""
    task: Any = predictor.task
    if "image" in task.input_types:
        raise ExportError("anomaly detection in images cannot be exported to a graph yet.")
    if task.preparer is None:
        return build_series_anomalies(predictor)
    table, scores = describe_table(task, "standard", True), AnomalyScores(task)
    module = build_pipeline(predictor, table.front, scores, OUTPUTS)
    values = table.values | {"features": scores.names}
    parts = (*READING, "tables", "anomalies", "anomaly_rows")
    return Graph(module, table.inputs, OUTPUTS, parts, values, table.columns, table.lookups)


def build_series_anomalies(predictor: TaskPredictor) -> Graph:
    """Return the graph of anomaly detection in the steps of series."""
    task: Any = predictor.task
    scores = AnomalyScores(task)
    columns = {column.name: column for column in task.columns}
    values = {
        **describe_steps(task.columns),
        "channels": [describe_target(columns[name]) for name in task.channels],
        "mean": task.mean,
        "length": task.options.length,
        "features": scores.names,
        "missing": MISSING_MARKERS,
        "characters": list_replacements(),
    }
    axes = (BATCH, Axis("time", task.options.length), Axis("channels", len(task.channels)))
    module = build_pipeline(predictor, StandardizeChannels(task.mean, task.std), scores, OUTPUTS)
    parts = ("numbers", "series_values", "steps", "stacked", "anomalies", "anomaly_steps")
    return Graph(module, (TensorSpec("values", "float64", axes),), OUTPUTS, parts, values)


class AnomalyScores(nn.Module):
    """Return the score of each row, 1 at the threshold, and the share of each column in it: `AnomalyDetection.postprocess`."""

    scale: Tensor
    owner: Tensor  # F columns, 1 where a feature is of a column

    def __init__(self, task: Any):
        super().__init__()
        features = task.list_features()
        self.names, self.threshold = list(dict.fromkeys(features)), float(task.find_threshold())
        owner = torch.tensor([[float(name == other) for other in self.names] for name in features], dtype=torch.float64)
        self.register_buffer("scale", torch.tensor(task.scale, dtype=torch.float64), persistent=False)
        self.register_buffer("owner", owner, persistent=False)

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = outputs["errors"].double() / self.scale
        shares = parts @ self.owner
        least = torch.tensor(1e-12, dtype=torch.float64)
        return {"score": parts.mean(1) / self.threshold, "shares": shares / torch.maximum(shares.sum(1, keepdim=True), least)}

"""Graphs of anomaly detection: rows of a table, or the steps until each one of a series -> score and shares of columns; images ->
score and map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.number_formats import list_replacements
from fieldguide.data.text_values import MISSING_MARKERS
from fieldguide.exporting.cases import StandardizeChannels, describe_steps
from fieldguide.exporting.forecasting import describe_target
from fieldguide.exporting.graph import BATCH, Graph, build_pipeline
from fieldguide.exporting.steps.images import Resize, choose_reading, describe_image_reading, describe_pixels
from fieldguide.exporting.tables import READING, describe_table

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

OUTPUTS, MAP_OUTPUTS = ("score", "shares"), ("score", "map")
MAX_DISTANCES = 64_000_000  # between patches and those in memory, that are computed together


def build_anomaly_detection(predictor: TaskPredictor) -> Graph:
    """Return the graph of anomaly detection in rows of a table."""
    task: Any = predictor.task
    if "image" in task.input_types:
        return build_image_anomalies(predictor)
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


def build_image_anomalies(predictor: TaskPredictor) -> Graph:
    """Return the graph of anomaly detection in images: pixels of any size -> a score, and a map at the size of the network."""
    task: Any = predictor.task
    pictures, model = task.pictures, predictor.objective.model
    distances = (pictures.side // getattr(model, "step", 1)) ** 2 * len(getattr(model, "memory", (0,)))
    values = {
        "column": task.column,
        **describe_image_reading(pictures, pictures.side),
        "batch": max(1, MAX_DISTANCES // distances),
    }
    parts = (*choose_reading(pictures), "stacked", "heat")
    module = build_pipeline(predictor, Resize(pictures), ImageScores(task), MAP_OUTPUTS)
    return Graph(module, (describe_pixels(pictures),), MAP_OUTPUTS, parts, values, requires=("pillow",))


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


class ImageScores(AnomalyScores):
    """Return the score of each image and its map, 1 at the threshold: `ImageAnomalyDetection.postprocess`."""

    def __init__(self, task: Any):
        super().__init__(task)
        self.unit = task.scale[0] * self.threshold

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**super().forward(outputs), "map": outputs["map"] / self.unit}

"""Graphs of series classification: steps of channels in their own unit -> class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.dataset import Column
from fieldguide.data.number_formats import list_replacements
from fieldguide.data.text_values import MISSING_MARKERS
from fieldguide.data.timeseries.cases import group_columns
from fieldguide.exporting.forecasting import check_dates, describe_target
from fieldguide.exporting.graph import BATCH, ExportError, Graph
from fieldguide.exporting.supervised import finish

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor


class StandardizeChannels(nn.Module):
    """Standardize channels: `(values - mean) / std`.

    `forward` takes `values`, B T C float64, and optionally the number of their steps, B: what follows them is 0.
    """

    mean: Tensor  # C
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float64), persistent=False)

    def forward(self, values: Tensor, steps: Tensor | None = None) -> dict[str, Tensor]:
        series = (values - self.mean) / self.std
        if steps is not None:
            inside = torch.arange(values.shape[1]) < steps[:, None]  # B T
            series = torch.where(inside[..., None], series, 0.0)
        return {"series": series.float()}


def build_series_classification(predictor: TaskPredictor) -> Graph:
    """Return the graph of series classification: series without gaps, as long as the task's input at most."""
    task: Any = predictor.task
    preparer, columns = task.preparer, {column.name: column for column in task.columns}
    is_long = task.layout == "long"
    used = [c.name for c in task.columns if c.role == "feature" and c.kind == "number"]
    groups = [[name] for name in used] if is_long else list(group_columns(used).values())
    if len(groups) != len(task.channels):
        raise ExportError("run.py cannot read such columns yet: channels must be columns of numbers.")
    values = {
        **describe_steps([c for c in task.columns if is_long or c.role != "time"]),
        "channels": [[describe_target(columns[name]) for name in group] for group in groups],
        "mean": preparer.mean,
        "std": preparer.std,
        "by_series": preparer.by_series,
        "factor": preparer.factor,
        "length": preparer.length,
        "missing": MISSING_MARKERS,
        "characters": list_replacements(),
    }
    axes = (BATCH, Axis("time", preparer.length), Axis("channels", len(task.channels)))
    inputs = (
        TensorSpec("values", "float64", axes),
        TensorSpec("steps", "int64", (BATCH,), low=1, high=preparer.length),
    )
    arranging = ("steps", "cases_long") if is_long else ("cases_rows",)
    parts = ("numbers", "series_values", *arranging, "stacked", "classes", "cases")
    answer = task.describe_record()[1].name  # after the name of the series
    channels = len(task.channels)
    unscaled = [0.0] * channels, [1.0] * channels  # the program standardizes each series by its own mean
    front = StandardizeChannels(*(unscaled if preparer.by_series else (preparer.mean, preparer.std)))
    return finish(predictor, front, inputs, parts=parts, values=values, answer=answer)


def describe_steps(columns: Sequence[Column]) -> dict[str, Any]:
    """Return how the program orders the steps of series. Raises `ExportError` for times that it cannot read."""
    time = next((c for c in columns if c.role == "time"), None)
    check_dates(time)
    if time is not None and time.kind not in ("number", "date"):
        raise ExportError(f"run.py cannot read the times in column {time.name!r} yet: they must be numbers or dates.")
    return {
        "time": time.name if time is not None else "",
        "dates": time is not None and time.kind == "date",
        "series": [c.name for c in columns if c.role == "series"],
    }

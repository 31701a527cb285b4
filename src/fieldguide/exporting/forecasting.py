"""Graphs of forecasting: the window of a series in its own unit -> point forecast and quantiles in that unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.dataset import Column
from fieldguide.data.number_formats import NumberFormat, list_replacements
from fieldguide.data.text_values import MISSING_MARKERS
from fieldguide.data.timeseries.frequency import DAY, SECOND
from fieldguide.exporting.graph import BATCH, ExportError, Graph, build_pipeline
from fieldguide.tasks.timeseries.forecasting import LEVELS

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

INTERVAL = LEVELS[0.9]  # of records: the indices of its ends among the quantiles
LEAST_DAYS_OF_MONTH = 28
MONTH = "month"
UNITS = ("clock", "number", "month", "business")  # of time steps that the program knows


class StandardizeWindow(nn.Module):
    """Standardize windows by the mean and deviation of their series.

    `forward` takes `values` B T float64, `observed` B T bool, and the mean and deviation of their series, B float64.
    """

    def forward(self, values: Tensor, observed: Tensor, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
        series = ((values - mean[:, None]) / std[:, None]).float()[..., None]
        return {"series": series, "observed": observed[..., None], "mean": mean, "std": std}


class RescaleForecast(nn.Module):
    """Widen intervals, and return forecasts in the unit of their series: `Forecasting.postprocess` and `format_predictions`."""

    def __init__(self, task: Any):
        super().__init__()
        self.widths = [(LEVELS[float(level)], torch.tensor(grow, dtype=torch.float32)) for level, grow in task.widths.items()]

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        point, *quantiles = outputs["values"][:, :, 0].float().unbind(-1)  # B H each
        for (a, b), grow in self.widths:
            more = grow * (quantiles[b] - quantiles[a])
            quantiles[a], quantiles[b] = quantiles[a] - more, quantiles[b] + more
        quantiles = list(torch.stack(quantiles, -1).sort(-1).values.unbind(-1))
        for a, b in LEVELS.values():
            quantiles[a], quantiles[b] = torch.minimum(quantiles[a], point), torch.maximum(quantiles[b], point)
        values = torch.stack([point, *quantiles], -1).double()
        return {"forecast": values * outputs["std"][:, None, None] + outputs["mean"][:, None, None]}


def build_forecast(predictor: TaskPredictor) -> Graph:
    """Return the graph of forecasting. Raises `ExportError` for networks that read more than the series."""
    task: Any = predictor.task
    frequency, columns = task.frequency, list(task.columns)
    if tuple(predictor.card.inputs) != ("series",):
        raise ExportError(
            f"{predictor.name} reads covariates, which run.py cannot prepare yet. Train a network that reads only the series, such as "
            "--model nhits."
        )
    if frequency.unit not in UNITS or (frequency.unit == MONTH and (frequency.anchor or frequency.days)) or frequency.days:
        raise ExportError(f"run.py does not know time steps of {frequency.article} yet.")
    time = next((c for c in columns if c.role == "time"), None)
    check_dates(time)
    targets = [c for c in columns if c.role == "target"]
    named = [c.name for c in columns if c.role == "series"]
    if task.layout == "rows":
        targets = targets[:1] or columns[:1]
        named = named or [next(c.name for c in columns if c.kind in ("identifier", "category"))]
    least = {MONTH: LEAST_DAYS_OF_MONTH * DAY * frequency.size, "business": DAY}.get(frequency.unit, frequency.size)
    is_clock = frequency.unit == "clock"
    values = {
        "time": time.name if time is not None else "",
        "series": named,
        "targets": [describe_target(column) for column in targets],
        "size": frequency.size,
        "zone": frequency.zone,
        "least": least,
        "parts": "us" if is_clock and frequency.size % 1000 else "ms" if is_clock and frequency.size % SECOND else "s",
        "days": not is_clock or frequency.size % DAY == 0,
        "length": task.options.length,
        "horizon": task.options.horizon,
        "interval": [1 + place for place in INTERVAL],
        "standards": {name: list(pair) for name, pair in task.standards.items()},
        "missing": MISSING_MARKERS,
        "characters": list_replacements(),
    }
    window = Axis("time", task.options.length)
    inputs = (
        TensorSpec("values", "float64", (BATCH, window)),
        TensorSpec("observed", "bool", (BATCH, window)),
        TensorSpec("series_mean", "float64", (BATCH,)),
        TensorSpec("series_std", "float64", (BATCH,)),
    )
    module = build_pipeline(predictor, StandardizeWindow(), RescaleForecast(task), ("forecast",), keep_scale)
    dates = ("dates",) if frequency.unit != "number" else ()
    arranging = "series_rows" if task.layout == "rows" else "series_steps"
    parts = ("numbers", *dates, f"times_{frequency.unit}", arranging, "series_values", "series")
    return Graph(module, inputs, ("forecast",), parts, values)


def keep_scale(objective: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return the step that forecasts and passes mean and deviation on."""
    return lambda batch: {**objective.outputs(batch), "mean": batch["mean"], "std": batch["std"]}


def check_dates(column: Column | None) -> None:
    """Raise `ExportError` if the program cannot read the dates of a time column."""
    if column is None:
        return
    form = column.date_format or {}
    if any(form.get(name) for name in ("order", "parts", "weeks", "compact", "region")):
        raise ExportError(
            f"column {column.name!r} has dates that run.py cannot read. Write them as 2026-01-31 18:00 and train again."
        )


def describe_target(column: Column) -> dict[str, Any]:
    """Return how the program reads the values of a column."""
    form = column.number_format or {}
    return {"name": column.name, "format": form, "pattern": NumberFormat(**form).build_pattern()}

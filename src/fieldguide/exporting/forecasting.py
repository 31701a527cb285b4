"""Graphs of forecasting: the window of a series in its own unit -> point forecast and quantiles in that unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.dataset import Column
from fieldguide.data.number_formats import NumberFormat, list_replacements
from fieldguide.data.text_values import MISSING_MARKERS
from fieldguide.data.timeseries.frequency import DAY, SECOND
from fieldguide.exporting.graph import BATCH, ExportError, Graph, build_pipeline
from fieldguide.exporting.tables import describe_cells
from fieldguide.tasks.timeseries.forecasting import LEVELS

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

INTERVAL = LEVELS[0.9]  # of records: the indices of its ends among the quantiles
LEAST_DAYS_OF_MONTH = 28
MONTH = "month"
DAYS_AFTER_MONDAY = 3  # of 1970-01-01
UNITS = ("clock", "number", "month", "business")  # of time steps that the program knows


class StandardizeWindow(nn.Module):
    """Standardize windows by the mean and deviation of their series.

    `forward` takes `values` B T float64, `observed` B T bool, the mean and deviation of their series, B float64, and the covariates of
    `names`; those of `empty`, names with their numbers of steps, have no features.
    """

    def __init__(self, names: Sequence[str] = (), empty: Mapping[str, tuple[int, ...]] | None = None):
        super().__init__()
        self.names, self.empty = tuple(names), dict(empty or {})

    def forward(self, values: Tensor, observed: Tensor, mean: Tensor, std: Tensor, *others: Tensor) -> dict[str, Tensor]:
        series = ((values - mean[:, None]) / std[:, None]).float()[..., None]
        batch = {"series": series, "observed": observed[..., None], "mean": mean, "std": std, **dict(zip(self.names, others))}
        rows = values.shape[0]
        return batch | {name: series.new_zeros(rows, *steps, 0) for name, steps in self.empty.items()}


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
    """Return the graph of forecasting. Raises `ExportError` for times and cells that the program cannot read."""
    task: Any = predictor.task
    frequency, columns = task.frequency, list(task.columns)
    if frequency.unit not in UNITS or (frequency.unit == MONTH and (frequency.anchor or frequency.days)) or frequency.days:
        raise ExportError(f"run.py does not know time steps of {frequency.article} yet.")
    time = next((c for c in columns if c.role == "time"), None)
    check_dates(time)
    targets = [c for c in columns if c.role == "target"]
    named = [c.name for c in columns if c.role == "series"]
    if task.layout == "rows":
        targets = targets[:1] or columns[:1]
        named = [task.get_series_name()]
    least = {MONTH: LEAST_DAYS_OF_MONTH * DAY * frequency.size, "business": DAY}.get(frequency.unit, frequency.size)
    is_clock = frequency.unit == "clock"
    values = {
        "time": time.name if time is not None else "",
        "series": named,
        "targets": [describe_target(column) for column in targets],
        **({"ignored": task.list_ignored()} if task.layout == "rows" else {}),
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
    window, horizon = Axis("time", task.options.length), task.options.horizon
    inputs: tuple[TensorSpec, ...] = (
        TensorSpec("values", "float64", (BATCH, window)),
        TensorSpec("observed", "bool", (BATCH, window)),
        TensorSpec("series_mean", "float64", (BATCH,)),
        TensorSpec("series_std", "float64", (BATCH,)),
    )
    reads = [name for name in predictor.card.inputs if name != "series"]
    both = Axis("steps", task.options.length + horizon)
    axes = {"past": (window,), "known": (both,), "static": ()}
    described = describe_covariates(task, "static" in reads) if reads else {}
    widths = described.pop("widths", {})
    covariates = tuple(
        TensorSpec(name, "float32", (BATCH, *axes[name], Axis("features", widths[name]))) for name in reads if widths[name]
    )
    empty = {name: tuple(int(axis.size or 0) for axis in axes[name]) for name in reads if not widths[name]}
    inputs = (*inputs, *covariates)
    values |= described | {"inputs": [spec.name for spec in inputs]}
    front = StandardizeWindow([spec.name for spec in covariates], empty)
    module = build_pipeline(predictor, front, RescaleForecast(task), ("forecast",), keep_scale)
    dates = ("dates",) if frequency.unit != "number" else ()
    reading = ("numbers", *dates, f"times_{frequency.unit}")
    if reads:
        modules = {"cells": ("cells_module", *reading, "series_values", "covariate_cells")}
        return Graph(
            module, inputs, ("forecast",), ("cells", "series_steps", "series", "series_inputs"), values, modules=modules
        )
    arranging = "series_rows" if task.layout == "rows" else "series_steps"
    parts = (*reading, arranging, "series_values", "series")
    return Graph(module, inputs, ("forecast",), parts, values)


def describe_covariates(task: Any, has_static: bool) -> dict[str, Any]:
    """Return how the program prepares covariates, with the number of features of each input of the network as `widths`.

    Raises `ExportError` for covariates that it cannot prepare.
    """
    if task.layout == "rows" or task.options.others:
        raise ExportError(
            "run.py reads covariates from columns next to the series only. Train a network that reads only the series."
        )
    columns, found = {column.name: column for column in task.columns}, task.covariates
    kinds = {
        "past": [c for c in found.columns if not c.ahead and not (c.static and has_static)],
        "known": [c for c in found.columns if c.ahead],
        "static": [c for c in found.columns if c.static and has_static],
    }
    describe = lambda c: {
        **describe_target(columns[c.column]),
        "kind": columns[c.column].kind,
        "literals": columns[c.column].literals or (),
        "mean": c.mean,
        "std": c.std,
        "values": c.values,
    }
    widths = {kind: sum(c.width for c in some) for kind, some in kinds.items()}
    widths["known"] += 2 * len(found.turns)
    widths["static"] += len(found.series)
    return {
        "covariates": {kind: [describe(c) for c in some] for kind, some in kinds.items()},
        "turns": found.turns,
        "names": found.series if has_static else [],
        "day": DAY,
        "monday": DAYS_AFTER_MONDAY * DAY,
        "truth": describe_cells()["truth"],
        "widths": widths,
    }


def keep_scale(objective: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return the step that forecasts and passes mean and deviation on."""
    return lambda batch: {**objective.outputs(batch), "mean": batch["mean"], "std": batch["std"]}


def check_dates(column: Column | None) -> None:
    """Raise `ExportError` if the program cannot read the dates of a time column."""
    if column is None:
        return
    form = column.date_format or {}
    if any(form.get(name) for name in ("order", "parts", "weeks", "compact", "region", "yearly_steps")):
        raise ExportError(
            f"column {column.name!r} has dates that run.py cannot read. Write them as 2026-01-31 18:00 and train again."
        )


def describe_target(column: Column) -> dict[str, Any]:
    """Return how the program reads the values of a column."""
    form = column.number_format or {}
    return {"name": column.name, "format": form, "pattern": NumberFormat(**form).build_pattern()}

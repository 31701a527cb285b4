"""Report elements of forecasting: windows with intervals, errors by step, and the worst series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fieldguide.core.report_elements import Bars, Lines, Numbers, ReportElement, Table
from fieldguide.data.dataset import Data
from fieldguide.data.timeseries.frequency import SECOND
from fieldguide.data.timeseries.panel import Panel
from fieldguide.data.timeseries.windows import CUT, SERIES, Windows

PREVIEWED_SERIES = 4  # series of the data that are drawn in full
SHOWN_SERIES = 6  # series drawn, from the worst to the best
LISTED_SERIES = 20  # series in the table of the worst
MAX_SHOWN_PAST_STEPS = 400  # maximum steps drawn before a forecast
IntervalEnds = Mapping[float, tuple[int, int]]  # nominal coverage -> indices of the interval's ends among the quantiles


def build_elements(
    test: Data, values: np.ndarray, targets: Mapping[str, np.ndarray], simple: Mapping[str, np.ndarray], levels: IntervalEnds
) -> dict[str, list[ReportElement]]:
    """Return the elements. `values` (B, H, 1+Q; standardized, point forecast first) are the model's, `simple` (B, H)
    those of each baseline.
    """
    windows: Windows = test.context
    future = (targets["future"] - targets["mean"][:, None]) / targets["std"][:, None]
    series = test.rows[SERIES].to_numpy()
    points = {"this model": values[..., 0], **simple}
    scaled = {name: abs(x - future) * (targets["std"] / targets["naive"])[:, None] for name, x in points.items()}
    each = nan_mean(scaled["this model"], 1)
    numbers = np.unique(series)
    mean = {name: np.array([nan_mean(nan_mean(x[series == s], 1), 0) for s in numbers]) for name, x in scaled.items()}
    order = np.argsort(-np.nan_to_num(mean["this model"], nan=-1.0), kind="stable")
    drawn: list[ReportElement] = []
    for s in numbers[order[np.linspace(0, len(order) - 1, min(SHOWN_SERIES, len(order))).round().astype(int)]]:
        mine = np.flatnonzero(series == s)
        row = int(mine[np.argsort(each[mine], kind="stable")[len(mine) // 2]])
        natural = values[row] * targets["std"][row] + targets["mean"][row]
        at = int(test.rows[CUT][row])
        drawn.append(draw_window(windows.panel, windows.options.season, int(s), at, natural, each[row], levels))
    return {
        "Forecasts": drawn,
        "Errors": [
            error_by_step(scaled),
            worst_series(windows.panel, series, numbers, order, mean),
            coverage_by_step(values, future, levels),
        ],
    }


def draw_weights(weights: Mapping[str, np.ndarray], names: Mapping[str, Sequence[str]]) -> list[ReportElement]:
    """Return charts of the weights of variables (`past` T V, `known` H V, `static` V) and steps (`attention` H T+H)."""
    titles = {
        "past": ("Variables of the past", "Mean weight of each variable at the steps before the forecast."),
        "known": ("Variables of the future", "Mean weight of each variable at the steps that are forecast."),
        "static": ("Properties of the series", "Mean weight of what is constant in each series."),
    }
    found: list[ReportElement] = []
    for name, (title, about) in titles.items():
        if name in weights and len(names[name]) > 1:
            means = weights[name].reshape(-1, weights[name].shape[-1]).mean(0)
            totals: dict[str, float] = {}
            for variable, mean in zip(names[name], means):
                totals[variable] = totals.get(variable, 0.0) + 100 * float(mean)
            found.append(Bars(title, about, dict(sorted(totals.items(), key=lambda pair: -pair[1])), unit="%"))
    if "attention" in weights:
        attention = weights["attention"]
        horizon, past = len(attention), attention.shape[1] - len(attention)
        steps = np.arange(-past, horizon) + 1
        shown = dict.fromkeys((0, horizon // 2, horizon - 1))
        found.append(
            Lines(
                "Attention",
                "Which steps a forecast looks at: mean weights over test windows and heads. Step 0 is the last one before the "
                "forecast.",
                x="step",
                y="weight",
                lines={f"{h + 1} ahead": (steps[: past + h + 1], attention[h, : past + h + 1]) for h in shown},
                marks={"forecast starts": 1.0},
            )
        )
    return found


def error_by_step(scaled: Mapping[str, np.ndarray]) -> Lines:
    steps = np.arange(1, next(iter(scaled.values())).shape[1] + 1)
    return Lines(
        "Error by horizon",
        "MASE by step, over all test windows. 1 is the in-sample one-step error of the seasonal naive forecast.",
        x="steps ahead",
        y="MASE",
        lines={name: (steps, nan_mean(x, 0)) for name, x in scaled.items()},
    )


def worst_series(
    found: Panel, series: np.ndarray, numbers: np.ndarray, order: np.ndarray, mean: Mapping[str, np.ndarray]
) -> Table:
    rows = [
        (found.names[numbers[i]], int((series == numbers[i]).sum()), *(float(x[i]) for x in mean.values()))
        for i in order[:LISTED_SERIES]
    ]
    return Table(
        "Worst series" if len(numbers) > 1 else "The series",
        "Mean MASE over the test windows of each series.",
        ("series", "windows", *mean),
        rows,
        heat=("this model",),
    )


def coverage_by_step(values: np.ndarray, future: np.ndarray, levels: IntervalEnds) -> Lines:
    steps, known = np.arange(1, values.shape[1] + 1), np.isfinite(future)
    inside = {
        f"{100 * level:.0f} %": (values[..., 1 + a] <= future) & (future <= values[..., 1 + b])
        for level, (a, b) in levels.items()
    }
    return Lines(
        "Coverage by horizon",
        "Fraction of values inside each interval; it should equal the nominal coverage.",
        x="steps ahead",
        y="fraction inside",
        lines={name: (steps, nan_mean(np.where(known, x, np.nan), 0)) for name, x in inside.items()},
    )


def draw_window(
    found: Panel, season: int, series: int, at: int, natural: np.ndarray, error: float, levels: IntervalEnds
) -> Lines:
    """Return the chart of one window: the end of its past, the actual values, and the forecast with intervals
    (`natural`: H, 1+Q).
    """
    ahead: np.ndarray = np.arange(len(natural))
    low, high = int(found.low[series]), int(found.high[series])
    begin, end = max(at - max(2 * len(natural), 2 * season), low, at - MAX_SHOWN_PAST_STEPS), min(at + len(natural), high)
    moment = f"step {at - low}" if found.layout == "rows" else found.frequency.label(found.times[at])
    past: np.ndarray = np.arange(begin, end) - at
    if has_dates(found):
        past = found.times[begin:end] / SECOND
        ahead = found.frequency.times(found.times[at], len(natural)) / SECOND
    was = (past, found.values[begin:end, found.column[series]])
    bands: dict[str, tuple[Numbers, Numbers, Numbers]] = {
        f"{100 * level:.0f} %": (ahead, natural[:, 1 + a], natural[:, 1 + b])
        for level, (a, b) in sorted(levels.items(), reverse=True)
    }
    return Lines(
        f"{found.names[series]}, from {moment}",
        f"The test window with the median error of this series: MASE {error:.3g}",
        x=f"time ({found.frequency.zone})"
        if found.frequency.zone
        else ""
        if has_dates(found)
        else f"steps ({found.frequency.article})",
        bands=bands,
        marks={"forecast starts": float(ahead[0])},
        lines={"actual": was, "forecast": (ahead, natural[:, 0])},
        dates=has_dates(found),
    )


def has_dates(panel: Panel) -> bool:
    """Return whether the steps of the series are dates."""
    return panel.layout != "rows" and panel.frequency.unit != "number"


def draw_series(panel: Panel) -> list[ReportElement]:
    """Return the first series in full."""
    charts: list[ReportElement] = []
    for series in range(min(PREVIEWED_SERIES, len(panel))):
        steps = slice(panel.low[series], panel.high[series])
        x = panel.times[steps] / SECOND if has_dates(panel) else np.arange(panel.high[series] - panel.low[series])
        title, values = panel.names[series], panel.values[steps, panel.column[series]]
        charts.append(
            Lines(title, "", x="" if has_dates(panel) else "steps", lines={title: (x, values)}, dates=has_dates(panel))
        )
    return charts


def nan_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean of the finite values; NaN if there are none."""
    real = np.isfinite(values)
    count = real.sum(axis)
    return np.where(count, np.where(real, values, 0).sum(axis) / np.maximum(count, 1), np.nan)

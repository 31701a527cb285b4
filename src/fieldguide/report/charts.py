"""Line charts, scatter plots and bar charts as inline SVG.

There is no plotting library: the text of a chart must be selectable, follow the light or dark colors of the page and
be readable on a phone. Colors are in report.css; elements have class names only. A chart is drawn twice, wide and
narrow, and the style sheet shows the one that fits, because text in a single scaled drawing would be too small on a
phone or too large on a desktop.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from fieldguide.core import report_elements
from fieldguide.report.axis import Frame, make_axis, make_date_axis, to_floats
from fieldguide.report.marks import (
    LABEL_HEIGHT,
    NUM_COLORS,
    Band,
    BarScale,
    assign_rows,
    draw_band,
    draw_bar,
    draw_curve,
    draw_dots,
    draw_legend,
    draw_mark,
    draw_points,
    label_curves,
    label_mark,
    select_points,
)
from fieldguide.report.text import choose_decimals, draw_label, el, estimate_width, format_number, join, shorten, to_python

WIDE, NARROW = (860, 330), (400, 280)  # width and height of a drawing
SQUARE = (400, 370)  # of charts with the line y = x, whose axes have the same length
MAX_POINTS = 1500  # points drawn of a scatter plot
MAX_BARS = 12  # bars that are shown without unfolding the rest
MAX_LABEL_CHARACTERS = 80  # of the label of a bar
MAX_DOTTED_POINTS = 24  # curves with at most this many points also show each point
MAX_DIRECT_LABELS = 7  # with more series than this, a legend replaces the labels next to the curves
MAX_DESCRIBED_CURVES = 8  # curves in the description for screen readers

Curve = tuple[np.ndarray, np.ndarray]  # x, y

NOTHING = el("p", "Nothing to show.", class_="remark")


def draw_lines(element: report_elements.Lines) -> Markup:
    """Draw curves with bands, vertical lines and y = x; the axis of y can be logarithmic."""
    curves, missing, nonpositive = read_curves(element)
    bands = read_bands(element)
    marks = {str(name): float(at) for name, at in zip(element.marks, to_floats(element.marks.values())) if not math.isnan(at)}
    all_x = np.concatenate(
        [*(xs for xs, _ in curves.values()), *(xs for xs, *_ in bands.values()), np.array(list(marks.values()), dtype=float)]
    )
    all_y = np.concatenate(
        [*(ys for _, ys in curves.values()), *(v for _, *edges in bands.values() for v in edges), np.empty(0)]
    )
    remarks = [
        describe_omission(missing, "missing or not a number"),
        describe_omission(nonpositive, "a logarithmic axis has no place for zero or less"),
    ]
    if not np.isfinite(all_y).any():
        return wrap_chart(NOTHING, remarks=remarks)

    names, faint = [*curves, *(name for name in bands if name not in curves)], set(map(str, element.faint))
    if element.diagonal:
        all_x = all_y = np.concatenate([all_x, all_y])
    square = element.diagonal and not element.log
    label = describe_curves(element, curves)
    drawings = []
    for kind, size in (("square", SQUARE),) if square else (("wide", WIDE), ("narrow", NARROW)):
        y = make_axis(all_y, count=4 if size[1] < 300 else 5, log=element.log)
        ticks = 5 if size[0] < 500 else 9
        x = y if square else make_date_axis(all_x, ticks) if element.dates else make_axis(all_x, count=ticks, pad=0.0)
        longest = max((estimate_width(name) for name in names), default=0)
        direct = 1 < len(names) <= MAX_DIRECT_LABELS and longest < size[0] * 0.24 and not square
        right = longest + 16 if direct else 14
        rows = assign_rows(marks, x, size[0], right)
        frame = Frame(size, x, y, right=right, top=24 + LABEL_HEIGHT * (max(rows.values()) + 1 if rows else 0))
        inside = [frame.draw_diagonal()] if element.diagonal else []
        inside += [draw_band(frame, band, names.index(name)) for name, band in bands.items()]
        inside += [draw_mark(frame, at) for at in marks.values()]
        inside += [draw_curve(frame, xs, ys, i, name in faint) for i, (name, (xs, ys)) in enumerate(curves.items())]
        parts = [frame.draw_grid(element.x, element.y), frame.clip(*inside)]
        for i, (name, (xs, ys)) in enumerate(curves.items()):
            if np.isfinite(ys).sum() <= MAX_DOTTED_POINTS and name not in faint:
                parts.append(draw_dots(frame, xs, ys, i))
        parts += [label_mark(frame, name, at, rows[name]) for name, at in marks.items() if name in rows]
        if direct:
            ends = {name: last_finite(curves[name][1] if name in curves else bands[name][2]) for name in names}
            parts += label_curves(frame, ends, faint)
        elif len(names) > 1:
            drawings.append(draw_legend(names, kind, faint))
        drawings.append(frame.draw(*parts, label=label, kind=kind))
    shown = [(name, xs[keep], ys[keep]) for name, (xs, ys) in curves.items() for keep in (select_points(ys),)]
    hover = format_hover_data(shown, element.x, element.y, element.dates)
    return wrap_chart(join(drawings), hover=hover, remarks=remarks, shape="square" if square else "")


def read_curves(element: report_elements.Lines) -> tuple[dict[str, Curve], int, int]:
    """Return the curves, the number of missing values, and the number of values that a logarithmic axis cannot show."""
    curves: dict[str, Curve] = {}
    missing = nonpositive = 0
    for name, (x_values, y_values) in element.lines.items():
        xs, ys = to_floats(x_values), to_floats(y_values)
        missing += abs(len(xs) - len(ys))
        xs, ys = xs[: len(ys)], ys[: len(xs)]
        missing += int((np.isnan(xs) | np.isnan(ys)).sum())
        if element.log:
            nonpositive += int((ys <= 0).sum())
            ys[ys <= 0] = np.nan
        curves[str(name)] = (xs, ys)
    return curves, missing, nonpositive


def read_bands(element: report_elements.Lines) -> dict[str, Band]:
    """Return the bands, each cut to its shortest array."""
    bands: dict[str, Band] = {}
    for name, values in element.bands.items():
        xs, low, high = (to_floats(v) for v in values)
        n = min(len(xs), len(low), len(high))
        low, high = low[:n], high[:n]
        bands[str(name)] = xs[:n], (np.where(low > 0, low, np.nan) if element.log else low), high
    return bands


def last_finite(ys: np.ndarray) -> float:
    """Return the last finite value, or NaN."""
    finite = ys[np.isfinite(ys)]
    return float(finite[-1]) if len(finite) else math.nan


def describe_curves(element: report_elements.Lines, curves: dict[str, Curve]) -> str:
    """Describe the chart in words, for screen readers."""
    sentences = []
    for name, (_, ys) in list(curves.items())[:MAX_DESCRIBED_CURVES]:
        finite = ys[np.isfinite(ys)]
        if len(finite):
            first, last, low, high = (format_number(float(v)) for v in (finite[0], finite[-1], finite.min(), finite.max()))
            sentences.append(f"{name} goes from {first} to {last}, lowest {low}, highest {high}")
    return f"{element.title}: {element.y or 'value'} by {element.x or 'position'}. " + "; ".join(sentences) + "."


def draw_scatter(element: report_elements.Scatter, max_points: int = MAX_POINTS) -> Markup:
    """Draw points; of more than `max_points` points, evenly chosen ones are drawn, and a remark says so."""
    points = to_floats(element.points).reshape(-1, 2) if len(element.points) else np.empty((0, 2))
    good = points[np.isfinite(points).all(axis=1)]
    missing = describe_omission(len(points) - len(good), "missing or not a number")
    if not len(good):
        return wrap_chart(NOTHING, remarks=[missing])
    shown = good[np.linspace(0, len(good) - 1, min(len(good), max_points)).astype(int)]
    xs, ys = good[:, 0], good[:, 1]
    x_low, x_high, y_low, y_high = (format_number(v) for v in (xs.min(), xs.max(), ys.min(), ys.max()))
    label = (
        f"{element.title}: {len(good)} points, {element.x or 'x'} from {x_low} to {x_high}, "
        f"{element.y or 'y'} from {y_low} to {y_high}."
    )
    if element.diagonal:
        xs = ys = good.ravel()
    drawings = []
    for kind, size in (("square", SQUARE),) if element.diagonal else (("wide", WIDE), ("narrow", NARROW)):
        y = make_axis(ys)
        frame = Frame(size, y if element.diagonal else make_axis(xs, count=5 if size[0] < 500 else 9), y, right=14)
        diagonal = frame.draw_diagonal() if element.diagonal else None
        grid = frame.draw_grid(element.x, element.y)
        drawings.append(frame.draw(grid, diagonal, draw_points(frame, shown), label=label, kind=kind))
    fewer = f"{format_number(len(shown))} of {format_number(len(good))} points are drawn, evenly chosen."
    return wrap_chart(
        join(drawings),
        shape="square" if element.diagonal else "",
        hover=format_hover_data([("", shown[:, 0], shown[:, 1])], element.x, element.y),
        remarks=[fewer if len(shown) < len(good) else "", missing],
    )


def draw_bars(element: report_elements.Bars, max_bars: int = MAX_BARS) -> Markup:
    """Draw horizontal bars from zero. Names and numbers are text of the page, so that long names wrap."""
    if not element.values:
        return NOTHING
    values = {str(name): to_python(v) for name, v in element.values.items()}
    intervals = {str(name): to_floats(interval) for name, interval in element.intervals.items()}
    edges = to_floats([*values.values(), *(v for name in values if name in intervals for v in intervals[name])])
    edges = edges[np.isfinite(edges)]
    low, high = min(0.0, *edges, 0.0), max(0.0, *edges, 0.0)
    unit = shorten(element.unit.strip(), 12)
    if unit == "%" and 50 < high <= 100:
        high = 100.0
    scale = BarScale(low, (high - low) or 1.0)

    digits = None if (edges == np.round(edges)).all() else choose_decimals(edges.tolist())
    if unit in ("%", "points") and not (edges == np.round(edges)).all():
        digits = 1
    pale = set(values) - set(map(str, element.highlight)) if element.highlight else set()
    rows = [draw_bar_row(scale, name, v, intervals.get(name), unit, digits, name in pale) for name, v in values.items()]
    longest = max(min(len(name), MAX_LABEL_CHARACTERS) for name in values)
    number_width = max(len(format_number(v, digits)) for v in values.values()) + len(unit) + (12 if intervals else 0)
    style = f"--label:{min(max(longest * 0.56 + 0.5, 3), 15):.1f}em;--said:{number_width * 0.56 + 1:.1f}em"
    kind = "bars stacks" if longest > 12 or intervals else "bars"  # in a narrow box, labels above their bars
    parts = [el("ul", *rows[:max_bars], class_=kind, style=style)]
    if len(rows) > max_bars:
        rest = el("ul", *rows[max_bars:], class_=kind, style=style)
        parts.append(el("details", el("summary", f"{len(rows) - max_bars} more"), rest))
    return el("div", *parts, class_="chart")


def draw_bar_row(
    scale: BarScale, name: str, value: float | None, interval: np.ndarray | None, unit: str, digits: int | None, pale: bool
) -> Markup:
    """Draw the name, the bar and the number of one value."""
    if interval is not None and not np.isfinite(interval).all():
        interval = None
    text = format_number(value, digits)
    numbers = [el("span", f"{text} {unit}" if unit and text != "–" else text, class_="value")]
    if interval is not None:
        numbers.append(el("span", "–".join(format_number(v, digits) for v in interval.tolist()), class_="span"))
    label = draw_label("span", name, MAX_LABEL_CHARACTERS, class_="label", dir="auto")
    bar, text_box = draw_bar(scale, value, interval), el("span", *numbers, class_="said")
    return el("li", label, bar, text_box, class_="pale" if pale else None)


def format_hover_data(series: Sequence[tuple[str, np.ndarray, np.ndarray]], x: str, y: str, dates: bool = False) -> str:
    """Return as JSON what the script shows under the pointer: the titles of the axes and the series (name, x, y)."""

    def shorten_numbers(values: np.ndarray, digits: int = 6) -> list[float | None]:
        return [None if v != v else float(f"{v:.{digits}g}") for v in values.tolist()]

    rows: list[Any] = [
        [name, i % NUM_COLORS, shorten_numbers(xs, 12 if dates else 6), shorten_numbers(ys)]
        for i, (name, xs, ys) in enumerate(series)
    ]
    return json.dumps({"x": x, "y": y, "dates": dates, "series": rows}, separators=(",", ":"))


def describe_omission(count: int, reason: str) -> str:
    """Return a remark on values that are not drawn, "" if there are none."""
    return f"{format_number(count)} {'value is' if count == 1 else 'values are'} not drawn: {reason}." if count else ""


def wrap_chart(drawings: Markup, *, remarks: Sequence[str], hover: str | None = None, shape: str = "") -> Markup:
    """Return the element of a chart with its remarks and the data for the pointer."""
    notes = [el("p", remark, class_="remark") for remark in remarks if remark]
    return el("div", drawings, *notes, class_=f"chart {shape}".rstrip(), data_hover=hover)

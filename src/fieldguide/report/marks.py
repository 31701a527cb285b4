"""Marks inside a chart: curves, bands, points, bars, vertical lines and their labels."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from fieldguide.report.axis import Axis, Frame
from fieldguide.report.text import draw_label, el, estimate_width, join, shorten

NUM_COLORS = 6  # classes c0 ... c5 in report.css; further series use them again, dashed
MAX_CURVE_POINTS = 320  # points drawn of a curve or band
MAX_LEGEND_CHARACTERS = 48  # of the name of a series in a legend
MAX_MARK_CHARACTERS = 28  # length of the label of a vertical line
LEFT_MARGIN_ESTIMATE = 40  # drawing units
LABEL_HEIGHT = 15  # distance of the base lines of two labels, in drawing units

Band = tuple[np.ndarray, np.ndarray, np.ndarray]  # x, low, high


def color_class(index: int) -> str:
    """Return the class of the color of a series."""
    return f"c{index % NUM_COLORS}" + (" dashed" if index >= NUM_COLORS else "")


def format_path(frame: Frame, xs: np.ndarray, ys: np.ndarray) -> str:
    """Return the `d` attribute of a curve; missing values leave a gap."""
    pen, parts = "M", []
    for x, y in zip(np.round(frame.x(xs), 1).tolist(), np.round(frame.y(ys), 1).tolist()):
        if y != y or x != x:
            pen = "M"
        else:
            parts.append(f"{pen}{x:g} {y:g}")
            pen = "L"
    return "".join(parts)


def select_points(ys: np.ndarray, max_points: int = MAX_CURVE_POINTS) -> np.ndarray:
    """Return the indices of the points to draw: of a long curve the minimum and maximum of each stretch."""
    if len(ys) <= max_points:
        return np.arange(len(ys))
    kept = {0, len(ys) - 1}
    for part in np.array_split(np.arange(len(ys)), max_points // 2):
        here = ys[part]
        kept |= {int(part[0])} if np.isnan(here).all() else {int(part[np.nanargmin(here)]), int(part[np.nanargmax(here)])}
    return np.array(sorted(kept))


def draw_curve(frame: Frame, xs: np.ndarray, ys: np.ndarray, index: int, faint: bool = False) -> Markup:
    """Draw a curve, thin and pale if it is `faint`."""
    keep = select_points(ys)
    look = " faint" if faint else " fine" if len(keep) > 200 else ""
    return el("path", class_=f"line {color_class(index)}{look}", d=format_path(frame, xs[keep], ys[keep]))


def draw_dots(frame: Frame, xs: np.ndarray, ys: np.ndarray, index: int) -> Markup:
    """Draw the points of a curve as circles."""
    good = np.isfinite(xs) & np.isfinite(ys)
    return join(
        el("circle", class_=f"dot {color_class(index)}", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.2)
        for x, y in zip(frame.x(xs[good]), frame.y(ys[good]))
    )


def draw_band(frame: Frame, band: Band, index: int) -> Markup:
    """Draw the area between two curves."""
    xs, low, high = band
    good = np.flatnonzero(np.isfinite(xs) & np.isfinite(low) & np.isfinite(high))
    if len(good) > MAX_CURVE_POINTS:
        good = good[np.linspace(0, len(good) - 1, MAX_CURVE_POINTS).astype(int)]
    there, back = format_path(frame, xs[good], low[good]), format_path(frame, xs[good][::-1], high[good][::-1])
    return el("path", class_=f"band {color_class(index)}", d=f"{there}L{back[1:]}Z" if there else "")


def draw_points(frame: Frame, points: np.ndarray) -> Markup:
    """Draw the points (N x 2) of a scatter plot, in several paths."""
    coordinates = np.round(np.stack([frame.x(points[:, 0]), frame.y(points[:, 1])], axis=1), 1)
    places = [f"M{x:g} {y:g}h0" for x, y in coordinates.tolist()]
    # Overlapping points of one path have the color of a single point; with eight paths, dense regions are darker.
    layers = [el("path", class_="points c0", d="".join(places[i::8])) for i in range(8) if places[i::8]]
    return el("g", *layers, class_="cloud few" if len(points) <= 150 else "cloud")


def draw_legend(names: Sequence[str], kind: str, faint: Collection[str] = ()) -> Markup:
    """Draw the names of the series with their colors, for drawings without room next to the curves."""
    look = lambda i, name: color_class(i) + (" faint" if name in faint else "")
    items = (
        el("li", el("i", class_=look(i, name)), draw_label("span", name, MAX_LEGEND_CHARACTERS)) for i, name in enumerate(names)
    )
    return el("ul", *items, class_=f"legend {kind}")


def label_curves(frame: Frame, ends: dict[str, float], faint: Collection[str] = ()) -> list[Markup]:
    """Write each name next to the end of its curve, at least one line apart."""
    order = sorted((float(frame.y(y)) if y == y else frame.top, i, name) for i, (name, y) in enumerate(ends.items()))
    heights: list[float] = []
    floor, bottom = frame.top + 2, frame.top + frame.h
    for y, _, _ in order:
        floor = max(y, floor)
        heights.append(floor)
        floor += LABEL_HEIGHT
    if heights and heights[-1] > bottom:  # move labels below the frame up again
        for k in range(len(heights) - 1, -1, -1):
            heights[k] = min(heights[k], bottom if k == len(heights) - 1 else heights[k + 1] - LABEL_HEIGHT)
    x = f"{frame.left + frame.w + 8:.1f}"
    look = lambda i, name: f"direct {color_class(i)}" + (" faint" if name in faint else "")
    return [el("text", name, class_=look(i, name), x=x, y=f"{y:.1f}", dy="0.34em") for y, (_, i, name) in zip(heights, order)]


def draw_mark(frame: Frame, at: float) -> Markup:
    """Draw a vertical line at a value of x."""
    x = f"{frame.x(at):.1f}"
    return el("line", class_="mark", x1=x, x2=x, y1=frame.top, y2=frame.top + frame.h)


def label_mark(frame: Frame, name: str, at: float, row: int) -> Markup:
    """Write the label of a vertical line above the frame; row 0 is the lowest."""
    text = shorten(name, MAX_MARK_CHARACTERS)
    half = estimate_width(text) / 2
    x = min(max(frame.x(at), frame.left + half), frame.width - half - 2)
    y = frame.top - 5 - LABEL_HEIGHT * row
    tip = el("title", name) if text != name else None
    return el("text", text, tip, class_="marked", x=f"{x:.1f}", y=f"{y:.1f}", text_anchor="middle")


def assign_rows(marks: dict[str, float], axis: Axis, width: float, right: float, max_rows: int = 4) -> dict[str, int]:
    """Assign a row to the label of each vertical line of a drawing, so that labels do not overlap.

    `right` is the right margin; the left one is estimated, because the frame depends on the number of rows. Labels that
    do not fit into `max_rows` rows are left out.
    """
    rows: dict[str, int] = {}
    ends = [-math.inf] * max_rows
    for name, at in sorted(marks.items(), key=lambda pair: pair[1]):
        half = estimate_width(shorten(name, MAX_MARK_CHARACTERS)) / 2
        x = LEFT_MARGIN_ESTIMATE + axis(at) * (width - LEFT_MARGIN_ESTIMATE - 12 - right)
        middle = min(max(float(x), LEFT_MARGIN_ESTIMATE + half), width - half)
        row = next((r for r in range(max_rows) if middle - half > ends[r] + 8), None)
        if row is not None:
            rows[name], ends[row] = row, middle + half
    return rows


@dataclass(frozen=True)
class BarScale:
    """The common scale of horizontal bars. Calling it maps a value to a percentage of the width."""

    low: float
    span: float

    def __call__(self, value: float) -> float:
        return round((float(value) - self.low) / self.span * 100, 2)


def draw_bar(scale: BarScale, value: float | None, interval: np.ndarray | None) -> Markup:
    """Draw a horizontal bar from zero with its interval (low, high)."""
    zero = scale(0)
    parts: list[Markup] = []
    if value is not None and math.isfinite(value):
        start, end = sorted((zero, scale(value)))
        parts.append(el("rect", class_="bar", x=start, y=3, width=round(end - start, 2), height=14))
    if scale.low < 0:
        parts.append(el("line", class_="zero", x1=zero, x2=zero, y1=0, y2=20))
    if interval is not None:
        low, high = scale(interval[0]), scale(interval[1])
        parts.append(el("path", class_="whisker", d=f"M{low} 10H{high}M{low} 6V14M{high} 6V14"))
    return el("svg", *parts, viewBox="0 0 100 20", preserveAspectRatio="none", aria_hidden="true")

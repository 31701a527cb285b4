"""Axes of charts: their range, their ticks, and the frame that places values in a drawing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from markupsafe import Markup

from fieldguide.report.text import el, estimate_width, format_number, format_power, join, shorten

Values = TypeVar("Values", float, np.ndarray)


def to_floats(values: Iterable[Any]) -> np.ndarray:
    """Return a new float array; None and infinite values become NaN."""
    array = np.array(values if isinstance(values, np.ndarray) else list(values), dtype=float)
    array[~(np.abs(array) < 1e300)] = np.nan
    return array


def choose_ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """Return about `count` round values within [low, high]: steps of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / max(count, 1)
    base = 10.0 ** math.floor(math.log10(rough))
    step = base * next(f for f in (1, 2, 2.5, 5, 10) if f * base >= rough * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def format_ticks(values: Sequence[float]) -> list[str]:
    """Format all ticks of an axis alike, with no more digits than their distance needs."""
    if len(values) < 2:
        return [format_number(v) for v in values]
    biggest, step = max(map(abs, values)), min(b - a for a, b in pairwise(values))
    if step < biggest * 1e-4:  # far from zero and close together: every digit counts
        return [f"{v:.15g}".replace("-", "−") for v in values]
    if biggest >= 1e15 or biggest < 1e-3:
        return ["0" if v == 0 else ("−" if v < 0 else "") + format_power(abs(v)) for v in values]
    unit, name = next((u, n) for u, n in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k"), (0, "")) if biggest >= u)
    unit = 1e3 if name == " k" else unit or 1
    digits = next((d for d in range(7) if abs(step / unit * 10**d - round(step / unit * 10**d)) < 1e-6), 7)
    return ["0" if v == 0 else f"{v / unit:.{digits}f}{name}".replace("-", "−") for v in values]


@dataclass(frozen=True)
class Axis:
    """A range with its ticks (value, text). Calling it maps values to 0 .. 1 along the axis."""

    low: float
    high: float
    log: bool
    ticks: Sequence[tuple[float, str]]

    def __call__(self, value: Values) -> Values:
        if self.log:
            return (np.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def make_axis(values: np.ndarray, *, count: int = 5, log: bool = False, pad: float = 0.04) -> Axis:
    """Return an axis for all finite values with about `count` ticks; `pad` is the margin, a fraction of the range.

    A linear axis starts at zero if the values come near it.
    """
    values = values[np.isfinite(values)]
    return _make_log_axis(values, count, pad) if log else _make_linear_axis(values, count, pad)


def _make_log_axis(values: np.ndarray, count: int, pad: float) -> Axis:
    values = values[values > 0]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.1, 1.0)
    factor = 2 if high / low < 1.0001 else (high / low) ** pad
    low, high = low / factor, high * factor
    decades = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    if len(decades) >= 3:
        at = [10.0**k for k in decades[:: math.ceil(len(decades) / (count + 2))]]
    else:
        at = [f * 10.0**k for k in range(decades.start - 1, decades.stop + 1) for f in (1, 2, 5)]
        at = [v for v in at if low <= v <= high]
        at = at if len(at) >= 3 else [v for v in choose_ticks(low, high, count) if v > 0]
    return Axis(low, high, True, [(v, format_number(v)) for v in at])


def _make_linear_axis(values: np.ndarray, count: int, pad: float) -> Axis:
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        reach = abs(low) * 0.1
        low, high, whole = (low - reach, high + reach, False) if reach else (0.0, 1.0, False)  # all zero: as for scores
    else:
        whole = bool((values == np.round(values)).all())
        floor, ceiling, margin = low, high, (high - low) * pad
        low, high = low - margin, high + margin
        if floor >= 0 and (low < 0 or floor < (0.4 if pad else 0.06) * ceiling):
            low = 0.0
        if ceiling <= 1 < high:  # fractions and many scores have the maximum 1
            high = 1.0
    at = choose_ticks(low, high, count, whole=whole)
    if pad and len(at) > 1:  # a range that nearly reaches its next round value is extended to it
        step = at[1] - at[0]
        low = at[0] - step if at[0] - step > low - 0.4 * step else low
        high = at[-1] + step if at[-1] + step < high + 0.4 * step else high
        at = choose_ticks(low, high, count, whole=whole)
    return Axis(low, high, False, list(zip(at, format_ticks(at))))


MINUTE, HOUR, DAY, MONTH, YEAR = 60, 3600, 86_400, 2_629_746, 31_556_952  # seconds; months and years are means
DATE_STEPS = (
    *((n, "second", n) for n in (1, 5, 15, 30)),
    *((n * MINUTE, "second", n * MINUTE) for n in (1, 5, 15, 30)),
    *((n * HOUR, "second", n * HOUR) for n in (1, 3, 6, 12)),
    *((n * DAY, "second", n * DAY) for n in (1, 2, 7, 14)),
    *((n * MONTH, "month", n) for n in (1, 3, 6)),
    *((n * YEAR, "month", 12 * n) for n in (1, 2, 5, 10, 20, 50, 100, 200, 500)),
)  # mean length in seconds, unit, number of units
MONDAY = 4 * DAY  # the first Monday after 1970-01-01


def make_date_axis(values: np.ndarray, count: int) -> Axis:
    """Return an axis without margins for seconds since 1970, with at most about `count` ticks at round dates and times."""
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    high = high if high > low else low + 1
    _, unit, step = next((s for s in DATE_STEPS if (high - low) / s[0] <= count), DATE_STEPS[-1])
    if unit == "second":
        origin = MONDAY if step % (7 * DAY) == 0 else 0
        at = np.arange(math.ceil((low - origin) / step), math.floor((high - origin) / step) + 1) * step + origin
        return Axis(low, high, False, [(float(v), format_time(int(v), step)) for v in at])
    months = np.array([low, high]).astype("M8[s]").astype("M8[M]").astype(int)
    firsts = np.arange(-(-months[0] // step) * step, months[1] + 1, step).astype("M8[M]")
    form = "%Y" if step % 12 == 0 else "%b %Y"
    ticks = [(float(m.astype("M8[s]").astype(int)), m.item().strftime(form)) for m in firsts]
    return Axis(low, high, False, [(v, text) for v, text in ticks if low <= v <= high])


def format_time(seconds: int, step: int) -> str:
    """Return the date, or within a day the time, of a tick: `22 Apr`, `06:00`."""
    moment: datetime = np.datetime64(seconds, "s").item()
    if seconds % DAY == 0:
        return f"{moment.day} {moment:%b}"
    return f"{moment:%H:%M:%S}" if step % MINUTE else f"{moment:%H:%M}"


class Frame:
    """The area of a drawing with margins, grid, tick labels and axis titles. `x` and `y` return drawing coordinates."""

    def __init__(self, size: tuple[int, int], x: Axis, y: Axis, *, right: float = 12, top: float = 24):
        (self.width, self.height), self.x_axis, self.y_axis = size, x, y
        self.left = 12 + max((estimate_width(text) for _, text in y.ticks), default=20)
        self.top, self.right, self.bottom = top, right, 44
        self.w, self.h = self.width - self.left - right, self.height - top - self.bottom

    def x(self, value: Values) -> Values:
        """Return the horizontal coordinate of values."""
        return self.left + self.x_axis(value) * self.w

    def y(self, value: Values) -> Values:
        """Return the vertical coordinate of values."""
        return self.top + (1 - self.y_axis(value)) * self.h

    def draw_grid(self, x_title: str, y_title: str) -> Markup:
        """Draw grid lines, axes, tick labels and titles."""
        base, max_length = self.top + self.h, int(self.w / 7)
        parts: list[Markup] = []
        start, end = f"{self.left:.1f}", f"{self.left + self.w:.1f}"
        for value, text in self.y_axis.ticks:
            y = f"{self.y(value):.1f}"
            parts.append(el("line", class_="grid", x1=start, x2=end, y1=y, y2=y))
            parts.append(el("text", text, x=f"{self.left - 7:.1f}", y=y, dy="0.34em", text_anchor="end"))
        parts.append(el("line", class_="axis", x1=start, x2=end, y1=base, y2=base))
        for value, text in self.x_axis.ticks:
            x = self.x(value)
            half = estimate_width(text) / 2
            anchor = "end" if x + half > self.width else "middle"
            parts.append(el("line", class_="axis", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=base, y2=base + 4))
            parts.append(el("text", text, x=f"{min(x, self.width):.1f}", y=base + 18, text_anchor=anchor))
        if x_title:
            middle = f"{self.left + self.w / 2:.1f}"
            title = shorten(x_title, max_length)
            parts.append(el("text", title, class_="title", x=middle, y=self.height - 6, text_anchor="middle"))
        if y_title:
            parts.append(el("text", shorten(y_title, max_length), class_="title", x=2, y=12))
        return join(parts)

    def draw_diagonal(self) -> Markup:
        """Draw the line y = x within both ranges."""
        low = max(self.x_axis.low, self.y_axis.low)
        high = min(self.x_axis.high, self.y_axis.high)
        if low >= high:
            return Markup("")
        start, end = (f"{self.x(low):.1f}", f"{self.y(low):.1f}"), (f"{self.x(high):.1f}", f"{self.y(high):.1f}")
        return el("line", class_="diagonal", x1=start[0], y1=start[1], x2=end[0], y2=end[1])

    def clip(self, *parts: Markup) -> Markup:
        """Clip parts to the axes; a nested svg element does so without an id."""
        box = f"{self.left:.1f} {self.top:.1f} {self.w:.1f} {self.h:.1f}".split()
        return el("svg", *parts, x=box[0], y=box[1], width=box[2], height=box[3], viewBox=" ".join(box))

    def draw(self, *parts: Markup | None, label: str, kind: str) -> Markup:
        """Return the drawing; `label` describes it for screen readers, `kind` is its class."""
        x, y = self.x_axis, self.y_axis
        return el(
            "svg",
            *parts,
            class_=f"drawing {kind}",
            viewBox=f"0 0 {self.width} {self.height}",
            role="img",
            aria_label=label,
            data_box=f"{self.left:.1f} {self.top:.1f} {self.w:.1f} {self.h:.1f}",
            data_x=f"{x.low!r} {x.high!r}",
            data_y=f"{y.low!r} {y.high!r} {int(y.log)}",
        )

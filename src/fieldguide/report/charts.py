"""Charts as inline SVG, and the helpers of all drawings: `el` for markup, `number` for figures.

No plotting library: a report has three kinds of chart, whose text must be selectable, follow the page's light
or dark colors and be readable on a phone. Colors are in report.css; this module uses class names only. A curve
is drawn twice, wide and narrow, and the style sheet shows the one that fits: one drawing scaled to both would
have tiny text on a phone or huge text on a desktop.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from fieldguide.core import report_elements

COLOURS = 6  # .c0 ... .c5 in report.css; later series reuse them dashed
WIDE, NARROW = (860, 330), (400, 280)
SQUARE = (400, 370)  # where y = x matters, both axes deserve the same length
LEAF = frozenset({"path", "line", "rect", "circle", "image", "use", "img"})
# What HTML and XML forbid, lone surrogates, which UTF-8 cannot hold, and the marks that turn all text around.
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202d\u202e\ud800-\udfff\ufffe\uffff]")


# -- mark-up -----------------------------------------------------------------------------------------------


def clean(text: Any) -> str:
    """Return text that any parser accepts, with forbidden characters replaced."""
    return text if isinstance(text, Markup) else FORBIDDEN.sub("\ufffd", str(text))


def el(name: str, *children: Any, **attributes: Any) -> Markup:
    """One element. Children and attribute values are escaped unless they are mark-up; None is left out.

    >>> el("text", "a < b", class_="tick", text_anchor="end")
    Markup('<text class="tick" text-anchor="end">a &lt; b</text>')
    """
    inside = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(clean(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in LEAF:
        return Markup(f"<{name}{inside}/>")
    body = "".join(escape(clean(child)) for child in children if child is not None)
    return Markup(f"<{name}{inside}>{body}</{name}>")


def join(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


# -- figures -----------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Return NumPy and tensor scalars as Python ones; integers beyond the range of floats as text."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    return str(value) if isinstance(value, int) and value.bit_length() > 1000 else value


def number(value: Any, decimals: int | None = None) -> str:
    """Format a number for people: `0.9861`, `12,345`, `1.23 M`, `3·10⁻⁵`; missing values and NaN are `–`."""
    value = plain(value)
    if value is None or value != value:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if abs(value) == math.inf:
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if decimals is not None and size < 1e4:
        text = f"{size:.{decimals}f}"
    elif size >= 1e15 or 0 < size < 1e-4:
        text = power(size)
    elif size >= 1e7:
        unit, name = next((u, n) for u, n in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if size >= u)
        text = f"{size / unit:.3g}" if size / unit < 999.5 else f"{size / unit:.0f}"
        text = f"{text} {name}"
    elif size >= 1e4:
        text = f"{size:,.0f}"
    else:
        text = str(size) if isinstance(value, int) else f"{size:.4g}"
    return f"−{text}" if value < 0 and text.strip("0.") else text


def power(size: float) -> str:
    """Format in scientific notation without the E: 3·10⁻⁵."""
    size = float(min(size, 10**308))
    mantissa, exponent = f"{size:.2e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if mantissa == "1" else f"{mantissa}·10{raised}"


def is_number(value: Any) -> bool:
    return isinstance(value := plain(value), (int, float)) and not isinstance(value, bool)


def decimals_of(values: Sequence[float]) -> int | None:
    """Return a number of decimals for a whole column, so that its points align, or None if sizes differ too much."""
    sizes = [abs(v) for v in values if v and math.isfinite(v)]
    if not sizes or max(sizes) >= 1e4 or min(sizes) < 1e-4 or max(sizes) / min(sizes) > 1e4:
        return None
    exponent = math.floor(math.log10(max(sizes)))
    most = 3 - exponent if exponent >= 0 else 2 - exponent
    return max(len(f"{v:.{most}f}".rstrip("0").partition(".")[2]) for v in sizes)


# -- axes --------------------------------------------------------------------------------------------------


def column(values: Iterable[Any]) -> np.ndarray:
    """Return a new float array; None and infinite values become NaN."""
    array = np.array(values if isinstance(values, np.ndarray) else list(values), dtype=float)
    array[~(np.abs(array) < 1e300)] = np.nan
    return array


def ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """Return about `count` round values within [low, high]: steps of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / max(count, 1)
    base = 10.0 ** math.floor(math.log10(rough))
    step = base * next(f for f in (1, 2, 2.5, 5, 10) if f * base >= rough * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """Format all ticks of an axis alike, with no more digits than their distance needs."""
    if len(values) < 2:
        return [number(v) for v in values]
    biggest, step = max(map(abs, values)), min(b - a for a, b in pairwise(values))
    if step < biggest * 1e-4:  # far from zero and close together: every digit counts
        return [f"{v:.15g}".replace("-", "−") for v in values]
    if biggest >= 1e15 or biggest < 1e-3:
        return ["0" if v == 0 else ("−" if v < 0 else "") + power(abs(v)) for v in values]
    unit, name = next((u, n) for u, n in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k"), (0, "")) if biggest >= u)
    unit = 1e3 if name == " k" else unit or 1
    digits = next((d for d in range(7) if abs(step / unit * 10**d - round(step / unit * 10**d)) < 1e-6), 7)
    return ["0" if v == 0 else f"{v / unit:.{digits}f}{name}".replace("-", "−") for v in values]


@dataclass(frozen=True)
class Axis:
    """A range with its ticks; calling it maps values to 0 .. 1 along the axis."""

    low: float
    high: float
    log: bool
    ticks: Sequence[tuple[float, str]]

    def __call__(self, value):
        if self.log:
            return (np.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def axis(values: np.ndarray, *, count: int = 5, log: bool = False, pad: float = 0.04) -> Axis:
    """Return an axis for all finite values; it starts at zero if the data come near it."""
    values = values[np.isfinite(values)]
    if log:
        values = values[values > 0]
    if len(values):
        low, high = float(values.min()), float(values.max())
    else:
        low, high = (0.1, 1.0) if log else (0.0, 1.0)
    if log:
        factor = 2 if high / low < 1.0001 else (high / low) ** pad
        low, high = low / factor, high * factor
        decades = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
        if len(decades) >= 3:
            at = [10.0**k for k in decades[:: math.ceil(len(decades) / (count + 2))]]
            return Axis(low, high, True, [(v, number(v)) for v in at])
        at = [f * 10.0**k for k in range(decades.start - 1, decades.stop + 1) for f in (1, 2, 5)]
        at = [v for v in at if low <= v <= high]
        at = at if len(at) >= 3 else [v for v in ticks(low, high, count) if v > 0]
        return Axis(low, high, True, [(v, number(v)) for v in at])
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        reach = abs(low) * 0.1 or 0.5
        low, high, whole = low - reach, high + reach, False
    else:
        whole = bool((values == np.round(values)).all())
        floor, ceiling, margin = low, high, (high - low) * pad
        low, high = low - margin, high + margin
        if floor >= 0 and (low < 0 or floor < (0.4 if pad else 0.06) * ceiling):
            low = 0.0
        if ceiling <= 1 < high:  # shares and scores end at one, and the axis should say so
            high = 1.0
    at = ticks(low, high, count, whole=whole)
    if pad and len(at) > 1:  # a range that nearly reaches its next round value goes up to it
        step = at[1] - at[0]
        low = at[0] - step if at[0] - step > low - 0.4 * step else low
        high = at[-1] + step if at[-1] + step < high + 0.4 * step else high
        at = ticks(low, high, count, whole=whole)
    return Axis(low, high, False, list(zip(at, tick_texts(at))))


# -- the frame of a chart ----------------------------------------------------------------------------------


def width_of(text: str) -> float:
    """Estimate the width of a label in drawing units: text cannot be measured without a browser."""
    return 6.5 * len(text)


def shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


class Frame:
    """The box of one drawing: margins, grid, tick labels and axis titles; `x` and `y` place values in it."""

    def __init__(self, size, x: Axis, y: Axis, *, right: float = 12, top: float = 24):
        (self.width, self.height), self.x_axis, self.y_axis = size, x, y
        self.left = 12 + max((width_of(text) for _, text in y.ticks), default=20)
        self.top, self.right, self.bottom = top, right, 44
        self.w, self.h = self.width - self.left - right, self.height - top - self.bottom

    def x(self, value):
        return self.left + self.x_axis(value) * self.w

    def y(self, value):
        return self.top + (1 - self.y_axis(value)) * self.h

    def grid(self, x_title: str, y_title: str) -> Markup:
        base, most, parts = self.top + self.h, int(self.w / 7), []
        start, end = f"{self.left:.1f}", f"{self.left + self.w:.1f}"
        for value, text in self.y_axis.ticks:
            at = f"{self.y(value):.1f}"
            parts.append(el("line", class_="grid", x1=start, x2=end, y1=at, y2=at))
            parts.append(el("text", text, x=f"{self.left - 7:.1f}", y=at, dy="0.34em", text_anchor="end"))
        parts.append(el("line", class_="axis", x1=start, x2=end, y1=base, y2=base))
        for value, text in self.x_axis.ticks:
            at = self.x(value)
            half = width_of(text) / 2
            anchor = "end" if at + half > self.width else "middle"
            parts.append(el("line", class_="axis", x1=f"{at:.1f}", x2=f"{at:.1f}", y1=base, y2=base + 4))
            parts.append(el("text", text, x=f"{min(at, self.width):.1f}", y=base + 18, text_anchor=anchor))
        if x_title:
            parts.append(
                el(
                    "text",
                    shorten(x_title, most),
                    class_="title",
                    x=f"{self.left + self.w / 2:.1f}",
                    y=self.height - 6,
                    text_anchor="middle",
                )
            )
        if y_title:
            parts.append(el("text", shorten(y_title, most), class_="title", x=2, y=12))
        return join(parts)

    def diagonal(self) -> Markup:
        low = max(self.x_axis.low, self.y_axis.low)
        high = min(self.x_axis.high, self.y_axis.high)
        if low >= high:
            return Markup("")
        return el(
            "line",
            class_="diagonal",
            x1=f"{self.x(low):.1f}",
            y1=f"{self.y(low):.1f}",
            x2=f"{self.x(high):.1f}",
            y2=f"{self.y(high):.1f}",
        )

    def plot(self, *parts: Markup) -> Markup:
        """What must stay inside the axes: a nested svg clips without needing an id."""
        box = f"{self.left:.1f} {self.top:.1f} {self.w:.1f} {self.h:.1f}".split()
        return el("svg", *parts, x=box[0], y=box[1], width=box[2], height=box[3], viewBox=" ".join(box))

    def svg(self, *parts: Markup, label: str, kind: str) -> Markup:
        x, y, view = self.x_axis, self.y_axis, f"0 0 {self.width} {self.height}"
        return el(
            "svg",
            *parts,
            class_=f"drawing {kind}",
            viewBox=view,
            role="img",
            aria_label=label,
            data_box=f"{self.left:.1f} {self.top:.1f} {self.w:.1f} {self.h:.1f}",
            data_x=f"{x.low!r} {x.high!r}",
            data_y=f"{y.low!r} {y.high!r} {int(y.log)}",
        )


def colour(index: int) -> str:
    return f"c{index % COLOURS}" + (" dashed" if index >= COLOURS else "")


def path(frame: Frame, xs: np.ndarray, ys: np.ndarray) -> str:
    """Return the `d` attribute of a curve; missing values leave a gap."""
    pen, parts = "M", []
    for x, y in zip(np.round(frame.x(xs), 1).tolist(), np.round(frame.y(ys), 1).tolist()):
        if y != y or x != x:
            pen = "M"
        else:
            parts.append(f"{pen}{x:g} {y:g}")
            pen = "L"
    return "".join(parts)


def thin(ys: np.ndarray, most: int = 320) -> np.ndarray:
    """Return the indices to draw of a long curve: the extremes of each stretch, so that no spike is lost."""
    if len(ys) <= most:
        return np.arange(len(ys))
    kept = {0, len(ys) - 1}
    for part in np.array_split(np.arange(len(ys)), most // 2):
        here = ys[part]
        kept |= {int(part[0])} if np.isnan(here).all() else {int(part[np.nanargmin(here)]), int(part[np.nanargmax(here)])}
    return np.array(sorted(kept))


def legend(names: Sequence[str], kind: str) -> Markup:
    """Names with swatches, where a drawing has no room for them beside the curves."""
    return el("ul", *(el("li", el("i", class_=colour(i)), name) for i, name in enumerate(names)), class_=f"legend {kind}")


def hover(series: list[tuple[str, int, np.ndarray, np.ndarray]], x: str, y: str) -> str:
    """What the script needs for read-outs under the pointer."""

    def short(values):
        return [None if v != v else float(f"{v:.6g}") for v in values.tolist()]

    return json.dumps(
        {"x": x, "y": y, "series": [[name, i % COLOURS, short(xs), short(ys)] for name, i, xs, ys in series]},
        separators=(",", ":"),
    )


def left_out(count: int, why: str) -> str:
    return f"{number(count)} {'value is' if count == 1 else 'values are'} not drawn: {why}." if count else ""


def finish(drawings: Markup, *, remarks: Sequence[str], data: str | None = None, shape: str = "") -> Markup:
    notes = [el("p", remark, class_="remark") for remark in remarks if remark]
    return el("div", drawings, *notes, class_=f"chart {shape}".rstrip(), data_hover=data)


NOTHING = el("p", "Nothing to show.", class_="remark")


# -- the charts --------------------------------------------------------------------------------------------


def lines(exhibit: report_elements.Lines) -> Markup:
    """Curves with bands, vertical marks, y = x and a logarithmic axis."""
    curves, lost, hidden = {}, 0, 0
    for name, (xs, ys) in exhibit.lines.items():
        xs, ys = column(xs), column(ys)
        lost += abs(len(xs) - len(ys))
        xs, ys = xs[: len(ys)], ys[: len(xs)]
        lost += int((np.isnan(xs) | np.isnan(ys)).sum())
        if exhibit.log:
            hidden += int((ys <= 0).sum())
            ys[ys <= 0] = np.nan
        curves[str(name)] = (xs, ys)
    bands = {}
    for name, values in exhibit.bands.items():
        xs, low, high = (column(v) for v in values)
        n = min(len(xs), len(low), len(high))
        low, high = low[:n], high[:n]
        bands[str(name)] = xs[:n], (np.where(low > 0, low, np.nan) if exhibit.log else low), high
    marks = {str(name): float(at) for name, at in zip(exhibit.marks, column(exhibit.marks.values())) if not math.isnan(at)}
    all_x = np.concatenate(
        [*(xs for xs, _ in curves.values()), *(xs for xs, *_ in bands.values()), np.array(list(marks.values()), dtype=float)]
    )
    all_y = np.concatenate(
        [*(ys for _, ys in curves.values()), *(v for _, *edges in bands.values() for v in edges), np.empty(0)]
    )
    remarks = [left_out(lost, "missing or not a number"), left_out(hidden, "a logarithmic axis has no place for zero or less")]
    if not np.isfinite(all_y).any():
        return finish(NOTHING, remarks=remarks)

    names = [*curves, *(name for name in bands if name not in curves)]
    if exhibit.diagonal:
        all_x = all_y = np.concatenate([all_x, all_y])
    square = exhibit.diagonal and not exhibit.log
    label = describe(exhibit, curves)
    drawings = []
    for kind, size in (("square", SQUARE),) if square else (("wide", WIDE), ("narrow", NARROW)):
        y = axis(all_y, count=4 if size[1] < 300 else 5, log=exhibit.log)
        x = y if square else axis(all_x, count=5 if size[0] < 500 else 9, pad=0.0)
        longest = max((width_of(name) for name in names), default=0)
        direct = 1 < len(names) <= 7 and longest < size[0] * 0.24 and not square
        beside = longest + 16 if direct else 14
        rows = stagger(marks, lambda at, x=x, size=size, b=beside: 40 + x(at) * (size[0] - 52 - b), size[0])
        frame = Frame(size, x, y, right=beside, top=24 + 15 * (max(rows.values()) + 1 if rows else 0))
        parts = [frame.grid(exhibit.x, exhibit.y)]
        inside = [frame.diagonal()] if exhibit.diagonal else []
        inside += [draw_band(frame, band, names.index(name)) for name, band in bands.items()]
        inside += [draw_mark(frame, at) for at in marks.values()]
        for i, (xs, ys) in enumerate(curves.values()):
            keep = thin(ys)
            fine = " fine" if len(keep) > 200 else ""
            inside.append(el("path", class_=f"line {colour(i)}{fine}", d=path(frame, xs[keep], ys[keep])))
        parts.append(frame.plot(*inside))
        parts += [dots(frame, xs, ys, colour(i)) for i, (xs, ys) in enumerate(curves.values()) if np.isfinite(ys).sum() <= 24]
        parts += [mark_label(frame, name, at, rows[name]) for name, at in marks.items() if name in rows]
        if direct:
            ends = {name: last(curves[name][1]) if name in curves else last(bands[name][2]) for name in names}
            parts += direct_labels(frame, ends)
        elif len(names) > 1:
            drawings.append(legend(names, kind))
        drawings.append(frame.svg(*parts, label=label, kind=kind))
    series = [(name, i, xs[keep], ys[keep]) for i, (name, (xs, ys)) in enumerate(curves.items()) for keep in (thin(ys),)]
    return finish(join(drawings), data=hover(series, exhibit.x, exhibit.y), remarks=remarks, shape="square" if square else "")


def last(ys: np.ndarray) -> float:
    real = ys[np.isfinite(ys)]
    return float(real[-1]) if len(real) else math.nan


def describe(exhibit: report_elements.Lines, curves: dict) -> str:
    """Describe the chart in words, for screen readers."""
    said = []
    for name, (_, ys) in list(curves.items())[:8]:
        real = ys[np.isfinite(ys)]
        if len(real):
            said.append(
                f"{name} goes from {number(float(real[0]))} to {number(float(real[-1]))}, "
                f"lowest {number(float(real.min()))}, highest {number(float(real.max()))}"
            )
    return f"{exhibit.title}: {exhibit.y or 'value'} by {exhibit.x or 'position'}. " + "; ".join(said) + "."


def dots(frame: Frame, xs: np.ndarray, ys: np.ndarray, look: str) -> Markup:
    good = np.isfinite(xs) & np.isfinite(ys)
    return join(
        el("circle", class_=f"dot {look}", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.2)
        for x, y in zip(frame.x(xs[good]), frame.y(ys[good]))
    )


def draw_band(frame: Frame, band, index: int) -> Markup:
    xs, low, high = band
    good = np.flatnonzero(np.isfinite(xs) & np.isfinite(low) & np.isfinite(high))
    if len(good) > 320:
        good = good[np.linspace(0, len(good) - 1, 320).astype(int)]
    there, back = path(frame, xs[good], low[good]), path(frame, xs[good][::-1], high[good][::-1])
    return el("path", class_=f"band {colour(index)}", d=f"{there}L{back[1:]}Z" if there else "")


def draw_mark(frame: Frame, at: float) -> Markup:
    x = f"{frame.x(at):.1f}"
    return el("line", class_="mark", x1=x, x2=x, y1=frame.top, y2=frame.top + frame.h)


def mark_label(frame: Frame, name: str, at: float, row: int) -> Markup:
    text = shorten(name, 28)
    half = width_of(text) / 2
    x = min(max(frame.x(at), frame.left + half), frame.width - half - 2)
    y = frame.top - 5 - 15 * row
    return el("text", text, class_="marked", x=f"{x:.1f}", y=f"{y:.1f}", text_anchor="middle")


def stagger(marks: dict[str, float], place, width: float, most: int = 4) -> dict[str, int]:
    """Assign a row to the label of each mark, so that labels do not overlap; labels beyond `most` rows are left
    out.
    """
    rows: dict[str, int] = {}
    ends = [-math.inf] * most
    for name, at in sorted(marks.items(), key=lambda pair: pair[1]):
        half = width_of(shorten(name, 28)) / 2
        middle = min(max(float(place(at)), 40 + half), width - half)
        row = next((r for r in range(most) if middle - half > ends[r] + 8), None)
        if row is not None:
            rows[name], ends[row] = row, middle + half
    return rows


def direct_labels(frame: Frame, ends: dict[str, float]) -> list[Markup]:
    """Each name beside the end of its curve, pushed apart where curves end close together."""
    order = sorted(((float(frame.y(y)) if y == y else frame.top, i, name) for i, (name, y) in enumerate(ends.items())))
    places, floor = [], frame.top + 2
    for y, i, name in order:
        floor = max(y, floor)
        places.append([floor, i, name])
        floor += 15
    spill = max(0.0, places[-1][0] - (frame.top + frame.h)) if places else 0
    for k in range(len(places) - 1, -1, -1):  # what was pushed below the box moves up again
        roof = frame.top + frame.h if k == len(places) - 1 else places[k + 1][0] - 15
        if spill:
            places[k][0] = min(places[k][0], roof)
    return [
        el("text", name, class_=f"direct {colour(i)}", x=f"{frame.left + frame.w + 8:.1f}", y=f"{y:.1f}", dy="0.34em")
        for y, i, name in places
    ]


def scatter(exhibit: report_elements.Scatter, most: int = 1500) -> Markup:
    """Draw points; a very large cloud is thinned evenly, which the page states."""
    points = column(exhibit.points).reshape(-1, 2) if len(exhibit.points) else np.empty((0, 2))
    good = points[np.isfinite(points).all(axis=1)]
    lost = left_out(len(points) - len(good), "missing or not a number")
    if not len(good):
        return finish(NOTHING, remarks=[lost])
    shown = good[np.linspace(0, len(good) - 1, min(len(good), most)).astype(int)]
    xs, ys = good[:, 0], good[:, 1]
    if exhibit.diagonal:
        xs = ys = good.ravel()
    drawings = []
    label = (
        f"{exhibit.title}: {len(good)} points, {exhibit.x or 'x'} from {number(good[:, 0].min())} to "
        f"{number(good[:, 0].max())}, {exhibit.y or 'y'} from {number(good[:, 1].min())} to "
        f"{number(good[:, 1].max())}."
    )
    for kind, size in (("square", SQUARE),) if exhibit.diagonal else (("wide", WIDE), ("narrow", NARROW)):
        y = axis(ys)
        frame = Frame(size, y if exhibit.diagonal else axis(xs, count=5 if size[0] < 500 else 9), y, right=14)
        places = [
            f"M{x:g} {y:g}h0" for x, y in np.round(np.stack([frame.x(shown[:, 0]), frame.y(shown[:, 1])], axis=1), 1).tolist()
        ]
        # Dots of one path do not add up where they overlap, those of several do: eight paths show density.
        layers = [el("path", class_="points c0", d="".join(places[i::8])) for i in range(8) if places[i::8]]
        cloud = el("g", *layers, class_="cloud few" if len(shown) <= 150 else "cloud")
        line = frame.diagonal() if exhibit.diagonal else None
        drawings.append(frame.svg(frame.grid(exhibit.x, exhibit.y), line, cloud, label=label, kind=kind))
    fewer = f"{number(len(shown))} of {number(len(good))} points are drawn, evenly chosen."
    return finish(
        join(drawings),
        shape="square" if exhibit.diagonal else "",
        data=hover([("", 0, shown[:, 0], shown[:, 1])], exhibit.x, exhibit.y),
        remarks=[fewer if len(shown) < len(good) else "", lost],
    )


def bars(exhibit: report_elements.Bars, most: int = 20) -> Markup:
    """Draw horizontal bars from zero. Labels and figures are text of the page, so that long names wrap."""
    if not exhibit.values:
        return NOTHING
    values = {str(name): plain(v) for name, v in exhibit.values.items()}
    spans = {str(name): column(span) for name, span in exhibit.intervals.items()}
    edges = column([*values.values(), *(v for name in values if name in spans for v in spans[name])])
    edges = edges[np.isfinite(edges)]
    low, high = min(0.0, *edges, 0.0), max(0.0, *edges, 0.0)
    unit = shorten(exhibit.unit.strip(), 12)
    if unit == "%" and 50 < high <= 100:
        high = 100.0
    span = (high - low) or 1.0

    digits = None if (edges == np.round(edges)).all() else decimals_of(edges.tolist())
    if unit == "%" and digits:
        digits = 1

    def row(name: str, value: Any) -> Markup:
        interval = spans.get(name)
        if interval is not None and not np.isfinite(interval).all():
            interval = None
        text = number(value, digits)
        said = [el("span", f"{text} {unit}" if unit and text != "–" else text, class_="value")]
        if interval is not None:
            said.append(el("span", "–".join(number(v, digits) for v in interval.tolist()), class_="span"))
        return el("li", el("span", name, class_="label", dir="auto"), track(value, interval), el("span", *said, class_="said"))

    def track(value: Any, interval) -> Markup:
        def at(v):
            return round((float(v) - low) / span * 100, 2)

        zero, parts = at(0), []
        if value is not None and math.isfinite(value):
            start, end = sorted((zero, at(value)))
            parts.append(el("rect", class_="bar", x=start, y=3, width=round(end - start, 2), height=14))
        if low < 0:
            parts.append(el("line", class_="zero", x1=zero, x2=zero, y1=0, y2=20))
        if interval is not None:
            a, b = at(interval[0]), at(interval[1])
            parts.append(el("path", class_="whisker", d=f"M{a} 10H{b}M{a} 6V14M{b} 6V14"))
        return el("svg", *parts, viewBox="0 0 100 20", preserveAspectRatio="none", aria_hidden="true")

    rows = [row(name, value) for name, value in values.items()]
    longest = max(len(name) for name in values)
    said = max(len(number(v, digits)) for v in values.values()) + len(unit) + (12 if spans else 0)
    style = f"--label:{min(max(longest * 0.56 + 0.5, 3), 15):.1f}em;--said:{said * 0.56 + 1:.1f}em"
    kind = "bars stacks" if longest > 12 or spans else "bars"  # in a narrow box, labels above their bars
    shown = [el("ul", *rows[:most], class_=kind, style=style)]
    if len(rows) > most:
        shown.append(el("details", el("summary", f"{len(rows) - most} more"), el("ul", *rows[most:], class_=kind, style=style)))
    return el("div", *shown, class_="chart")

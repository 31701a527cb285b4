"""Tables and confusion matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from fieldguide.core.report_elements import Matrix, Table
from fieldguide.report.axis import to_floats
from fieldguide.report.charts import NOTHING
from fieldguide.report.text import choose_decimals, draw_label, el, format_number, is_number, join, shorten, to_python

MAX_ROWS = 400  # rows of a table on the page; the number of others is stated
MAX_CELL_CHARACTERS = 400  # of a text in a table
MAX_NAME_CHARACTERS = 60  # of column names and of the first cell of a row
MAX_CLASS_CHARACTERS = 26  # of the names of classes around a confusion matrix
MAX_MATRIX_CLASSES = 30  # larger confusion matrices show only the classes confused most often


def build_scroll_box(label: str, *children: Any) -> Markup:
    """Return a box that scrolls horizontally in place of the page and can be focused by keyboard."""
    return el("div", *children, class_="scroll", tabindex="0", role="region", aria_label=label or "table")


def build_remark(*texts: str) -> Markup:
    return join(el("p", text, class_="remark") for text in texts if text)


def fold(content: Markup, total: int, visible: int, what: str) -> Markup:
    """Hide all but the first rows or items of a long content behind a switch that names their number.

    `visible` is one of the numbers for which the style sheet has a rule. It is a checkbox, so that it works without scripts.
    """
    if total <= visible * 1.25:
        return content
    texts = el("span", f"Show all {format_number(total)} {what}", class_="more"), el("span", "Show fewer", class_="less")
    switch = el("label", el("input", type="checkbox"), *texts)
    return el("div", content, switch, class_=f"fold fold-{visible}")


def draw_table(element: Table) -> Markup:
    """Return a table: numbers aligned by decimal point, text on the left, columns in `heat` shaded, many rows folded."""
    total = len(element.rows)
    if not total:
        return NOTHING
    rows = [list(row) for row in element.rows[:MAX_ROWS]]
    width = max(len(element.header), *map(len, rows))
    rows = [row + [None] * (width - len(row)) for row in rows]
    names = [*map(str, element.header), *[""] * (width - len(element.header))]
    columns = [Column.of([row[k] for row in rows], names[k] in element.heat) for k in range(width)]
    head = el(
        "tr", *(draw_label("th", name, MAX_NAME_CHARACTERS, scope="col", class_=c.look) for name, c in zip(names, columns))
    )
    links = [*element.links, *[""] * (len(rows) - len(element.links))]
    body = (
        el("tr", *(build_cell(c, i, first=k == 0 and width > 1, link="" if k else links[i]) for k, c in enumerate(columns)))
        for i in range(len(rows))
    )
    inside = el("table", el("thead", head) if any(names) else None, el("tbody", *body))
    cut = f"The first {format_number(MAX_ROWS)} of {format_number(total)} rows are shown." if total > MAX_ROWS else ""
    return join([fold(build_scroll_box(element.title, inside), len(rows), 10, "rows"), build_remark(cut)])


@dataclass(frozen=True)
class Column:
    """A formatted column: texts, full texts of shortened cells, and shades from 0 to 1."""

    texts: list[str]
    full: list[str | None]
    numeric: bool
    heat: bool
    shades: list[float | None]

    @property
    def look(self) -> str | None:
        return ("num heat" if self.heat else "num") if self.numeric else None

    @classmethod
    def of(cls, values: Sequence[Any], heat: bool) -> Column:
        values = [to_python(v) for v in values]
        present = [v for v in values if v is not None]
        numeric = bool(present) and all(map(is_number, present))
        whole = all(isinstance(v, int) for v in present)
        digits = choose_decimals(present) if numeric and not whole else None
        pairs = [format_cell(v, digits) for v in values]
        shades: list[float | None] = [None] * len(values)
        if heat and numeric:
            sizes = to_floats(values)
            if (sizes < 0).any() and (sizes > 0).any():  # shade signed errors by their absolute value
                sizes = np.abs(sizes)
            real = sizes[np.isfinite(sizes)]
            low, high = (real.min(), real.max()) if len(real) else (0, 0)
            shades = [(v - low) / (high - low) if high > low and v == v else None for v in sizes.tolist()]
        texts, full = [text for text, _ in pairs], [full for _, full in pairs]
        return cls(texts, full, numeric, heat and numeric, shades)


def format_cell(value: Any, digits: int | None = None) -> tuple[str, str | None]:
    """Return the text of a cell, and the exact value as a tooltip if the text is shortened."""
    if value is None or is_number(value) or isinstance(value, bool):
        text = format_number(value, digits)
        return text, f"{value:,}" if text[-1:] in "MBT" else None
    if isinstance(value, tuple) and len(value) == 2 and all(map(is_number, value)):
        return "–".join(format_number(v, choose_decimals(value)) for v in value), None
    text = str(value)
    return (text, None) if len(text) <= MAX_CELL_CHARACTERS else (shorten(text, MAX_CELL_CHARACTERS), text[:4000])


def build_cell(column: Column, i: int, *, first: bool, link: str = "") -> Markup:
    """Return a cell; `link` is the relative address that its text points to."""
    text, shade, full = column.texts[i], column.shades[i], column.full[i]
    if first and len(text) > MAX_NAME_CHARACTERS:
        text, full = shorten(text, MAX_NAME_CHARACTERS), full or text
    if column.numeric:
        return el("td", text, class_=column.look, title=full, style=None if shade is None else f"--shade:{shade:.2f}")
    kind = "long" if len(text) > 60 else "short" if len(text) <= (24 if first else 18) else "text"
    inside = el("a", text, href=link) if link else text
    return el("th" if first else "td", inside, scope="row" if first else None, class_=kind, title=full, dir="auto")


def draw_matrix(element: Matrix) -> Markup:
    """Return a confusion matrix: correct predictions and errors in two colors, shaded by their share of the row."""
    if not len(element.counts):
        return NOTHING
    counts = np.array([to_floats(row) for row in element.counts])
    known, n = np.nan_to_num(counts), len(counts)
    labels = [str(label) for label in element.labels][:n]
    labels += [str(k) for k in range(len(labels), n)]
    wrong = known.copy()
    np.fill_diagonal(wrong, 0)
    keep, says = np.arange(n), ""
    if n > MAX_MATRIX_CLASSES:
        keep = np.sort(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[: MAX_MATRIX_CLASSES - 5])
        says = (
            f"The matrix shows only the {len(keep)} of {n} classes that are confused most often. The totals at its edges "
            f"and the list below include all classes."
        )
    totals, answers = known.sum(1), known.sum(0)
    upright = max(len(labels[k]) for k in keep) > (2 if len(keep) > 14 else 5)
    head = el(
        "tr",
        el("th", el("span", "true ↓ predicted →"), scope="col", class_="corner"),
        *(el("th", draw_label("span", labels[k], MAX_CLASS_CHARACTERS), scope="col") for k in keep),
        el("th", "recall", scope="col", class_="sum", title="fraction of this class that is predicted (recall)"),
    )
    body = [
        el(
            "tr",
            draw_label("th", labels[i], MAX_CLASS_CHARACTERS, scope="row", dir="auto"),
            *(
                build_matrix_cell(
                    counts[i, j],
                    known[i, j] / totals[i] if totals[i] > 0 else 0,
                    i == j,
                    f"{labels[i]} predicted as {labels[j]}",
                )
                for j in keep
            ),
            el("td", format_percent(known[i, i], totals[i]), class_="sum"),
        )
        for i in keep
    ]
    precise = "fraction of these predictions that are correct (precision)"
    foot = el(
        "tr",
        el("th", "precision", scope="row", title=precise),
        *(el("td", format_percent(known[j, j], answers[j]), class_="sum") for j in keep),
        el("td", format_percent(np.trace(known), known.sum()), class_="sum all"),
    )
    inside = el(
        "table",
        el("thead", head),
        el("tbody", *body),
        el("tfoot", foot),
        class_="matrix" + (" upright" if upright else "") + (" dense" if len(keep) > 14 else ""),
    )
    return join([build_remark(says), build_scroll_box(element.title, inside), list_confusions(labels, wrong, totals)])


def build_matrix_cell(value: float, share: float, right: bool, words: str) -> Markup:
    """Return one cell. Errors are rare in a good model, so their shade is the square root of their share."""
    if value != value:
        return el("td", "–")
    if value == 0:
        return el("td", "·" if not right else "0", class_="none")
    shade = min(share if right else math.sqrt(share), 1.0)
    look = ("right" if right else "wrong") + (" deep" if shade > 0.6 else "")
    return el(
        "td",
        format_number(value),
        class_=look,
        style=f"--shade:{shade:.2f}",
        title=f"{'right' if right else words}: {format_number(value)}",
    )


def format_percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%" if whole > 0 else "–"


def list_confusions(labels: Sequence[str], wrong: np.ndarray, totals: np.ndarray, most: int = 8) -> Markup:
    """Return a list of the most frequent confusions."""
    if len(labels) < 3 or not wrong.any():
        return Markup("")
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    items = [(i, j) for i, j in zip(*np.unravel_index(order, wrong.shape)) if wrong[i, j] > 0]
    return el(
        "div",
        el("h4", "Most frequent confusions"),
        el(
            "ul",
            *(
                el(
                    "li",
                    el(
                        "span",
                        draw_label("b", labels[i], MAX_NAME_CHARACTERS, dir="auto"),
                        " predicted as ",
                        draw_label("b", labels[j], MAX_NAME_CHARACTERS, dir="auto"),
                    ),
                    el("span", f"{format_number(wrong[i, j])} of {format_number(totals[i])}", class_="times"),
                )
                for i, j in items
            ),
        ),
        class_="confusions",
    )

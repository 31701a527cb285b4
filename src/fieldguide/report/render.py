"""The report page: one self-contained HTML file that works offline and without JavaScript.

`render` turns sections of elements into the page. Each type of element is drawn by one function registered
with `draw`; a new type needs one more function:

    @draw.register
    def _(element: Sound) -> Markup: ...

All markup is created by `text.el` or the template, which both escape, and the content security policy of the
page forbids requests and scripts other than its own. Content of a data set is therefore displayed but never run.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, singledispatch
from importlib.resources import files
from itertools import groupby
from typing import Literal

import jinja2
from markupsafe import Markup

from fieldguide.core.report_elements import (
    Bars,
    Code,
    Gallery,
    Legend,
    Lines,
    Matrix,
    Quotes,
    ReportElement,
    Scatter,
    Sounds,
    Table,
)
from fieldguide.report import charts, media, tables
from fieldguide.report.text import clean_text, join_units

Tone = Literal["neutral", "warning", "bad"]  # gray, amber, red


@dataclass(frozen=True)
class Badge:
    """A short judgement of the result and its color."""

    text: str
    tone: Tone


@dataclass(frozen=True)
class Section:
    """A section: a heading, a sentence or two on what to look for, and the elements."""

    title: str
    lead: str = ""
    elements: Sequence[ReportElement] = ()


def render(
    *,
    title: str,
    verdict: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    footer: str = "",
    badge: Badge | None = None,
) -> str:
    """Return the page. `verdict` is the result in one sentence; `facts` are labels and values of small tiles.

    If the verdict begins with a number ("98.6 % of ..."), that number is displayed in large type, in the color of the badge.
    """
    repeated = {image for image, n in Counter(list_images(sections)).items() if n > 1}
    with media.open_page(repeated):
        anchors = build_anchors([s.title for s in sections])
        drawn = [
            {
                "title": s.title,
                "lead": s.lead,
                "anchor": anchor,
                "figures": [
                    {"element": e, "body": draw(e), "place": place} for e, place in zip(s.elements, place_elements(s.elements))
                ],
            }
            for s, anchor in zip(sections, anchors)
        ]
    environment = load_templates()
    script, style = read_template("report.js"), read_template("report.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    match = re.match(r"[−-]?\d[\d.,]*(?:\s?%)?(?=\s)", verdict)
    figure = match.group() if match else ""
    return environment.get_template("report.html").render(
        title=title,
        figure=figure,
        verdict=verdict[len(figure) :].strip(),
        facts=facts,
        badge=badge,
        sections=drawn,
        footer=footer,
        script=Markup(script),
        digest=digest,
        style=Markup(style),
    )


def list_images(sections: Sequence[Section]) -> Iterator[bytes]:
    """Yield the images of all galleries."""
    for section in sections:
        for element in section.elements:
            for picture in element.pictures if isinstance(element, Gallery) else ():
                yield picture.image
                yield from picture.views.values()


def read_template(name: str) -> str:
    """Return the text of a file in `templates/`."""
    return files("fieldguide.report").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def load_templates() -> jinja2.Environment:
    # `finalize` cleans all values in templates, as `el` does in drawings.
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("fieldguide.report"),
        autoescape=True,
        finalize=clean_text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["tie"] = join_units
    return made


def build_anchors(titles: Sequence[str]) -> list[str]:
    """Return readable link targets, each unique: `worst-errors`, `scores`, `scores-2`."""
    seen: Counter[str] = Counter()
    anchors = []
    for title in titles:
        word = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:40] or "section"
        seen[word] += 1
        anchors.append(word if seen[word] == 1 else f"{word}-{seen[word]}")
    return anchors


def place_elements(shown: Sequence[ReportElement]) -> list[str]:
    """Return the placement of each element on a wide screen: "half" (two per row), "row" or "aside" (next to its text).

    Consecutive narrow elements are placed in pairs. If their number is odd, one of them takes a whole row: the first that
    is not a square chart.
    """
    square = [isinstance(e, (Lines, Scatter)) and e.diagonal and not getattr(e, "log", False) for e in shown]
    slim = [is_narrow(e) for e in shown]
    result = ["row"] * len(slim)
    for narrow, group in groupby(range(len(slim)), key=slim.__getitem__):
        if not narrow:
            continue
        run = list(group)
        alone = next((k for k in run[::2] if not square[k]), run[0]) if len(run) % 2 else None
        for k in run:
            result[k] = "half" if k != alone else "aside" if square[k] else "row"
    return result


def is_narrow(element: ReportElement) -> bool:
    """Return whether an element fits into half of a wide page."""
    if isinstance(element, Table):
        return len(element.header) <= 3
    if isinstance(element, Gallery):
        return not element.wide and not any(p.views for p in element.pictures)
    return isinstance(element, (Lines, Scatter, Bars, Quotes))


# -- one drawing function per type ---------------------------------------------------------------------------


@singledispatch
def draw(element: ReportElement) -> Markup:
    """Return the markup of one element, chosen by its type."""
    raise TypeError(
        f"the report cannot draw an element of type {type(element).__name__!r}. Register a "
        f"function for it with `fieldguide.report.render.draw.register`."
    )


draw.register(Lines, charts.draw_lines)
draw.register(Scatter, charts.draw_scatter)
draw.register(Bars, charts.draw_bars)
draw.register(Table, tables.draw_table)
draw.register(Matrix, tables.draw_matrix)
draw.register(Gallery, media.draw_gallery)
draw.register(Sounds, media.draw_sounds)
draw.register(Quotes, media.draw_quotes)
draw.register(Code, media.draw_code)
draw.register(Legend, media.draw_legend)

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
import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, singledispatch
from importlib.resources import files
from itertools import groupby
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from fieldguide.core.report_elements import (
    Bars,
    Gallery,
    Lines,
    Matrix,
    Picture,
    Quotes,
    ReportElement,
    Scatter,
    Sounds,
    Table,
)
from fieldguide.report import charts
from fieldguide.report.axis import to_floats
from fieldguide.report.charts import NOTHING
from fieldguide.report.text import choose_decimals, clean_text, el, format_number, is_number, join, to_python

ROWS, QUOTES, PICTURES = 400, 50, 60  # shown per element; the number of others is stated
PICTURE_BYTES = 2_000_000  # of all images of a page
LARGEST = 384  # pixels per side: twice the size of a tile, for high-density screens
WIDEST = 800  # the same for tiles of wide galleries
SOUND_BYTES = 3_000_000  # of all recordings of a page
SOUNDS = {b"RIFF": "wav", b"fLaC": "flac", b"OggS": "ogg", b"ID3": "mpeg", b"\xff": "mpeg"}  # first bytes -> type
MAX_MATRIX_CLASSES = 30  # larger confusion matrices show only the classes confused most often
UNIT = re.compile(r"(?<=\d) (?=(?:%|[kMBT]|ms|s|min|h|[KMGT]i?B)(?!\w))")  # no line break before a unit


@dataclass(frozen=True)
class Section:
    """A section: a heading, a sentence or two on what to look for, and the elements."""

    title: str
    lead: str = ""
    elements: Sequence[ReportElement] = ()


def render(*, title: str, verdict: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section], footer: str = "") -> str:
    """Return the page. `verdict` is the result in one sentence; `facts` are labels and values of small tiles.

    If the verdict begins with a number ("98.6 % of ..."), that number is displayed in large type.
    """
    pictures = [p.image for s in sections for e in s.elements if isinstance(e, Gallery) for p in e.pictures]
    token = _page_media.set(PageMedia(repeated={image for image, n in Counter(pictures).items() if n > 1}))
    try:
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
    finally:
        _page_media.reset(token)
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
        sections=drawn,
        footer=footer,
        script=Markup(script),
        digest=digest,
        style=Markup(style),
    )


def read_template(name: str) -> str:
    """Return the text of a file in `templates/`."""
    return files("fieldguide.report").joinpath("templates", name).read_text("utf-8")


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


def join_units(text: str) -> str:
    return UNIT.sub("\u00a0", str(text))


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
    slim = [isinstance(e, (Lines, Scatter, Bars)) or (isinstance(e, Table) and len(e.header) <= 3) for e in shown]
    result = ["row"] * len(slim)
    for narrow, group in groupby(range(len(slim)), key=slim.__getitem__):
        if not narrow:
            continue
        run = list(group)
        alone = next((k for k in run[::2] if not square[k]), run[0]) if len(run) % 2 else None
        for k in run:
            result[k] = "half" if k != alone else "aside" if square[k] else "row"
    return result


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


def build_scroll_box(label: str, *children: Any, tall: bool = False) -> Markup:
    """Return a box that scrolls horizontally in place of the page and can be focused by keyboard."""
    return el(
        "div", *children, class_="scroll tall" if tall else "scroll", tabindex="0", role="region", aria_label=label or "table"
    )


def build_remark(*texts: str) -> Markup:
    return join(el("p", text, class_="remark") for text in texts if text)


@draw.register
def table(element: Table) -> Markup:
    """Return a table: numbers aligned by decimal point, text on the left, columns in `heat` shaded."""
    total = len(element.rows)
    if not total:
        return NOTHING
    rows = [list(row) for row in element.rows[:ROWS]]
    width = max(len(element.header), *map(len, rows))
    rows = [row + [None] * (width - len(row)) for row in rows]
    names = [*element.header, *[""] * (width - len(element.header))]
    columns = [Column.of([row[k] for row in rows], names[k] in element.heat) for k in range(width)]
    head = el("tr", *(el("th", name, scope="col", class_=c.look) for name, c in zip(names, columns)))
    body = (el("tr", *(build_cell(c, i, first=k == 0 and width > 1) for k, c in enumerate(columns))) for i in range(len(rows)))
    inside = el("table", el("thead", head) if any(names) else None, el("tbody", *body))
    cut = f"The first {format_number(ROWS)} of {format_number(total)} rows are shown." if total > ROWS else ""
    return join([build_scroll_box(element.title, inside, tall=len(rows) > 25), build_remark(cut)])


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
    return (text, None) if len(text) <= 400 else (text[:399].rstrip() + "…", text[:4000])


def build_cell(column: Column, i: int, *, first: bool) -> Markup:
    text, shade = column.texts[i], column.shades[i]
    if column.numeric:
        return el("td", text, class_=column.look, title=column.full[i], style=None if shade is None else f"--shade:{shade:.2f}")
    kind = "long" if len(text) > 60 else "short" if len(text) <= (24 if first else 14) else None
    return el("th" if first else "td", text, scope="row" if first else None, class_=kind, title=column.full[i], dir="auto")


@draw.register
def matrix(element: Matrix) -> Markup:
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
        *(el("th", el("span", labels[k]), scope="col") for k in keep),
        el("th", "recall", scope="col", class_="sum", title="fraction of this class that is predicted (recall)"),
    )
    body = [
        el(
            "tr",
            el("th", labels[i], scope="row", dir="auto"),
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
                    el("span", el("b", labels[i], dir="auto"), " predicted as ", el("b", labels[j], dir="auto")),
                    el("span", f"{format_number(wrong[i, j])} of {format_number(totals[i])}", class_="times"),
                )
                for i, j in items
            ),
        ),
        class_="confusions",
    )


@dataclass
class PageMedia:
    """Images and recordings of the page that is drawn. Repeated images are stored once; the total size is limited."""

    repeated: set[bytes] = field(default_factory=set)
    placed: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    spent: int = 0
    heard: int = 0  # bytes of sounds


_page_media: ContextVar[PageMedia] = ContextVar("album")


@draw.register
def gallery(element: Gallery) -> Markup:
    album = _page_media.get(None) or PageMedia()
    tiles, over = [], 0
    for picture in element.pictures[:PICTURES]:
        image = build_picture(picture, album, WIDEST if element.wide else LARGEST)
        over += image is None
        if image is not None:
            tiles.append(
                el(
                    "li",
                    image,
                    el("span", join_units(picture.caption), class_="caption", dir="auto"),
                    class_="bad" if picture.bad else None,
                )
            )
    over += max(0, len(element.pictures) - PICTURES)
    if not tiles and not over:
        return NOTHING
    return join([el("ul", *tiles, class_="gallery wide" if element.wide else "gallery"), note_left_out(over, "image")])


def note_left_out(count: int, what: str) -> Markup:
    be = " is" if count == 1 else "s are"
    return build_remark(f"{format_number(count)} more {what}{be} left out to keep this page small." if count else "")


def build_picture(picture: Picture, album: PageMedia, largest: int = LARGEST) -> Markup | None:
    """Return the markup of an image, or None if the size limit of the page is reached."""
    if picture.image in album.placed:
        name, view = album.placed[picture.image]
        return el("svg", el("use", href=f"#{name}"), viewBox=view, role="img", aria_label=picture.caption)
    try:
        kind, data, (width, height) = embed(picture.image, largest)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises
        return el("span", "This image cannot be read.", class_="broken")
    if album.spent + len(data) > PICTURE_BYTES:
        return None
    album.spent += len(data)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    small = "pixels" if max(width, height) <= 96 else None  # enlarge digits and icons without blurring
    if picture.image not in album.repeated:
        return el("img", src=source, alt=picture.caption, width=width, height=height, class_=small)
    name, view = f"picture-{len(album.placed)}", f"0 0 {width} {height}"
    album.placed[picture.image] = name, view
    image = el("image", id=name, href=source, width=width, height=height, class_=small)
    return el("svg", image, viewBox=view, role="img", aria_label=picture.caption)


def embed(data: bytes, largest: int = LARGEST) -> tuple[str, bytes, tuple[int, int]]:
    """Return format, bytes and size of an image for the page; large ones are downscaled."""
    with Image.open(io.BytesIO(data)) as image:
        kind, size = (image.format or "").lower(), image.size
        if kind not in ("png", "jpeg", "webp", "gif"):
            raise ValueError(f"image format {kind or 'unknown'} is not PNG, JPEG, WebP or GIF")
        if max(size) <= largest or len(data) <= 24_000:
            return kind, data, size
        image.draft("RGB", (largest, largest))  # lets JPEG decode at a fraction of its size
        clear = "A" in image.getbands() or "transparency" in image.info
        smaller = image.convert("RGBA" if clear else "RGB")
        smaller.thumbnail((largest, largest))
        kind, out = "webp" if clear else "jpeg", io.BytesIO()  # JPEG is several times faster to write than PNG
        smaller.save(out, kind, quality=80)
        return kind, out.getvalue(), smaller.size


@draw.register
def sounds(element: Sounds) -> Markup:
    """Return recordings with audio players; those beyond the size limit of the page are only counted."""
    album = _page_media.get(None) or PageMedia()
    items, over = [], 0
    for sound in element.sounds:
        kind = next((kind for head, kind in SOUNDS.items() if sound.sound.startswith(head)), None)
        if kind and album.heard + len(sound.sound) > SOUND_BYTES:
            over += 1
            continue
        player = el("span", "This recording cannot be played.", class_="broken")
        if kind:
            album.heard += len(sound.sound)
            source = f"data:audio/{kind};base64,{base64.b64encode(sound.sound).decode()}"
            player = el("audio", src=source, controls="", preload="metadata", aria_label=sound.caption)
        items.append(
            el(
                "li",
                player,
                el("span", join_units(sound.caption), class_="caption", dir="auto"),
                class_="bad" if sound.bad else None,
            )
        )
    if not items and not over:
        return NOTHING
    return join([el("ul", *items, class_="sounds"), note_left_out(over, "recording")])


@draw.register
def quotes(element: Quotes) -> Markup:
    items = []
    for quote in element.quotes[:QUOTES]:
        text, cut = quote.text, ""
        if len(text) > 20_000:
            text, cut = text[:20_000], f"{format_number(len(text) - 20_000)} more characters are not shown."
        body = el("p", text, dir="auto", class_="text")
        if len(text) > 320:
            start = text[:240].rsplit(" ", 1)[0]
            more = el("span", f"all {format_number(len(quote.text))} characters", class_="more")
            summary = el("summary", el("span", start + " …", class_="text start", dir="auto"), more)
            body = el("details", summary, body)
        items.append(
            el(
                "li",
                body,
                build_remark(cut),
                el("span", join_units(quote.caption), class_="caption", dir="auto"),
                class_="bad" if quote.bad else None,
            )
        )
    if not items:
        return NOTHING
    return join([el("ul", *items, class_="quotes"), note_left_out(len(element.quotes) - len(items), "text")])

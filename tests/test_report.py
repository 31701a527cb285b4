"""The report is complete, safe and small for any content; the model card contains what was passed."""

import io
import math
import random
import re
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from markupsafe import Markup
from PIL import Image

from fieldguide.core.report_elements import (
    Bars,
    Code,
    Gallery,
    Lines,
    Matrix,
    Picture,
    Quote,
    Quotes,
    ReportElement,
    Scatter,
    Sound,
    Sounds,
    Table,
)
from fieldguide.report import axis, charts, marks, model_card
from fieldguide.report import render as report
from fieldguide.report.render import Badge, Section, render
from fieldguide.report.text import el, format_number

NAN, INF = math.nan, math.inf
HOSTILE = """</script></title></style><img src=x onerror=alert(1)>"'&amp;{{ 7*7 }}\x00\ud800\u202e"""
VOID = {"meta", "link", "img"}


def png(width=8, height=8, seed=0, kind="PNG"):
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, kind)
    return out.getvalue()


class Page(HTMLParser):
    """Elements and texts of a page; fails on elements that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def count(self, tag, **wanted):
        return sum(t == tag and all(a.get(k.rstrip("_")) == v for k, v in wanted.items()) for t, a, _ in self.elements)

    def text(self):
        return " ".join(text for tag, text in self.texts if tag not in ("script", "style"))


def page_of(*shown, **more):
    values = {"title": "T", "verdict": "V", "facts": [], "sections": [Section("S", "", shown)], **more}
    html = render(**values)
    html.encode()
    for drawing in ET.fromstring(html[html.index("<main>") : html.index("</main>") + 7]).iter("svg"):
        for part in drawing.iter():
            for name, value in part.attrib.items():  # positions and paths are numbers, never NaN
                assert name == "aria-label" or not re.search(r"\b(nan|inf)\b", value), (part.tag, name, value)
    return html, Page(html)


def ordinary():
    x = list(range(0, 1200, 4))
    noise = random.Random(0)
    return [
        Section(
            "Data",
            "What was found.",
            [
                Bars("Classes", values={"a": 178, "b": 182}),
                Table("Files", header=("", "files"), rows=[("used", 1794), ("dropped", 3)]),
            ],
        ),
        Section(
            "Training",
            "",
            [
                Lines(
                    "Loss",
                    "Lower is better.",
                    x="step",
                    y="loss",
                    log=True,
                    marks={"best": 800},
                    lines={
                        "training": (x, [math.exp(-i / 200) + noise.random() / 50 for i in x]),
                        "validation": (x[::10], [math.exp(-i / 210) + 0.03 for i in x[::10]]),
                    },
                    bands={"validation": (x[::10], [0.01] * 30, [2] * 30)},
                )
            ],
        ),
        Section(
            "Scores",
            "",
            [
                Bars(
                    "Accuracy",
                    values={"model": 98.6, "most common": 10.2},
                    unit="%",
                    intervals={"model": (97.1, 99.4), "most common": (8, 13)},
                ),
                Scatter("Truth", x="said", y="true", points=[(i, i + noise.random()) for i in range(200)], diagonal=True),
                Matrix("Confusion", labels="abc", counts=[[9, 1, 0], [0, 8, 2], [0, 0, 10]]),
                Gallery("Worst", pictures=[Picture(png(seed=k), f"picture {k}", bad=True) for k in range(24)]),
                Quotes("Texts", quotes=[Quote("short", "right"), Quote("long " * 200, "wrong", bad=True)]),
            ],
        ),
    ]


EDGES = {
    "empty table": Table("t"),
    "header only": Table("t", header=("a", "b")),
    "ragged table": Table("t", header=("a",), rows=[[1, 2, 3], [], [NAN]], heat=("a",)),
    "odd cells": Table(
        "t",
        header=tuple("abc"),
        heat=tuple("abc"),
        rows=[[None, True, (0.1, 0.2)], [INF, np.float32(2), {"k": 1}], [10**400, -0.0, "x" * 999]],
    ),
    "huge table": Table("t", header=("a", "b"), rows=[[i, i / 7] for i in range(5000)]),
    "empty lines": Lines("l"),
    "one point": Lines("l", lines={"a": ([3], [5])}),
    "no values": Lines("l", lines={"a": ([], []), "b": ([1, 2], [NAN, None])}, log=True),
    "gaps": Lines("l", lines={"a": ([1, 2, 3, 4], [1, NAN, INF, None])}, marks={"m": NAN, "n": 2}),
    "log of zero": Lines("l", lines={"a": ([1, 2, 3], [0, -1, 5])}, log=True, bands={"a": ([1, 2, 3], [-1, 0, 1], [1, 2, 3])}),
    "extremes": Lines("l", lines={"a": ([0, 1], [1e-300, 1e299]), "b": ([0, 1], [-1e299, 1e308])}),
    "tiny range": Lines("l", lines={"a": ([0, 1], [1.0, 1.0 + 1e-15])}),
    "small range far off": Lines("l", lines={"a": ([1e9, 1e9 + 1], [1e9, 1e9 + 1e-3])}),
    "long line": Lines("l", lines={"a": (range(200_000), np.random.default_rng(0).normal(size=200_000))}),
    "many lines": Lines(
        "l",
        lines={f"line {k}": ([0, 1], [k, k + 1]) for k in range(40)},
        marks={f"mark {k}": k / 40 for k in range(40)},
        diagonal=True,
    ),
    "band only": Lines("l", bands={"b": ([1, 2], [0, 1], [2, 3])}, diagonal=True),
    "uneven": Lines("l", lines={"a": ([1, 2, 3], [1, 2])}),
    "empty scatter": Scatter("s"),
    "one dot": Scatter("s", points=[(1, 1)], diagonal=True),
    "bad dots": Scatter("s", points=[(NAN, 1), (None, 2)]),
    "cloud": Scatter("s", points=np.random.default_rng(0).normal(size=(50_000, 2))),
    "empty bars": Bars("b"),
    "zero": Bars("b", values={"a": 0}),
    "bad bars": Bars("b", values={"a": NAN, "b": None, "c": INF, "d": -3}, intervals={"d": (-4, NAN), "c": (0, 1)}),
    "many bars": Bars("b", values={f"class {k}": k - 50 for k in range(150)}, unit="points"),
    "empty matrix": Matrix("m"),
    "one class": Matrix("m", labels=["a"], counts=[[3]]),
    "bad matrix": Matrix("m", labels=["a"], counts=[[NAN, 1], [None, 0]]),
    "zeros": Matrix("m", labels=["a", "b", "c"], counts=np.zeros((3, 3))),
    "150 classes": Matrix(
        "m", labels=[f"kind {k}" for k in range(150)], counts=np.random.default_rng(0).integers(0, 9, (150, 150))
    ),
    "empty gallery": Gallery("g"),
    "broken": Gallery("g", pictures=[Picture(b"", "none"), Picture(b"GIF89a", "x")]),
    "empty quotes": Quotes("q"),
    "huge quote": Quotes("q", quotes=[Quote("x" * 300_000, "long")] * 20),
    "blank quote": Quotes("q", quotes=[Quote("", "")]),
}


@pytest.mark.parametrize("element", EDGES.values(), ids=EDGES)
def test_every_element_is_drawn_for_any_content(element):
    html, page = page_of(element)
    assert page.count("figure") == 1 and len(html) < 1_000_000


def test_ordinary_page_is_complete_small_and_fast():
    start = time.perf_counter()
    html = render(
        title="Digits",
        verdict="98.6 % right (95 % interval 97.1–99.4)",
        sections=ordinary(),
        facts=[("model", "resnet18-digits, 1.2 M parameters")],
        footer="Made by fieldguide.",
    )
    assert time.perf_counter() - start < 1 and len(html.encode()) < 200_000
    page = Page(html)
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    links = [a["href"] for tag, a, _ in page.elements if tag == "a"]
    assert links == ["#data", "#training", "#scores"] and {link[1:] for link in links} <= set(ids)
    assert len(ids) == len(set(ids))
    assert ("strong", "98.6\u00a0%") in page.texts  # the figure to remember, not broken from its unit
    for words in ("Lower is better.", "1.2\u00a0M parameters", "97.1–99.4", "by fieldguide.", "picture 23"):
        assert words in page.text(), words


def test_page_makes_no_requests():
    html, page = page_of(sections=ordinary())
    for tag, attributes, _ in page.elements:
        for name in ("src", "href", "srcset", "poster", "data", "action", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"@import|url\s*\(|https?:|//[a-z]+\.[a-z]", re.sub(r"base64,[^\"]*", "", html))
    policy = next(a["content"] for _, a, _ in page.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'") and page.count("script") == 1


def test_policy_allows_exactly_the_script_of_the_page():
    import base64
    import hashlib

    html, _ = page_of()
    script = re.search(r"<script>(.*)</script>", html, re.S).group(1)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in html


def test_data_is_never_markup():
    h = HOSTILE
    shown = [
        Table(h, h, header=(h, "n"), rows=[[h, 1], [h * 20, 2]], heat=(h,)),
        Lines(
            h, h, x=h, y=h, lines={h: ([1, 2], [1, 2]), "b": ([1, 2], [2, 1])}, bands={h + "2": ([1], [1], [2])}, marks={h: 1.5}
        ),
        Scatter(h, h, x=h, y=h, points=[(1, 2)]),
        Bars(h, h, values={h: 1}, intervals={h: (0, 2)}, unit=h),
        Matrix(h, h, labels=[h, "b", "c"], counts=[[1, 5, 0], [0, 1, 0], [0, 0, 1]]),
        Gallery(h, h, pictures=[Picture(png(), h, bad=True), Picture(png(), h), Picture(b"no picture", h)]),
        Gallery(h, h, pictures=[Picture(png(seed=1), h, view=h, views={h + "2": png(seed=2), h + "3": b"no picture"})]),
        Quotes(h, h, quotes=[Quote(h, h, weights=[(1, 9, 1.0)]), Quote(h * 30, h, bad=True, weights=[(0, 20, -1.0)])]),
        Code(h, h, h),
    ]
    html, page = page_of(
        title=h,
        verdict=h,
        badge=Badge(h, "bad"),
        facts=[(h, h)],
        footer=h,
        sections=[Section(h, h, shown), Section(h, h, shown[:1])],
    )
    titles = [open_ for tag, _, open_ in page.elements if tag == "title" and "svg" not in open_]
    assert page.count("script") == 1 and page.count("style") == 1 and len(titles) == 1
    assert {a.get("src", "data:")[:5] for tag, a, _ in page.elements if tag == "img"} <= {"data:"}
    assert not any(name.startswith("on") for _, a, _ in page.elements for name in a)
    assert "{{ 7*7 }}" in page.text()
    assert "\x00" not in html and "\ud800" not in html


def test_element_types_can_be_registered():
    @dataclass(frozen=True)
    class Sound(ReportElement):
        seconds: float = 0

    with pytest.raises(TypeError, match=r"'Sound'.*draw\.register"):
        page_of(Sound("s"))
    report.draw.register(Sound, lambda element: el("p", f"{element.seconds} seconds of sound"))
    assert "3 seconds of sound" in page_of(Sound("s", seconds=3))[1].text()


# -- single drawings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"),
        (NAN, "–"),
        (INF, "∞"),
        (True, "yes"),
        (0, "0"),
        (0.98614, "0.9861"),
        (2024, "2024"),
        (12345, "12,345"),
        (-1234567, "−1,234,567"),
        (25_557_032, "25.6 M"),
        (7e9, "7 B"),
        (3e-5, "3·10⁻⁵"),
        (np.float32(0.5), "0.5"),
        (np.int64(7), "7"),
        (-0.0, "0"),
        (-1e-20, "−10⁻²⁰"),
    ],
)
def test_number_format(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    "low, high, texts",
    [
        (0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0, 1200, ["0", "250", "500", "750", "1000"]),
        (0, 50_000, ["0", "10 k", "20 k", "30 k", "40 k", "50 k"]),
        (-1, 1, ["−1.0", "−0.5", "0", "0.5", "1.0"]),
        (0, 3e-5, ["0", "10⁻⁵", "2·10⁻⁵", "3·10⁻⁵"]),
    ],
)
def test_ticks_are_round(low, high, texts):
    assert axis.format_ticks(axis.choose_ticks(low, high)) == texts


def test_axes_contain_their_data():
    rng = np.random.default_rng(0)
    for log in (False, True):
        for _ in range(300):
            values = np.abs(rng.normal(size=7) * 10.0 ** rng.integers(-9, 9)) + (0 if log else rng.normal())
            made = axis.make_axis(values, log=log)
            placed = made(values)
            assert placed.min() >= -1e-9 and placed.max() <= 1 + 1e-9
            assert 2 <= len(made.ticks) <= 12 and len({text for _, text in made.ticks}) == len(made.ticks)


def test_thinning_keeps_spikes_and_ends():
    ys = np.zeros(100_000)
    ys[54_321], ys[77_777] = 9, -9
    kept = marks.select_points(ys)
    assert len(kept) <= 322 and {0, 54_321, 77_777, 99_999} <= set(kept.tolist())


def test_curves_keep_gaps_and_report_missing_points():
    drawn = charts.draw_lines(Lines("l", lines={"a": ([1, 2, 3, 4, 5], [1, 2, NAN, 4, 5])}))
    path = re.search(r'class="line c0" d="([^"]*)"', drawn).group(1)
    assert path.count("M") == 2 and path.count("L") == 2
    assert "1 value is not drawn" in drawn
    assert "2 values are not drawn" in charts.draw_scatter(EDGES["bad dots"])
    assert "2 values are not drawn: a logarithmic axis" in charts.draw_lines(
        Lines("l", lines={"a": ([1, 2, 3], [0, -1, 5])}, log=True)
    )


def test_direct_labels_do_not_overlap_and_stay_inside():
    ends = {f"n{k}": 0.999 - k / 1000 for k in range(7)} | {"low": 0.0}
    frame = axis.Frame(charts.WIDE, axis.make_axis(np.array([0, 1])), axis.make_axis(np.array([0, 1])))
    labels = "".join(marks.label_curves(frame, ends))
    places = sorted(float(y) for y in re.findall(r' y="([\d.]+)"', labels))
    assert all(b - a >= 14.9 for a, b in pairwise(places))
    assert places[-1] <= frame.top + frame.h + 0.1


def test_bars_have_length_interval_and_label():
    values, intervals = {"model": 50.0, "other": 25.0}, {"model": (40, 60.25)}
    drawn = charts.draw_bars(Bars("b", values=values, intervals=intervals, unit="%"))
    assert [float(w) for w in re.findall(r'class="bar"[^>]*width="([\d.]+)"', drawn)] == [50, 25]
    assert 'd="M40.0 10H60.25' in drawn and "50.0 %" in drawn and "40.0–60.2" in drawn


def test_matrix_shows_shares_and_worst_confusions():
    _, page = page_of(Matrix("m", labels=["cat", "dog", "owl"], counts=[[8, 2, 0], [0, 9, 1], [0, 0, 5]]))
    text = page.text()
    for words in ("80%", "82%", "88%", "Most frequent confusions", "2 of 10"):
        assert words in text
    assert re.search(r"cat\s+predicted as\s+dog", text) and not re.search(r"cat\s+predicted as\s+cat", text)


def test_large_matrix_shows_the_most_confused_classes():
    counts = np.diag(np.full(150, 50))
    counts[140, 3] = 40
    html, page = page_of(Matrix("m", labels=[f"kind{k}" for k in range(150)], counts=counts))
    assert "25 of 150 classes" in page.text() and page.count("td", class_="right deep") == 24
    assert "kind140" in html and ">kind3<" in html and "kind149" not in html


def test_tables_align_and_shade():
    rows = [("a", 0.5), ("b", 0.125), ("c", None)]
    _, page = page_of(Table("t", header=("name", "score"), rows=rows, heat=("score",)))
    assert [text for tag, text in page.texts if tag == "td"] == ["0.500", "0.125", "–"]
    shades = [a.get("style") for tag, a, _ in page.elements if tag == "td"]
    assert shades == ["--shade:1.00", "--shade:0.00", None]
    assert "25.6 M" in page_of(Table("t", rows=[(25_557_032,)]))[1].text()
    assert "400 of 5000 rows" in page_of(EDGES["huge table"])[1].text()


def test_images_are_embedded_once_downscaled_and_limited():
    small, large = png(8, 8), png(900, 600, kind="JPEG")
    html, page = page_of(Gallery("g", pictures=[Picture(small, "small"), Picture(large, "large")]))
    classes = [a.get("class") for tag, a, _ in page.elements if tag == "img"]
    assert classes == ["pixels", None] and "data:image/jpeg" in html and len(html) < 200_000
    html, page = page_of(*[Gallery("g", pictures=[Picture(small, "again")] * 9)] * 3)
    assert html.count("base64,") == 1 and page.count("use") == 26
    many = [Picture(png(120, 120, seed=k), "noise") for k in range(70)]  # which PNG cannot make smaller
    html, page = page_of(*[Gallery("g", pictures=many[k:] + many[:k]) for k in (0, 10)])
    assert len(html) < 3_000_000 and "left out to keep this page small" in page.text()


def tone(seconds=0.1, kind="WAV", seed=0):
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(seed).normal(0, 0.1, int(8000 * seconds)), 8000, format=kind)
    return out.getvalue()


def test_recordings_are_embedded_and_limited():
    kinds = {"WAV": "wav", "FLAC": "flac", "OGG": "ogg", "MP3": "mpeg"}
    html, page = page_of(Sounds("s", sounds=[Sound(tone(kind=k), HOSTILE, bad=k == "WAV") for k in kinds]))
    players = [a for tag, a, _ in page.elements if tag == "audio"]
    assert [a["src"].partition(";")[0] for a in players] == [f"data:audio/{v}" for v in kinds.values()]
    assert all("controls" in a for a in players) and page.count("li", class_="bad") == 1
    policy = next(a["content"] for tag, a, _ in page.elements if tag == "meta" and a.get("http-equiv"))
    assert "media-src data:" in policy and "default-src 'none'" in policy
    _, page = page_of(Sounds("s", sounds=[Sound(b"MZ no sound", "c")]))
    assert page.count("audio") == 0 and "cannot be played" in page.text()
    many = [Sound(tone(10, seed=k), "c") for k in range(30)]  # 160 kB each
    html, page = page_of(*[Sounds("s", sounds=many[k:] + many[:k]) for k in (0, 10)])
    assert page.count("audio") == 18 and len(html) < 4_200_000 and "12 more recordings are left out" in page.text()
    wide, narrow = (report.draw(Gallery("g", pictures=[Picture(png(700, 100), "c")], wide=w)) for w in (True, False))
    assert 'class="gallery wide"' in wide and 'width="700"' in wide and 'width="512"' in narrow


def test_long_texts_are_collapsed():
    _, page = page_of(Quotes("q", quotes=[Quote("word " * 500 + "end", "c", bad=True), Quote("short", "d")]))
    assert page.count("details") == 1 and "end" in page.text() and page.count("li", class_="bad") == 1


def test_narrow_elements_are_placed_in_pairs():
    line, square = Lines("l", lines={"a": ([1], [1])}), Scatter("s", points=[(1, 1)], diagonal=True)
    table, wide = Table("t", header=("a", "b")), Table("t", header=tuple("abcd"))
    assert report.place_elements([line, table]) == ["half", "half"]
    assert report.place_elements([line, line, line, wide, square]) == ["row", "half", "half", "row", "aside"]
    assert report.place_elements([square, line, line]) == ["half", "half", "row"]


def test_colors_have_contrast_in_both_schemes():
    css = (Path(report.__file__).parent / "templates" / "report.css").read_text()

    def light(colour):
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for block in re.findall(r":root \{(.*?)\}", css, re.S)[:2]:
        tokens = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for name in ("ink", "muted", "accent", "bad", "c0", "c1", "c2", "c3", "c4", "c5"):
            for ground in ("bg", "surface"):
                a, b = sorted((light(tokens[name]), light(tokens[ground])))
                assert (b + 0.05) / (a + 0.05) >= 4.5, (name, ground)


def test_el_escapes_children_and_attributes():
    assert el("b", "<i>", Markup("<i></i>"), None, title='"', hidden=None) == '<b title="&#34;">&lt;i&gt;<i></i></b>'


# -- the model card ----------------------------------------------------------------------------------------


FRONT = {
    "license": "apache-2.0",
    "tags": ["fieldguide", "yes", "a: b #c", 'q"\\\n', "1.0", "é\u2028"],
    "task": "image-classification",
    "dataset": "digits",
    "metrics": {"accuracy": 0.986, "loss": 1e-05},
    "empty": [],
    "on": True,
    "none": None,
    "deep": {"list": [[1, 2], {"k": "v", "m": [{"z": 1}]}]},
}


def test_card_front_matter_round_trip():
    text = model_card.build_card(title='T: "x"', verdict="v", facts=[], sections=[], front=FRONT)
    start, front, _ = text.split("---\n", 2)
    read = yaml.safe_load(front)
    assert start == "" and read["tags"] == FRONT["tags"] and read["deep"] == FRONT["deep"]
    assert read["on"] is True and read["none"] is None and read["empty"] == []
    assert read["pipeline_tag"] == "image-classification" and read["metrics"] == ["accuracy", "loss"]
    assert read["model-index"] == [
        {
            "name": 'T: "x"',
            "results": [
                {
                    "task": {"type": "image-classification"},
                    "dataset": {"name": "digits", "type": "private"},
                    "metrics": [{"type": "accuracy", "value": 0.986}, {"type": "loss", "value": 1e-05}],
                }
            ],
        }
    ]


def test_card_tables_and_escapes():
    table = Table("t", "How to read.", header=("class", "F1"), rows=[["a|b\nc", 0.98765], ["`x`", None], ["\\|", 1.0]])
    text = model_card.build_card(
        title="# a\n---\nb",
        verdict="<img src=x> [l](http://x.y) *b* a_b _c_",
        front={"license": "mit"},
        facts=[("a", "1. b"), ("c", "- d")],
        sections=[("Scores", table), ("Use", "```\n*raw*\n```")],
    )
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)(?:\\\\)*\|", row)[1:-1] for row in rows]
    assert len(rows) == 5 and {len(row) for row in cells} == {2}
    assert len({len(row) for row in rows}) == 1  # aligned, to be read in a terminal
    assert [row[1].strip() for row in cells] == ["F1", "----:", "0.988", "–", "1.000"]
    assert text.count("---\n") == 2 and "# \\# a --- b\n" in text and "```\n*raw*\n```" in text
    assert "&lt;img src=x> \\[l\\](http\\://x.y) \\*b\\* a_b \\_c\\_" in text
    assert "- a: 1\\. b" in text and "- c: \\- d" in text
    empty = model_card.build_card(title="t", verdict="v", facts=[], sections=[("s", Table("t"))], front={})
    assert "Nothing to show." in empty

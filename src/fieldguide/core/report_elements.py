"""Elements of a report as plain data: tasks create them, the report draws them, and neither knows the other.

A new task needs no change in the report, and a new design no change in any task. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Numbers = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class ReportElement:
    """An element with a title and a note of a sentence or two on how to read it."""

    title: str
    note: str = ""


@dataclass(frozen=True)
class Table(ReportElement):
    """Rows of text or numbers under a header. `heat` names columns whose numbers are shaded by size.

    `links` has a relative address for each row that the first cell points to, or "".
    """

    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    heat: Sequence[str] = ()
    links: Sequence[str] = ()


@dataclass(frozen=True)
class Lines(ReportElement):
    """Curves: name -> (x values, y values). `bands` (x, low, high) are shaded; `marks` are vertical lines.

    With `dates`, x values are seconds since 1970 and are written as dates.
    """

    x: str = ""
    y: str = ""
    lines: dict[str, tuple[Numbers, Numbers]] = field(default_factory=dict)
    bands: dict[str, tuple[Numbers, Numbers, Numbers]] = field(default_factory=dict)
    marks: dict[str, float] = field(default_factory=dict)
    diagonal: bool = False  # draw y = x, as calibration wants
    log: bool = False  # logarithmic y
    faint: Sequence[str] = ()  # curves drawn thin and pale, such as values that another curve smooths
    dates: bool = False


@dataclass(frozen=True)
class Scatter(ReportElement):
    """Points (x, y), with y = x drawn where `diagonal`."""

    x: str = ""
    y: str = ""
    points: Sequence[tuple[float, float]] = ()
    diagonal: bool = False


@dataclass(frozen=True)
class Bars(ReportElement):
    """Horizontal bars: label -> value, with optional (low, high) interval for each. `highlight` names the bars to look at."""

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    unit: str = ""
    highlight: Sequence[str] = ()


@dataclass(frozen=True)
class Matrix(ReportElement):
    """Counts, row = truth, column = prediction."""

    labels: Sequence[str] = ()
    counts: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class Picture:
    """One image of a gallery: PNG, JPEG or WebP bytes, and its caption.

    `views` are further images of the same example by name, shown next to it, such as the predicted mask; `view` is the name of
    the first.
    """

    image: bytes
    caption: str
    bad: bool = False  # framed as an error
    view: str = ""
    views: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Gallery(ReportElement):
    """Images side by side; `wide` ones in their own proportions, few in a row."""

    pictures: Sequence[Picture] = ()
    wide: bool = False


@dataclass(frozen=True)
class Sound:
    """One recording: MP3, Ogg, FLAC or WAV bytes, and its caption."""

    sound: bytes
    caption: str
    bad: bool = False  # framed as an error


@dataclass(frozen=True)
class Sounds(ReportElement):
    """Recordings with a player each."""

    sounds: Sequence[Sound] = ()


@dataclass(frozen=True)
class Quote:
    """One text with its target, its prediction and the confidence.

    `weights` are (start, end, weight) of parts of the text: those with weights above 0 speak for the prediction, those below 0
    against it. They are shaded relative to the largest one.
    """

    text: str
    caption: str
    bad: bool = False
    weights: Sequence[tuple[int, int, float]] = ()


@dataclass(frozen=True)
class Quotes(ReportElement):
    """Texts with targets and predictions."""

    quotes: Sequence[Quote] = ()


@dataclass(frozen=True)
class Legend(ReportElement):
    """Names of colors (red, green, blue from 0 to 255)."""

    colors: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Code(ReportElement):
    """Commands or source code to copy."""

    code: str = ""

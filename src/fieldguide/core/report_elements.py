"""Elements of a report as plain data: tasks create them, the report draws them, and neither knows the other.

A new task needs no change in the report, and a new design no change in any task. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Rows of text or numbers under a header. `heat` names columns whose numbers are shaded by size."""

    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    heat: Sequence[str] = ()


@dataclass(frozen=True)
class Lines(ReportElement):
    """Curves: name -> (x values, y values). `band` names -> (x, low, high) are shaded; `marks` are vertical lines."""

    x: str = ""
    y: str = ""
    lines: dict[str, tuple[Numbers, Numbers]] = field(default_factory=dict)
    bands: dict[str, tuple[Numbers, Numbers, Numbers]] = field(default_factory=dict)
    marks: dict[str, float] = field(default_factory=dict)
    diagonal: bool = False  # draw y = x, as calibration wants
    log: bool = False  # logarithmic y


@dataclass(frozen=True)
class Scatter(ReportElement):
    """Points (x, y), with y = x drawn where `diagonal`."""

    x: str = ""
    y: str = ""
    points: Sequence[tuple[float, float]] = ()
    diagonal: bool = False


@dataclass(frozen=True)
class Bars(ReportElement):
    """Horizontal bars: label -> value, with optional (low, high) interval for each."""

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    unit: str = ""


@dataclass(frozen=True)
class Matrix(ReportElement):
    """Counts, row = truth, column = prediction."""

    labels: Sequence[str] = ()
    counts: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class Picture:
    """One image of a gallery: PNG, JPEG or WebP bytes, and its caption."""

    image: bytes
    caption: str
    bad: bool = False  # framed as an error


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
    """One text with its target, its prediction and the confidence."""

    text: str
    caption: str
    bad: bool = False


@dataclass(frozen=True)
class Quotes(ReportElement):
    """Texts with targets and predictions."""

    quotes: Sequence[Quote] = ()

"""Exhibits: what a report shows, as plain data. Tasks make them, the report draws them; neither knows the other.

A new task needs no change in the report, a new look no change in any task. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Exhibit:
    """`title` heads it; `note` says in a sentence or two how to read it."""

    title: str
    note: str = ""


@dataclass(frozen=True)
class Table(Exhibit):
    """Rows of text or numbers under a header. `heat` names columns whose numbers are shaded by size."""

    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    heat: Sequence[str] = ()


@dataclass(frozen=True)
class Lines(Exhibit):
    """Curves: name -> (x values, y values). `band` names -> (x, low, high) are shaded; `marks` are vertical lines."""

    x: str = ""
    y: str = ""
    lines: dict[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    bands: dict[str, tuple[Sequence[float], Sequence[float], Sequence[float]]] = field(default_factory=dict)
    marks: dict[str, float] = field(default_factory=dict)
    diagonal: bool = False  # draw y = x, as calibration wants
    log: bool = False  # logarithmic y


@dataclass(frozen=True)
class Scatter(Exhibit):
    """Points (x, y), with y = x drawn where `diagonal`."""

    x: str = ""
    y: str = ""
    points: Sequence[tuple[float, float]] = ()
    diagonal: bool = False


@dataclass(frozen=True)
class Bars(Exhibit):
    """Horizontal bars: label -> value, with optional (low, high) interval for each."""

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    unit: str = ""


@dataclass(frozen=True)
class Matrix(Exhibit):
    """Counts, row = truth, column = prediction."""

    labels: Sequence[str] = ()
    counts: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class Picture:
    """One picture of a gallery: PNG, JPEG or WebP bytes, and what to say under it."""

    image: bytes
    caption: str
    bad: bool = False  # framed as an error


@dataclass(frozen=True)
class Gallery(Exhibit):
    """Pictures side by side; `wide` ones in their own proportions, few in a row."""

    pictures: Sequence[Picture] = ()
    wide: bool = False


@dataclass(frozen=True)
class Sound:
    """One sound of a list: MP3, Ogg, FLAC or WAV bytes, and what to say under it."""

    sound: bytes
    caption: str
    bad: bool = False  # framed as an error


@dataclass(frozen=True)
class Sounds(Exhibit):
    """Sounds to listen to, one below another."""

    sounds: Sequence[Sound] = ()


@dataclass(frozen=True)
class Quote:
    """One text of a list: the text, what was true, what was said, how sure."""

    text: str
    caption: str
    bad: bool = False


@dataclass(frozen=True)
class Quotes(Exhibit):
    """Texts, one below another."""

    quotes: Sequence[Quote] = ()

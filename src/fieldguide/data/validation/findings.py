"""Symptoms: findings about what only reading can see: pictures that do not open, values that do not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from fieldguide.data.column_types import Typed
from fieldguide.data.dataset import Data, Finding
from fieldguide.data.media.media_types import Checked, Medium

SHOWN = 5  # places named in a finding


def places(data: Data, rows: np.ndarray | Iterable[int]) -> tuple[str, ...]:
    """Where the first few rows of a mask, or of a list of rows, are."""
    mask = isinstance(rows, np.ndarray) and rows.dtype == bool
    return tuple(data.place(int(i)) for i in (np.flatnonzero(rows) if mask else list(rows))[:SHOWN])


def simplified(label: str) -> str:
    """A class name without what people do not mean: case, blanks, a full stop at the end."""
    return " ".join(label.replace("_", " ").casefold().split()).rstrip(".")


def of_media(data: Data, medium: Medium, checked: Sequence[Checked], bad: np.ndarray) -> list[Finding]:
    """What the check of one file a row saw. Rows in `bad` are counted as unusable already."""
    findings = []
    for slug, (what, remedy) in medium.problems.items():
        rows = [i for i, c in enumerate(checked) if c.problem == slug]
        if rows:
            named = tuple(f"{data.place(i)} ({checked[i].detail})" for i in rows[:SHOWN])
            unusable = sum(1 for i in rows if not bad[i])
            findings.append(Finding(slug, "warning", what, named, len(rows), remedy, unusable))
    for trait, (slug, severity, what, remedy) in medium.traits.items():
        rows = [i for i, c in enumerate(checked) if trait in c.traits]
        if rows:
            findings.append(Finding(slug, severity, what, places(data, rows), len(rows), remedy))
    return findings


def of_values(data: Data, typed: Typed) -> list[Finding]:
    """Values that did not fit the kind of their column, infinite numbers, and notes of typing."""
    name, findings = typed.column.name, []
    if typed.misfits:
        common = Counter(typed.misfits.values()).most_common(3)
        shown = ", ".join(repr(v[:30]) for v, _ in common)
        findings.append(
            Finding(
                "mixed-types",
                "warning",
                f"values of column {name!r} (of {typed.expected:,}) that are no "
                f"{typed.column.kind} as the others are: {shown}; they become missing",
                places(data, typed.misfits),
                len(typed.misfits),
                f"Mend them, or say --set 'column.{name}=category' (in Python: kinds=).",
            )
        )
    if typed.infinite:
        findings.append(
            Finding(
                "infinite",
                "warning",
                f"infinite values in column {name!r}; they become missing",
                places(data, typed.infinite),
                len(typed.infinite),
                "Mend or remove them.",
            )
        )
    return findings + [Finding("reading", "note", n, (f"column {name!r}",)) for n in typed.notes]

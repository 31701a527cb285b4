"""Findings that arise while reading data: media files that cannot be decoded and values that do not fit their column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fieldguide.data.column_types import TypedColumn
from fieldguide.data.dataset import LINE, CellProblems, Data, Finding
from fieldguide.data.media.media_types import MediaCheck, Medium
from fieldguide.data.source import relative_path

MAX_SHOWN_PLACES = 5  # maximum number of locations in a finding
MAX_PROBLEM_EXAMPLES = 3  # maximum number of cells that are shown for a problem of a column
MAX_PROBLEM_LINES = 10  # maximum number of lines about the cells of a prediction's inputs


def places(data: Data, rows: np.ndarray | Iterable[int]) -> tuple[str, ...]:
    """Return the locations of the first rows of a mask or list of indices."""
    indices = np.flatnonzero(rows) if isinstance(rows, np.ndarray) and rows.dtype == bool else list(rows)
    return tuple(data.locate_row(int(i)) for i in indices[:MAX_SHOWN_PLACES])


def simplify_label(label: str) -> str:
    """Normalize a class name: ignore case, whitespace, underscores and a trailing period."""
    return " ".join(label.replace("_", " ").casefold().split()).rstrip(".")


def locate_file(data: Data, row: int, column: str, named: bool = False) -> str:
    """Return the location of a row, with the name of the media file if the location does not tell which one it is, or if `named`.

    Of pairs of files with equal names, such as an image and its mask, it is the path of the file itself.
    """
    place, file = data.locate_row(row), data.rows[column][row]
    has_line = not named and LINE in data.rows.columns and data.rows[LINE][row] is not None
    if has_line or file is None:
        return place
    if Path(place).name == Path(file).name:
        return relative_path(Path(file), Path(data.manifest.root))
    return f"{place}: {Path(file).name}"


def media_findings(data: Data, medium: Medium, checked: Sequence[MediaCheck], bad: np.ndarray, column: str) -> list[Finding]:
    """Return the findings of a media check of a column with one result per row. Rows in `bad` are already counted as unusable."""
    findings = []
    for name, (what, remedy) in medium.problems.items():
        rows = [i for i, c in enumerate(checked) if c.problem == name]
        if rows:
            is_lost = name == "missing-file"  # its name may be what is wrong
            named = tuple(f"{locate_file(data, i, column, is_lost)} ({checked[i].detail})" for i in rows[:MAX_SHOWN_PLACES])
            unusable = sum(1 for i in rows if not bad[i])
            findings.append(Finding(name, "warning", what, named, len(rows), remedy, unusable))
    for trait, (name, severity, what, remedy) in medium.traits.items():
        rows = [i for i, c in enumerate(checked) if trait in c.traits]
        if rows:
            findings.append(Finding(name, severity, what, places(data, rows), len(rows), remedy))
    return findings


def value_findings(data: Data, typed: TypedColumn) -> list[Finding]:
    """Return findings about values that do not match the type of their column, infinite numbers, and typing notes."""
    name, findings = typed.column.name, []
    if typed.misfits:
        common = Counter(typed.misfits.values()).most_common(3)
        shown = ", ".join(repr(v[:30]) for v, _ in common)
        findings.append(
            Finding(
                "mixed-types",
                "warning",
                f"values of column {name!r} (of {typed.expected:,}) that are not of the type "
                f"{typed.column.kind} like the others: {shown}; they become missing",
                places(data, typed.misfits),
                len(typed.misfits),
                f"Correct them, or use --set 'column.{name}=category' (in Python: kinds=).",
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
                "Correct or remove them.",
            )
        )
    findings += [Finding(check, "warning", what, (f"column {name!r}",), 1, remedy) for check, what, remedy in typed.doubts]
    return findings + [Finding("reading", "note", n, (f"column {name!r}",)) for n in typed.notes]


def describe_problems(problems: Sequence[CellProblems]) -> list[str]:
    """Return at most `MAX_PROBLEM_LINES` lines about cells that do not fit the schema of a trained model."""
    lines = []
    for p in problems:
        shown = ", ".join(f"{value[:40]!r} ({place})" for place, value in p.examples)
        more = ", ..." if p.count > len(p.examples) else ""
        lines.append(f"column {p.column!r}: {p.count:,} cell{'s' if p.count > 1 else ''} {p.detail}: {shown}{more}")
    if len(lines) <= MAX_PROBLEM_LINES:
        return lines
    left = lines[MAX_PROBLEM_LINES - 1 :]
    return [*lines[: MAX_PROBLEM_LINES - 1], f"{len(left)} more columns have such cells"]

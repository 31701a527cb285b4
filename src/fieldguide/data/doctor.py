"""The doctor: what is wrong with data, where, how often, and what to do. Nothing is dropped without a finding.

`check` looks at data that has been read; what only reading can see (encodings, corrupt pictures, values that do not
fit) is reported by the readers in the same form. `enforce` turns what is too bad into one error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fieldguide.data.dataset import Data, Finding
from fieldguide.data.images import PIXELS, Picture
from fieldguide.data.kinds import Typed
from fieldguide.errors import DataError

TOLERATED = 0.01           # share of unusable examples above which reading is an error
SHOWN = 5                  # places named in a finding

PICTURE_PROBLEMS = {       # slug: what, remedy
    "empty-file": ("empty files", "Copy them again or remove them."),
    "missing-file": ("pictures that are not there", "Mend the paths: they start at the folder of the table."),
    "unreadable-file": ("files that may not be read", "Change their permissions."),
    "not-an-image": ("files that are no pictures", "Remove them."),
    "corrupt-image": ("corrupt pictures", "Copy them again or remove them."),
    "truncated-image": ("truncated pictures: the end of the file is missing", "Copy them again or remove them."),
    "too-many-pixels": (f"pictures of more than {PIXELS:,} pixels, which are refused (a small file can be made to fill "
                        "the memory)", "Scale them down or remove them."),
}
PICTURE_TRAITS = {
    "wrong-extension": ("warning", "files whose name says another format than their content, which is used",
                        "Rename them."),
    "deep": ("note", "pictures of 16 or 32 bits a pixel are scaled to 8 bits by their range", ""),
    "transparent": ("note", "transparent pictures are laid over white", ""),
    "cmyk": ("note", "CMYK pictures are converted to RGB", ""),
    "animated": ("note", "animations: only the first frame is used", ""),
    "rotated": ("note", "pictures are turned as their EXIF says", ""),
}


class BadData(DataError):
    """The data cannot be used as it is; `findings` has every finding, also those that alone would not stop."""

    def __init__(self, message: str, findings: Sequence[Finding]) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


def enforce(findings: Sequence[Finding], rows: int, allow_bad: bool = False, source: str = "the data") -> None:
    """Raise BadData, listing all that is wrong, for any error or if over 1 % of `rows` examples are unusable.

    `rows` counts the examples before any was left out. `allow_bad` accepts unusable examples, never errors.
    """
    errors = [f for f in findings if f.severity == "error"]
    unusable = sum(f.unusable for f in findings)
    too_many = unusable > TOLERATED * rows and not allow_bad
    if not errors and not too_many:
        return
    listed = errors + ([f for f in findings if f.unusable and f.severity != "error"] if too_many else [])
    lines = [f"  {i}. [{f.check}] {f}" + (f" [{f.count}]" if f.count > 1 else "") for i, f in enumerate(listed, 1)]
    head = f"{source}: the data cannot be used as it is."
    if too_many:
        head += (f" {unusable:,} of {rows:,} examples are unusable ({100 * unusable / max(rows, 1):.1f} %; up to "
                 f"{100 * TOLERATED:.0f} % are left out and reported). Mend them, or leave them all out with "
                 "allow_bad=True.")
    raise BadData("\n".join([head, *lines]), findings)


def places(data: Data, rows: np.ndarray | Iterable[int]) -> tuple[str, ...]:
    """Where the first few rows of a mask or of a list of rows are."""
    index = np.flatnonzero(rows) if isinstance(rows, np.ndarray) and rows.dtype == bool else list(rows)
    return tuple(data.place(int(i)) for i in index[:SHOWN])


def simplified(label: str) -> str:
    """A class name without what people do not mean: case, blanks, a full stop at the end."""
    return " ".join(label.replace("_", " ").casefold().split()).rstrip(".")


def picture_findings(data: Data, column: str, checked: Sequence[Picture], bad: np.ndarray) -> list[Finding]:
    """What the check of the pictures in a column saw. Rows in `bad` are counted as unusable already."""
    findings = []
    for slug, (what, remedy) in PICTURE_PROBLEMS.items():
        rows = [i for i, c in enumerate(checked) if c.problem == slug]
        if rows:
            named = tuple(f"{data.place(i)} ({checked[i].detail})" if checked[i].detail else data.place(i)
                          for i in rows[:SHOWN])
            findings.append(Finding(slug, "warning", what, named, len(rows), remedy,
                                    sum(1 for i in rows if not bad[i])))
    for trait, (severity, what, remedy) in PICTURE_TRAITS.items():
        rows = [i for i, c in enumerate(checked) if trait in c.traits]
        if rows:
            findings.append(Finding(trait if trait == "wrong-extension" else f"{trait}-image", severity, what,
                                    places(data, rows), len(rows), remedy))
    return findings


def value_findings(data: Data, typed: Typed) -> list[Finding]:
    """Values that did not fit the kind of their column, infinite numbers, and notes of typing."""
    column, findings = typed.column, []
    if typed.misfits:
        counts = Counter(typed.misfits.values())
        shown = ", ".join(repr(v[:30]) for v, _ in counts.most_common(3))
        findings.append(Finding("mixed-types", "warning", f"column {column.name!r} holds {column.kind}s, but "
                                f"{len(typed.misfits)} of {typed.expected} values are none ({shown}); they become missing",
                                places(data, typed.misfits), len(typed.misfits),
                                f"Mend them, or say kinds={{{column.name!r}: 'category'}}."))
    if typed.infinite:
        findings.append(Finding("infinite", "warning", f"column {column.name!r} has infinite values; they become missing",
                                places(data, typed.infinite), len(typed.infinite), "Mend or remove them."))
    findings += [Finding("reading", "note", note, (f"column {column.name!r}",)) for note in typed.notes]
    return findings


def check(data: Data) -> list[Finding]:
    """Every finding about data that has been read; see CHECKS for what is looked at."""
    return [finding for one in CHECKS for finding in one(data)]


CHECKS: tuple[Callable[[Data], list[Finding]], ...] = ()

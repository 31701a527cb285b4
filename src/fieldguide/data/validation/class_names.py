"""Findings about the classes of boxes and masks: names with counts, and names that are nearly equal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fieldguide.data.dataset import Finding
from fieldguide.data.validation.findings import simplify_label

MAX_LISTED_CLASSES = 40  # classes listed in a finding, the most frequent ones


def list_classes(what: str, counts: Mapping[str, int | str]) -> Finding:
    """Return a note with the names and counts of classes, in the given order."""
    listed = ", ".join(
        f"{name} {count:,}" if isinstance(count, int) else f"{name} {count}"
        for name, count in list(counts.items())[:MAX_LISTED_CLASSES]
    )
    more = f", and {len(counts) - MAX_LISTED_CLASSES:,} more" if len(counts) > MAX_LISTED_CLASSES else ""
    return Finding("class-counts", "note", f"{len(counts):,} {what}: {listed}{more}")


def find_similar_names(names: Iterable[str]) -> list[Finding]:
    """Return warnings about class names that differ only by case, whitespace or a trailing period."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(simplify_label(name), []).append(name)
    return [
        Finding(
            "class-names-alike",
            "warning",
            f"classes whose names differ only by case, whitespace or a trailing period: {', '.join(map(repr, same))}",
            (),
            len(same),
            "Use the same spelling if they are the same class.",
        )
        for same in alike.values()
        if len(same) > 1
    ]

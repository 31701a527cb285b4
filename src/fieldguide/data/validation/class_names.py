"""Findings about the classes of boxes, masks and tags: names with counts, names that are nearly equal, names not in train."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from fieldguide.data.dataset import Data, Finding
from fieldguide.data.validation.findings import places, simplify_label

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


def find_unseen_classes(data: Data, classes: Sequence[Collection[str]], what: str) -> list[Finding]:
    """Return a warning about classes of val and test that do not occur in train. `classes` are those of each row."""
    if data.splits is None or "train" not in data.splits:
        return []
    known = {name for some, split in zip(classes, data.splits) if split == "train" for name in some}
    rows = [i for i, some in enumerate(classes) if not known.issuperset(some)]
    if not rows:
        return []
    names = sorted({name for i in rows for name in classes[i]} - known)
    listed = ", ".join(map(repr, names[:MAX_LISTED_CLASSES]))
    words = f"{what} with classes that do not occur in train, which count as wrong predictions: {listed}"
    return [Finding("class-not-in-train", "warning", words, places(data, rows), len(rows), "Add examples of them to train.")]

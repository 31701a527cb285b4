"""The classes in segmentation masks: how the files code them, which value is void, and names with shares of pixels.

All masks are inspected. The decisions, in this order:

1. Colors: if the names are given by color, or palettes differ between files, masks are matched by color.
2. Interpolated masks (saved as JPEG, or anti-aliased) with two main values are divided by a threshold; others are rejected.
3. Files with 0 and 1 next to files with 0 and 255, or with 0, 1, 2 next to 0, 127, 254, hold the same classes.
4. 255 without a name is void if it is rare or a border around objects, or follows three or more consecutive values; a gray
   level if the other values are gray levels; otherwise the user has to decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fieldguide.core.errors import DataError, SettingsError
from fieldguide.data.dataset import Data, Finding
from fieldguide.data.preprocessing.masks import (
    Coding,
    Mask,
    MaskContent,
    inspect_masks,
)
from fieldguide.data.validation.class_names import find_similar_names, find_unseen_classes, list_classes
from fieldguide.tasks.vision.mask_values import (
    VOID,
    describe_scaled_values,
    find_gray_levels,
    find_interpolation,
    find_scaled_values,
    is_void,
)

MAX_CLASSES = 256


class MaskContext(dict[str, Any]):
    """The context of examples with masks: `values` and `names` of the classes, and `decided`, how the files code them."""

    decided: MaskClasses


@dataclass
class MaskClasses:
    """The decisions about a set of masks."""

    names: list[str]
    values: list[int]
    coding: Coding
    threshold: float | None
    aliases: tuple[tuple[int, int], ...]
    void: tuple[int, ...]
    present: dict[Any, frozenset[int]]  # mask -> the classes in it
    findings: list[Finding] = field(default_factory=list)

    def context(self) -> MaskContext:
        """Return the context of the examples."""
        context = MaskContext(values=self.values, names=self.names)
        context.decided = self
        return context


def decide(data: Data, paths: Sequence[Mask], known: dict[str, Any], ignore: list[str]) -> MaskClasses:
    """Return the classes of masks. `known` holds names that the reader found, `ignore` the option of the user.

    Raises DataError if the masks have no two classes, or do not match the names, and SettingsError for an invalid `ignore`.
    """
    given: dict[int, str] = dict(enumerate(known.get("classes", ()))) | known.get("values", {})
    given |= {(r << 16) | (g << 8) | b: name for (r, g, b), name in known.get("colours", {}).items()}
    has_void = ignore != ["none"]
    ignored = parse_ignored(ignore if has_void else [], given)
    contents = inspect_masks(paths)
    findings: list[Finding] = []
    coding = choose_coding(contents, known, findings)
    found = [content.recode(coding) for content in contents]
    totals = count_values(contents, found)
    threshold, aliases = None, tuple[tuple[int, int], ...]()
    extremes = find_interpolation(data, paths, contents, coding, totals, given)
    if extremes is not None:
        low, high = extremes
        threshold = (low + high) / 2 + 0.5 * ((low + high) % 2)
        found = [np.where(values >= threshold, high, low) for values in found]
        several = sum(len(c.values) > 2 for c in contents)
        findings.append(describe_interpolation(extremes, threshold, len(totals), several))
        totals = count_values(contents, found)
        has_void = False
    elif has_void and (same := find_scaled_values(found, totals, given, ignored)):
        aliases = tuple(same.items())
        mixed = [i for i, values in enumerate(found) if np.isin(values, list(same)).any()]
        findings.append(describe_scaled_values(data, same, mixed, len(found)))
        for other, value in aliases:
            found = [np.where(values == other, value, values) for values in found]
        totals = count_values(contents, found)
        has_void = False
    elif not given:
        findings += find_gray_levels(data, found, totals)
    share = lambda value: totals.get(value, 0) / max(1, sum(totals.values()))
    is_open = has_void and VOID in totals and VOID not in given and VOID not in ignored and len(totals) > 2
    if is_open and is_void(data, paths, coding, totals):
        ignored.add(VOID)
    void = tuple(sorted(ignored))
    if given and extremes is not None:
        given = dict(zip(sorted(extremes), list(given.values())[:2]))
    elif given:
        check_names(data, found, given, ignored)
    kept = set() if given and extremes is not None else ignored
    values = [v for v in sorted(given or totals) if v not in kept]
    check_count(data, values, contents)
    binary = values in ([0, 255], [0, 1], [0, 0xFFFFFF]) or threshold is not None
    names = [given.get(v, ("background", "foreground")[i] if binary else str(v)) for i, v in enumerate(values)]
    number = {value: i for i, value in enumerate(values)}
    present = {path: frozenset(number[v] for v in some.tolist() if v in number) for path, some in zip(paths, found)}
    counts = {
        name: f"{100 * share(value):.3g} % of the pixels in {sum(i in p for p in present.values()):,} masks"
        for i, (name, value) in enumerate(zip(names, values))
    }
    findings += [list_classes("classes of masks", counts), *find_similar_names(names)]
    if len(paths) == len(data):
        findings += find_unseen_classes(data, [[names[i] for i in sorted(present[path])] for path in paths], "masks")
    if left := [v for v in void if v in totals]:
        findings.append(
            Finding(
                "void-pixels",
                "note",
                f"pixels of the values {', '.join(map(str, left))} ({100 * sum(map(share, left)):.3g} % of all) belong to no class: "
                "they are neither trained on nor scored",
                (),
                len(left),
            )
        )
    return MaskClasses(names, values, coding, threshold, aliases, void, present, findings)


def describe_interpolation(extremes: tuple[int, int], threshold: float, count: int, masks: int) -> Finding:
    """Return the warning that a threshold divides `count` values of interpolated masks."""
    low, high = extremes
    return Finding(
        "interpolated-masks",
        "warning",
        f"masks with {count:,} values between {low} and {high}, as JPEG or anti-aliasing produces: values from {threshold:g} are "
        f"read as {high}, lower ones as {low}",
        (),
        masks,
        "Export masks as PNG without smoothing.",
    )


def check_count(data: Data, values: Sequence[int], contents: Sequence[MaskContent]) -> None:
    """Raise DataError for fewer than two classes, or more than `MAX_CLASSES`."""
    if len(values) > MAX_CLASSES:
        raise DataError(
            f"{data.source}: the masks hold {len(values):,} different values, too many for classes. If they "
            "were saved as JPEG, which blurs, save them as PNG."
        )
    if len(values) < 2:
        more = (
            " If transparency marks the objects, export it as gray values: it is not read."
            if any(c.form == "color" for c in contents)
            else ""
        )
        raise DataError(f"{data.source}: the masks hold only one class ({values}). At least two are needed.{more}")


def choose_coding(contents: Sequence[MaskContent], known: dict[str, Any], findings: list[Finding]) -> Coding:
    """Return how masks are read: by color if the names are given so or palettes differ, else by value."""
    if known.get("colours"):
        return "color"
    forms = {content.form for content in contents}
    colors: dict[int, set[int]] = {}
    for content in contents:
        if content.form == "palette":
            for value, color in zip(content.values.tolist(), content.palette):
                colors.setdefault(value, set()).add(color)
    differing = sorted(value for value, some in colors.items() if len(some) > 1)
    mixed = "palette" in forms and any(c.form == "color" and not c.is_gray for c in contents)
    if (differing or mixed) and not known:
        what = f"palettes that differ (such as in value {differing[0]})" if differing else "palettes next to masks with colors"
        findings.append(
            Finding(
                "palettes",
                "note",
                f"masks with {what}: they are matched by color",
                (),
                sum(c.form == "palette" for c in contents),
            )
        )
        return "color"
    return (
        "value" if all(c.is_gray or c.form in ("palette", "drawn") for c in contents) else "color" if forms == {"color"} else ""
    )


def parse_ignored(ignore: list[str], given: dict[int, str]) -> set[int]:
    """Return the values that the option `ignore` lists as values or names."""
    value_of = {name: value for value, name in given.items()}
    try:
        return {value_of[v] if v in value_of else int(v) for v in ignore}
    except ValueError:
        listed = f" or classes ({', '.join(value_of)})" if value_of else ""
        raise SettingsError(
            f"task.ignore={','.join(ignore)!r}: for masks give values{listed} separated by commas, such as 11,255."
        ) from None


def count_values(contents: Sequence[MaskContent], found: Sequence[np.ndarray]) -> dict[int, int]:
    """Return value -> pixels over all masks."""
    if not found:
        return {}
    values = np.concatenate(found)
    counts = np.concatenate([c.counts for c in contents])
    distinct, place = np.unique(values, return_inverse=True)
    return dict(zip(distinct.tolist(), np.bincount(place, weights=counts).astype(np.int64).tolist()))


def check_names(data: Data, found: Sequence[np.ndarray], given: dict[int, str], ignored: set[int]) -> None:
    """Raise DataError if masks hold values without a name."""
    every = set(np.unique(np.concatenate(found)).tolist()) if found else set()
    strange = every - set(given) - ignored
    if strange:
        rows = [i for i, v in enumerate(found) if strange & set(v.tolist())]
        raise DataError(
            f"{data.source}: {len(rows):,} masks hold values outside the {len(given)} classes "
            f"({', '.join(map(str, sorted(strange)[:5]))}): "
            f"{', '.join(data.locate_row(i) for i in rows[:5])}. Correct them, name the classes, "
            "or leave those pixels out with --set task.ignore=..."
        )

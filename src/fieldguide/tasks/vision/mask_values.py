"""How the values of masks are stored: smoothed by interpolation, as numbers of classes or as gray levels, and 255 as void."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import Data, Finding
from fieldguide.data.preprocessing.masks import (
    BORDER_SIZE,
    MAX_SOLID_FRACTION,
    Coding,
    Mask,
    MaskContent,
    solid_fraction,
)

VOID = 255  # conventional value of pixels without a class
MAX_VOID_FRACTION = 0.05  # maximum fraction of pixels of 255 that is void without further evidence,
MAX_LISTED_VOID_FRACTION = 0.25  # and after at least three consecutive values
MIN_MAIN_FRACTION = 0.005  # minimum fraction of pixels of a value that is certainly a class
MAX_MINOR_FRACTION = 0.15  # maximum fraction of pixels with interpolated values
MIN_MINOR_VALUES = 8  # minimum number of interpolated values
MAX_BETWEEN_FRACTION = 0.25  # maximum fraction of pixels between the two values of smoothed binary masks
MAX_LISTED_CLASS = 20  # values up to here are rather numbers of classes than smoothed edges
MAX_SOFT_VALUES = 40  # maximum values of masks without areas
MIN_CONTRAST = 64  # minimum difference of the two values that a threshold divides
MAX_DETOUR, MIN_BLENDED = 4.0, 0.75  # distance by which a blend may miss the line between two colors; fraction of blends
MAX_BLENDED_FRACTION = 0.5  # maximum fraction of pixels of blended colors


def find_scaled_values(
    found: Sequence[np.ndarray], totals: dict[int, int], given: dict[int, str], ignored: set[int]
) -> dict[int, int]:
    """Return value -> class value of masks that hold the classes as gray levels next to masks with their numbers, else {}.

    Such are 0 and 255 next to 0 and 1, or 0, 127 and 254 next to 0, 1 and 2. No mask holds both.
    """
    small, large = (
        [v for v in sorted(totals) if low < v <= high] for low, high in ((0, MAX_LISTED_CLASS), (MAX_LISTED_CLASS, VOID))
    )
    if not small or not large or len(small) + len(large) + (0 in totals) < len(totals) or ignored & {*small, *large}:
        return {}
    if any(np.isin(values, small).any() and np.isin(values, large).any() for values in found):
        return {}
    factor = large[-1] / small[-1]
    pairs = {v: round(v / factor) for v in large}
    if any(n not in small or abs(v - n * factor) > 1 for v, n in pairs.items()) or len(set(pairs.values())) < len(small):
        return {}
    if pairs == {VOID: 1} and 1 not in given:
        return {1: VOID}
    return pairs if (len(pairs) > 1 or pairs == {VOID: 1}) and (not given or set(small) <= set(given)) else {}


def describe_scaled_values(data: Data, same: dict[int, int], mixed: Sequence[int], count: int) -> Finding:
    """Return the warning that masks hold the same classes as different values; `same` are those in the masks `mixed`."""
    one, other = (" and ".join(map(str, [0, *sorted(values)])) for values in (same, same.values()))
    pairs = ", ".join(f"{a} and {b}" for a, b in sorted((*sorted(p),) for p in same.items()))
    many = len(same) > 1
    return Finding(
        "mixed-mask-values",
        "warning",
        f"{len(mixed):,} masks hold {one}, and {count - len(mixed):,} hold {other}: {pairs} are read as the same "
        f"class{'es' if many else ''}",
        tuple(data.locate_row(i) for i in mixed[:5]),
        1,
        "If they differ, name the classes in classes.txt" + ("." if many else ", or leave 255 out with --set task.ignore=255."),
    )


def find_gray_levels(data: Data, found: Sequence[np.ndarray], totals: dict[int, int]) -> list[Finding]:
    """Return the warning that each mask holds 0 and one of two other gray levels, such as 128 and 255, if that is so."""
    levels = [v for v in sorted(totals) if v]
    rows = [[i for i, values in enumerate(found) if v in values] for v in levels]
    if len(levels) != 2 or levels[0] < MIN_CONTRAST or levels[1] > VOID or set(rows[0]) & set(rows[1]):
        return []
    first, second = levels
    return [
        Finding(
            "mixed-mask-values",
            "warning",
            f"{len(rows[0]):,} masks hold 0 and {first}, and {len(rows[1]):,} hold 0 and {second}, but none holds both: they are read as "
            "two classes",
            tuple(data.locate_row(i) for i in rows[0][:5]),
            1,
            "If they are the same class, export all masks with the same value.",
        )
    ]


def find_interpolation(
    data: Data,
    paths: Sequence[Mask],
    contents: Sequence[MaskContent],
    coding: Coding,
    totals: dict[int, int],
    given: dict[int, str],
) -> tuple[int, int] | None:
    """Return the two values that interpolated masks consist of, or None if the masks are not interpolated.

    Raises DataError for interpolated masks with more classes, and for other JPEG masks.
    """
    jpeg = [i for i, content in enumerate(contents) if content.is_jpeg]
    values = np.array(sorted(totals))
    shares = np.array([totals[v] for v in values.tolist()]) / max(1, sum(totals.values()))
    if coding == "value" and len(values) > 2 and all(c.is_gray for c in contents):
        low, high = int(values[0]), int(values[-1])
        middle = (low + high) / 2
        between = (values > low + (high - low) / 8) & (values < high - (high - low) / 8)
        is_binary = high - low >= MIN_CONTRAST and shares[between].sum() <= MAX_BETWEEN_FRACTION and len(given) in (0, 2)
        if is_binary:
            # Quantization of JPEG may shift the two values themselves.
            mains = [int(values[part][shares[part].argmax()]) for part in (values < middle, values >= middle)]
            near = (np.abs(values - mains[0]) <= 3) & (mains[0] > 3) | (np.abs(values - mains[1]) <= 8)
            minor = values[~near & (values != mains[0])]
            few = len(values) < MIN_MINOR_VALUES and not jpeg
            is_stray = not few or (bool((minor > low + MAX_LISTED_CLASS).all()) and not is_evenly_spaced(values))
            if is_stray and is_thin(paths, coding, minor):
                return low, high
        main = values[shares >= MIN_MAIN_FRACTION]
        minor = np.array([v for v in values[shares < MIN_MAIN_FRACTION].tolist() if v not in given])
        if len(values) > MAX_SOFT_VALUES and not given and is_thin(paths, coding, values):
            raise DataError(
                f"{data.source}: the masks hold {len(values):,} values that form no areas, such as probabilities or distances do. "
                "Segmentation needs one value per class."
            )
        if (
            len(minor) >= max(MIN_MINOR_VALUES, 2 * len(main))
            and shares[np.isin(values, minor)].sum() <= MAX_MINOR_FRACTION
            and is_thin(paths, coding, minor)
        ):
            raise DataError(
                f"{data.source}: the masks hold {len(values):,} values, {len(minor):,} of which occur only in thin lines between "
                "others, as smoothing or interpolation produces. Export the masks without smoothing, or scale them with nearest "
                "neighbor."
            )
    if coding == "color" and not jpeg and not given and are_blends(paths, values, shares):
        raise DataError(
            f"{data.source}: the masks hold {len(values):,} colors, most of which occur only in thin lines between areas of others, "
            "as smoothing produces. Export the masks without smoothing, or scale them with nearest neighbor."
        )
    if jpeg and len(values) > 2:
        raise DataError(
            f"{data.source}: {len(jpeg):,} masks were saved as JPEG or WebP with loss, which changes their values "
            f"({len(values):,} different ones): "
            f"{', '.join(data.locate_row(i) for i in jpeg[:5])}. Export them again as PNG."
        )
    return None


def are_blends(paths: Sequence[Mask], values: np.ndarray, shares: np.ndarray) -> bool:
    """Return whether most colors form no areas, and are between two of those that do."""
    if len(values) < MIN_MINOR_VALUES + 2:
        return False
    frequent = np.flatnonzero(shares >= MIN_MAIN_FRACTION)
    rare = np.ones(len(values), dtype=bool)
    rare[[i for i in frequent.tolist() if not is_thin(paths, "color", values[i : i + 1])]] = False
    colors = np.stack([values >> 16, values >> 8 & 255, values & 255], 1).astype(np.float64)
    main, minor = colors[~rare], colors[rare]
    if len(minor) < max(MIN_MINOR_VALUES, 2 * len(main)) or len(main) < 2 or shares[rare].sum() > MAX_BLENDED_FRACTION:
        return False
    first, second = np.triu_indices(len(main), 1)
    length = np.linalg.norm(main[first] - main[second], axis=1)
    detour = [
        (np.linalg.norm(main[first] - c, axis=1) + np.linalg.norm(main[second] - c, axis=1) - length).min() for c in minor
    ]
    return bool((np.array(detour) <= MAX_DETOUR).mean() >= MIN_BLENDED) and is_thin(paths, "color", values[rare])


def is_thin(paths: Sequence[Mask], coding: Coding, values: np.ndarray) -> bool:
    """Return whether the pixels of these values form no areas."""
    return not len(values) or solid_fraction(paths, coding, values) <= MAX_SOLID_FRACTION


def is_void(data: Data, paths: Sequence[Mask], coding: Coding, totals: dict[int, int]) -> bool:
    """Return whether 255 marks pixels without a class. Raises DataError if that cannot be told."""
    others = sorted(v for v in totals if v != VOID)
    share = totals[VOID] / sum(totals.values())
    if coding != "color" and is_evenly_spaced(np.array([*others, VOID])):
        return False  # gray levels that are chosen to be seen, such as 0, 128 and 255
    consecutive = others[-1] - others[0] < len(others) + 2 and others[-1] < VOID // 2
    if share <= MAX_VOID_FRACTION or (consecutive and len(others) >= 3 and share <= MAX_LISTED_VOID_FRACTION):
        return True
    if solid_fraction(paths, coding, [VOID], BORDER_SIZE) <= 2 * MAX_SOLID_FRACTION:
        return True
    raise DataError(
        f"{data.source}: is 255 in the masks a class, or does it mark pixels of no class? It covers {100 * share:.0f} % of the "
        f"pixels, next to the values {', '.join(map(str, others[:10]))}. Leave it out with --set task.ignore=255, or keep "
        "it as a class with --set task.ignore=none."
    )


def is_evenly_spaced(values: np.ndarray) -> bool:
    """Return whether sorted values have about equal distances of at least 8."""
    steps = np.diff(values)
    return bool(len(steps) > 1 and steps.min() >= 8 and steps.max() - steps.min() <= 2)

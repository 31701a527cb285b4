"""Panoptic quality (Kirillov et al. 2019, arXiv:1801.00868, section 4).

A predicted and a true segment of one class match if their IoU is above 0.5, which at most one pair of each does. Pixels without a
true segment are void: they are left out of the union. A predicted segment without a match is not counted as false if more than half
of it lies in void pixels or in crowds of its class; crowds need not be found.

Segments of an image do not overlap. They are given as packed masks (`fieldguide.core.packed_masks`) with `labels` N M (-1 is padding);
true ones also have flags `crowd` N M. Shapes: N images, M segments, K classes, H W height and width of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fieldguide.core.packed_masks import Arrays, number_pixels

MIN_IOU = 0.5  # above which segments match
MAX_IGNORED_FRACTION = 0.5  # of a false segment in void pixels or crowds, above which it is not counted
IOU, FOUND, FALSE, MISSED = range(4)  # columns of counts


@dataclass(frozen=True)
class Matches:
    """How the predicted segments of an image, M of them with padding, correspond to the true ones."""

    iou: np.ndarray  # M: with the true segment that it matches, else 0
    partner: np.ndarray  # M: the number of that segment, else -1
    ignored: np.ndarray  # M: without a match, but not counted as false


def match_segments(outputs: Arrays, targets: Arrays, image: int) -> Matches:
    """Match the predicted segments of an image with the true ones."""
    found, true = number_pixels(outputs, image), number_pixels(targets, image)
    labels, known, crowd = outputs["labels"][image], targets["labels"][image], targets["crowd"][image].astype(bool)
    rows, columns = len(known) + 1, len(labels) + 1
    shared = np.bincount((true.astype(np.int64) * columns + found).ravel(), minlength=rows * columns).reshape(rows, columns)
    area, true_area = shared.sum(0)[1:], shared.sum(1)[1:]
    void, both = shared[0, 1:], shared[1:, 1:]
    union = area + true_area[:, None] - both - void
    same = (known[:, None] == labels) & (labels >= 0)
    overlap = np.where(same & ~crowd[:, None], both / np.maximum(union, 1), 0.0)
    most = overlap.max(0, initial=0.0)
    matched = most > MIN_IOU
    best = overlap.argmax(0) if len(known) else np.zeros(len(labels), dtype=np.int64)
    beside = void + (both * (same & crowd[:, None])).sum(0)
    ignored = ~matched & ((beside > MAX_IGNORED_FRACTION * area) | (area == 0))
    return Matches(np.where(matched, most, 0.0), np.where(matched, best, -1), ignored)


def count_matches(outputs: Arrays, targets: Arrays, classes: int) -> np.ndarray:  # -> N K 4
    """Return, per image and class, the sum of the IoU of matched pairs, their number, and the numbers of false and missed segments."""
    counts = np.zeros((len(targets["labels"]), classes, 4))
    for image in range(len(counts)):
        found, labels, known = match_segments(outputs, targets, image), outputs["labels"][image], targets["labels"][image]
        matched = found.partner >= 0
        false = (labels >= 0) & ~matched & ~found.ignored
        missed = (known >= 0) & ~targets["crowd"][image].astype(bool)
        missed[found.partner[matched]] = False
        for column, which, weights in (
            (IOU, labels[matched], found.iou[matched]),
            (FOUND, labels[matched], None),
            (FALSE, labels[false], None),
            (MISSED, known[missed], None),
        ):
            counts[image, :, column] = np.bincount(which.astype(np.int64), weights, minlength=classes)
    return counts


def class_quality(counts: np.ndarray) -> dict[str, np.ndarray]:  # K 4 -> K each
    """Return `sq`, `rq` and `pq` of each class; NaN for classes with neither true nor false segments."""
    overlap, found, false, missed = counts.T
    there = found + false + missed > 0
    with np.errstate(invalid="ignore"):
        sq = np.where(found > 0, overlap / np.maximum(found, 1), 0.0)
        rq = found / np.where(there, found + 0.5 * false + 0.5 * missed, np.nan)
    return {"sq": np.where(there, sq, np.nan), "rq": rq, "pq": sq * rq}


def panoptic_quality(counts: np.ndarray, kinds: Mapping[str, Sequence[int]]) -> dict[str, float]:  # K 4
    """Return `pq`, `sq` and `rq`, averaged over classes, and `pq_<kind>` averaged over the classes of each kind.

    NaN if no class of a kind has a segment.
    """
    each = class_quality(counts)
    average = lambda values: float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
    scores = {name: average(each[name]) for name in ("pq", "sq", "rq")}
    return scores | {f"pq_{kind}": average(each["pq"][list(classes)]) for kind, classes in kinds.items()}

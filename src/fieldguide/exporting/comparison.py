"""Comparison of the records of an export with those of its original."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from fieldguide.core.media import Media
from fieldguide.tasks.vision.object_detection import MAX_DETECTIONS

ROUNDED = {"box": 0.101, "x": 0.101, "y": 0.101}  # values that are rounded to one decimal place: pixels
ROUNDED_IMAGES = (
    "image",
    "map",
    "video",
)  # of records: a pixel may be rounded to one level or the next; pixels of masks are numbers of classes
INTERVAL = ("value", "low", "high")  # of forecasts
DERIVED = {"found": "objects", "classes": "shares", "recommended": "items"}  # texts that sum up another value of the record


@dataclass(frozen=True)
class Comparison:
    """The comparison of records.

    Args:
        tolerance: of probabilities, and of other numbers relative to their size.
        threshold: the score from which on objects are part of a record.
        most: objects of a record at most.
    """

    tolerance: float
    threshold: float = 0.0
    most: int = MAX_DETECTIONS

    def compare(self, want: Any, got: Any, rounded: bool = False) -> tuple[float, str]:
        """Return the largest relative difference of numbers, and the first problem, or "". With `rounded`, pixels may differ by 0.1."""
        if isinstance(want, Mapping):
            keys = [
                key for key, value in want.items() if not is_left_out(key, value, want) and not self.is_cut_off(key, want, got)
            ]
            if missing := [key for key in keys if not isinstance(got, Mapping) or key not in got]:
                return 0.0, f"{missing[0]!r} is missing"
            if is_ranking(want):
                return self.compare_rankings(want, got)
            if is_forecast(want):  # a limit may be near 0 in series of large numbers
                return self.compare_forecasts(want, got)
            pairs = [(key, want[key], got[key]) for key in keys if not is_borderline(key, want, self.tolerance)]
            is_tie = is_tied(want, self.tolerance)
        elif isinstance(want, list) and isinstance(got, list) and any(is_scored(one) for one in (*want, *got)):
            return self.compare_objects(want, got)
        elif isinstance(want, list | tuple):
            if not isinstance(got, list | tuple) or len(want) != len(got):
                return 0.0, f"{want!r:.80} against {got!r:.80}"
            pairs, is_tie = [(str(i), a, b) for i, (a, b) in enumerate(zip(want, got))], False
        elif isinstance(want, int | float) and not isinstance(want, bool):
            if not isinstance(got, int | float):
                return 0.0, f"{want!r} against {got!r:.80}"
            if math.isnan(want) and math.isnan(got):
                return 0.0, ""
            difference = abs(want - got) / max(1.0, abs(want))
            return difference, "" if difference <= self.tolerance else f"{want:.6g} against {got:.6g}"
        else:
            return 0.0, "" if want == got else f"{want!r:.80} against {got!r:.80}"
        largest, first = 0.0, ""
        for key, a, b in pairs:
            if key == "shares" and isinstance(a, Mapping) and isinstance(b, Mapping):  # a class that is not named has no pixel
                a, b = ({name: float(one.get(name, 0.0)) for name in {**a, **b}} for one in (a, b))
            if rounded and key in ROUNDED and np.allclose(a, b, rtol=0, atol=ROUNDED[key]):
                continue
            if isinstance(a, Media):
                difference, problem = self.compare_images(a, b, 1 if key in ROUNDED_IMAGES else 0)
            else:
                difference, problem = self.compare(a, b, rounded)
            largest = max(largest, difference)
            if problem and not first and not (is_tie and isinstance(a, str)):
                first = f"{key}: {problem}"
        return largest, first

    def is_cut_off(self, key: str, want: Mapping[str, Any], got: Any) -> bool:
        """Return whether rounding decides if a key is among the best of a map of numbers, which holds equally many on both sides."""
        if not isinstance(got, Mapping) or key in got or len(want) != len(got) or not is_map_of_numbers(want, got):
            return False
        return want[key] <= min(want.values()) + self.tolerance and want[key] <= min(got.values()) + self.tolerance

    def compare_images(self, want: Media, got: Any, levels: int) -> tuple[float, str]:
        """Return the fraction of pixels that differ by more than some levels, and the problem if it exceeds the tolerance."""
        a, b = stack_frames(Image.open(io.BytesIO(want.content))), decode_image(got)
        if b is None or a.shape != b.shape:
            return 1.0, "the image has another size or is missing"
        difference = float(np.mean(np.abs(a - b) > levels))
        return difference, "" if difference <= self.tolerance else f"{100 * difference:.2g} % of the pixels differ"

    def compare_forecasts(self, want: Mapping[str, Any], got: Mapping[str, Any]) -> tuple[float, str]:
        """Return what `compare` does for a value with an interval, whose numbers are compared relative to the largest of them."""
        scale = max(1.0, *(abs(want[name]) for name in INTERVAL))
        rest = [{key: value for key, value in one.items() if key not in INTERVAL} for one in (want, got)]
        largest, problem = self.compare(rest[0], rest[1])
        for name in INTERVAL:
            difference = abs(want[name] - got[name]) / scale if isinstance(got[name], int | float) else math.inf
            largest = max(largest, difference)
            if not difference <= self.tolerance and not problem:
                problem = f"{name}: {want[name]:.6g} against {got[name]!r:.80}"
        return largest, problem

    def compare_rankings(self, want: Mapping[str, Any], got: Mapping[str, Any]) -> tuple[float, str]:
        """Return what `compare` does for records with `items` and their `scores`. Items of equal score may be in another order, and
        the last ones may be others of equal score.
        """
        ranked = [[{"item": i, "score": s} for i, s in zip(one["items"], one["scores"])] for one in (want, got)]
        alone = [key for key, value in want.items() if key not in ("items", "scores") and not is_left_out(key, value, want)]
        rest = [{key: one[key] for key in alone if key in one} for one in (want, got)]
        if len(ranked[0]) != len(ranked[1]) or any(len(one["items"]) != len(one["scores"]) for one in (want, got)):
            return 0.0, f"{len(want['items'])} items against {len(got['items'])}"
        limits = replace(self, threshold=-math.inf, most=max(1, len(ranked[0])))
        largest, problem = limits.compare_objects(*ranked)
        difference, other = self.compare(rest[0], rest[1])
        return max(largest, difference), problem or other

    def compare_objects(self, want: list[Any], got: list[Any]) -> tuple[float, str]:
        """Return what `compare` does for objects in the order of their scores; those of equal score may be in another order.

        An object may be missing on one side if its score is at the threshold, or if the record is full and no score is lower: which
        side of a limit it is on is then decided by rounding.
        """
        lowest = self.threshold - 2 * self.tolerance
        (want, left), largest = ([one for one in objects if one["score"] >= lowest] for objects in (want, got)), 0.0
        for one in want:
            near = [(i, other) for i, other in enumerate(left) if not self.compare(one["score"], other["score"])[1]]
            compared = [(*self.compare(one, other, True), i) for i, other in near]
            equal = [(difference, i) for difference, problem, i in compared if not problem]
            if equal:
                difference, place = min(equal)
                largest = max(largest, difference)
                left.pop(place)
            elif not self.is_at_limit(one, want, got):
                return largest, f"{one!r:.100} is missing"
        if strange := [one for one in left if not self.is_at_limit(one, want, got)]:
            return largest, f"{strange[0]!r:.100} was not found by the original"
        return largest, ""

    def is_at_limit(self, one: Mapping[str, Any], want: list[Any], got: list[Any]) -> bool:
        """Return whether rounding decides if an object is part of a record."""
        if one["score"] <= self.threshold + self.tolerance:
            return True
        full = [record for record in (want, got) if len(record) >= self.most]
        return any(one["score"] <= min(other["score"] for other in record) + self.tolerance for record in full)


def decode_image(value: Any) -> np.ndarray | None:
    """Return the frames of a PNG or WebP file in a data URL; None for anything else."""
    if not isinstance(value, str) or not value.startswith(("data:image/png;base64,", "data:image/webp;base64,")):
        return None
    return stack_frames(Image.open(io.BytesIO(base64.b64decode(value.partition(",")[2]))))


def stack_frames(image: Image.Image) -> np.ndarray:
    """Return the levels of all frames of an image, as integers."""
    return np.stack([np.asarray(frame).astype(int) for frame in ImageSequence.Iterator(image)])


def is_left_out(key: str, value: Any, record: Mapping[str, Any]) -> bool:
    """Return whether a value of a record is not compared: the place of a row, a drawing, or the sum of another value."""
    return (
        key == "input"
        or (isinstance(value, Media) and value.suffix == ".jpg")
        or DERIVED.get(key, key) in record.keys() - {key}
    )


def is_forecast(record: Mapping[str, Any]) -> bool:
    return all(isinstance(record.get(name), int | float) for name in INTERVAL)


def is_ranking(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("items"), list) and isinstance(record.get("scores"), list)


def is_map_of_numbers(*maps: Mapping[str, Any]) -> bool:
    return all(isinstance(value, int | float) for one in maps for value in one.values())


def is_scored(value: Any) -> bool:
    return isinstance(value, Mapping) and "score" in value


def is_borderline(key: str, record: Mapping[str, Any], tolerance: float) -> bool:
    """Return whether rounding decides if a row is an anomaly: its score is at the threshold, 1. The scores are compared."""
    return key == "anomaly" and isinstance(record.get("score"), float) and abs(record["score"] - 1) <= tolerance


def is_tied(record: Mapping[str, Any], tolerance: float) -> bool:
    """Return whether the two most probable answers of a record are equally probable, up to the tolerance."""
    p = record.get("probabilities")
    best = sorted(p.values(), reverse=True)[:2] if isinstance(p, Mapping) else []
    return len(best) == 2 and best[0] - best[1] <= 2 * tolerance

"""Detection: average precision as COCO defines it, by COCO's own evaluator (pycocotools).

Found boxes are matched to true ones of their class, the most confident first, each true box once, at an IoU of at
least 0.5, 0.55, ... 0.95. The precision at 101 recalls is averaged: that is the average precision of a class and an
IoU; `map` is its mean over IoUs and the classes that have a true box (cocodataset.org/#detection-eval).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from fieldguide.core.errors import DataError

MAX_DETECTIONS_PER_CLASS = 100  # boxes of one class and picture that count, the most confident ones
ALL_AREAS = ((0.0, 1e10),)  # boxes of every area; COCO's small, medium and large are not asked for
Arrays = Mapping[str, np.ndarray]


def average_precision(found: Arrays, truth: Arrays, classes: int) -> dict[str, Any]:
    """Scores of detections: N pictures, D boxes found and M true ones of each at most, K classes.

    `found` holds `boxes` N D 4, `scores` N D and `labels` N D; `truth` holds `boxes` N M 4, `labels` N M and, where
    some boxes are around crowds that may be found or not, `crowd` N M bool. Boxes are (left, top, right, bottom), in
    any unit that both share; a label of -1 is padding.

    Returns `map` and `map50`, `map75` (at one IoU); `class_map` and `class_map50`, K each, NaN for a class without a
    true box; and the curves at IoU 0.5: `recall` 101, `precision` and `confidence` K 101: to find such a part of a
    class, boxes from this score up must be taken, and such a part of them is right (0 where it cannot be reached).
    Raises `DataError` for arrays that do not fit together, scores that are no numbers, or a truth without any box.
    """
    return summarize(run_coco_evaluator(found, truth, classes))


def bootstrap(found: Arrays, truth: Arrays, classes: int, *, repeats: int, seed: int = 0) -> list[dict[str, Any]]:
    """Scores of pictures drawn with replacement, as many as there are; boxes are matched once for all draws."""
    evaluator, rng = run_coco_evaluator(found, truth, classes), np.random.default_rng(seed)
    count, each, drawn = len(truth["labels"]), np.empty(len(evaluator.evalImgs), dtype=object), []
    each[:] = evaluator.evalImgs  # for each class, each picture
    each = each.reshape(-1, count)
    while len(drawn) < repeats:
        evaluator.evalImgs = each[:, rng.integers(0, count, count)].ravel().tolist()
        scores = summarize(evaluator)
        if not np.isnan(scores["class_map"]).all():
            drawn.append(scores)
    return drawn


def run_coco_evaluator(found: Arrays, truth: Arrays, classes: int) -> Any:
    """COCO's evaluator with every picture's boxes matched."""
    check_arrays(found, truth, classes)
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        evaluator = COCOeval(build_coco(truth, classes), build_coco(found, classes), "bbox")
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [list(span) for span in ALL_AREAS], ["all"]
        evaluator.params.maxDets = [MAX_DETECTIONS_PER_CLASS]
        evaluator.evaluate()
    return evaluator


def summarize(evaluator: Any) -> dict[str, Any]:
    """Scores over the pictures that `evaluator` holds matched."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.accumulate()
    precision, scores = (evaluator.eval[name][..., 0, 0] for name in ("precision", "scores"))  # IoU, recall, K
    missing = (precision < 0).all((0, 1))
    by_iou = np.where(missing, np.nan, precision.mean(1))  # IoU, K
    curve = lambda x: np.where(missing, np.nan, np.maximum(x[0], 0)).T
    mean = lambda x: float("nan") if np.isnan(x).all() else float(np.nanmean(x))
    return {
        "map": mean(by_iou),
        "map50": mean(by_iou[0]),
        "map75": mean(by_iou[5]),
        "class_map": by_iou.mean(0),
        "class_map50": by_iou[0],
        "recall": evaluator.params.recThrs.copy(),
        "precision": curve(precision),
        "confidence": curve(scores),
    }


def build_coco(arrays: Arrays, classes: int) -> Any:
    """Boxes of all pictures as pycocotools keeps them."""
    from pycocotools.coco import COCO

    pictures, places = np.nonzero(arrays["labels"] >= 0)
    boxes = np.asarray(arrays["boxes"], dtype=np.float64)[pictures, places]
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    rows = {
        "image_id": pictures,
        "category_id": arrays["labels"][pictures, places].astype(np.int64),
        "bbox": np.concatenate([boxes[:, :2], sides], 1),
        "area": sides.prod(1),
    }
    if "scores" in arrays:
        rows["score"] = np.asarray(arrays["scores"], dtype=np.float64)[pictures, places]
    crowd = arrays["crowd"][pictures, places] if "crowd" in arrays else np.zeros(len(pictures))
    rows["iscrowd"] = crowd.astype(np.int64)
    whole = COCO()
    whole.dataset = {
        "images": [{"id": i} for i in range(len(arrays["labels"]))],
        "categories": [{"id": i} for i in range(classes)],
        # Numbered from 1: the evaluator marks with 0 a box that was not matched.
        "annotations": [
            dict(zip(("id", *rows), values))
            for values in zip(range(1, len(pictures) + 1), *(column.tolist() for column in rows.values()))
        ],
    }
    whole.createIndex()
    return whole


def check_arrays(found: Arrays, truth: Arrays, classes: int) -> None:
    for what, arrays, flat in (("found", found, ("labels", "scores")), ("true", truth, ("labels",))):
        if lacking := [name for name in ("boxes", *flat) if name not in arrays]:
            raise DataError(f"the {what} boxes come without {' and '.join(lacking)}")
        shape = arrays["labels"].shape
        flat += tuple({"crowd"} & arrays.keys())
        if arrays["boxes"].shape != (*shape, 4) or any(arrays[name].shape != shape for name in flat):
            raise DataError(
                f"the {what} boxes do not fit together: "
                + ", ".join(f"{name} {arrays[name].shape}" for name in ("boxes", *flat))
                + "; wanted are N M 4 and N M"
            )
        real = arrays["labels"] >= 0
        if (arrays["labels"] >= classes).any():
            raise DataError(f"the {what} boxes have class {int(arrays['labels'].max())}, but there are only {classes}")
        if not all(np.isfinite(arrays[name][real]).all() for name in ("boxes", *flat)):
            raise DataError(f"some {what} boxes or their scores are no finite numbers")
    if len(found["labels"]) != len(truth["labels"]):
        raise DataError(f"boxes were found in {len(found['labels'])} pictures, but are known of {len(truth['labels'])}")
    ordinary = truth["labels"] >= 0
    if "crowd" in truth:
        ordinary &= ~truth["crowd"].astype(bool)
    if not ordinary.any():
        raise DataError("no picture has a true box, so nothing can be scored. Bring pictures with objects that are known.")

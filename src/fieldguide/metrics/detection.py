"""Average precision of object detection as defined by COCO, computed by COCO's evaluator (pycocotools).

Predicted boxes are matched to true boxes of their class in descending order of score, each true box once, at IoU
thresholds 0.5, 0.55, ... 0.95. The average precision of a class at a threshold is the mean precision at 101 recalls;
`map` is its mean over thresholds and over the classes that have a true box (cocodataset.org/#detection-eval).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fieldguide.core.errors import DataError
from fieldguide.core.packed_masks import unpack_masks

MAX_DETECTIONS_PER_CLASS = 100  # highest-scored boxes per class and image that are evaluated
ALL_AREAS = ((0.0, 1e10),)  # a single area range, instead of COCO's small, medium and large
Arrays = Mapping[str, np.ndarray]


def average_precision(
    found: Arrays, truth: Arrays, classes: int, *, kind: str = "bbox", sigmas: Sequence[float] = ()
) -> dict[str, Any]:
    """Compute the average precision of detections for N images, at most D predicted and M true boxes each, K classes.

    Args:
        found: `boxes` N D 4, `scores` N D and `labels` N D.
        truth: `boxes` N M 4, `labels` N M and optionally `crowd` N M bool, which marks boxes that are not evaluated.
            Boxes are (left, top, right, bottom) in any common unit; a label of -1 is padding.
        kind: "bbox"; or "keypoints": then objects are matched by the similarity of their keypoints (OKS) in place of the IoU,
            and both dictionaries hold `keypoints` N D P 3 (x, y, visibility); `truth` also holds `area` N M of the objects.
            True objects without a labeled keypoint are not evaluated. With "segm", objects are matched by the IoU of their
            masks, and both dictionaries hold them packed (`fieldguide.core.packed_masks`).
        sigmas: the tolerance of each keypoint (cocodataset.org/#keypoints-eval).

    Returns:
        `map`; `map50` and `map75` (at one IoU); `class_map` and `class_map50`, K each, NaN for a class without a true
        box; and the curves at IoU 0.5: `recall` 101, and for each recall the `precision` and the score threshold
        `confidence`, K 101 each (0 if the recall is not reached).

    Raises:
        DataError: if the shapes of the arrays do not match, values are not finite, or there is no true box.
    """
    return summarize(run_coco_evaluator(found, truth, classes, kind, sigmas))


def bootstrap(
    found: Arrays, truth: Arrays, classes: int, *, repeats: int, seed: int = 0, **evaluation: Any
) -> list[dict[str, Any]]:
    """Return the scores of `repeats` bootstrap samples of the images. Boxes are matched only once."""
    evaluator, rng = run_coco_evaluator(found, truth, classes, **evaluation), np.random.default_rng(seed)
    samples: list[dict[str, Any]] = []
    count, flat = len(truth["labels"]), np.empty(len(evaluator.evalImgs), dtype=object)
    flat[:] = evaluator.evalImgs  # one entry per class and image
    each = flat.reshape(-1, count)
    while len(samples) < repeats:
        evaluator.evalImgs = each[:, rng.integers(0, count, count)].ravel().tolist()
        scores = summarize(evaluator)
        if not np.isnan(scores["class_map"]).all():
            samples.append(scores)
    return samples


def run_coco_evaluator(found: Arrays, truth: Arrays, classes: int, kind: str = "bbox", sigmas: Sequence[float] = ()) -> Any:
    """Return COCO's evaluator after matching the boxes of every image."""
    check_arrays(found, truth, classes)
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        evaluator = COCOeval(build_coco(truth, classes), build_coco(found, classes), kind)
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [list(span) for span in ALL_AREAS], ["all"]
        evaluator.params.maxDets = [MAX_DETECTIONS_PER_CLASS]
        if kind == "keypoints":
            evaluator.params.kpt_oks_sigmas = np.array(sigmas)
        evaluator.evaluate()
    return evaluator


def summarize(evaluator: Any) -> dict[str, Any]:
    """Compute the scores from the matches of `evaluator`."""
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
    """Convert the boxes of all images to a pycocotools data set."""
    from pycocotools.coco import COCO

    images, places = np.nonzero(arrays["labels"] >= 0)
    boxes = np.asarray(arrays["boxes"], dtype=np.float64)[images, places]
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    rows = {
        "image_id": images,
        "category_id": arrays["labels"][images, places].astype(np.int64),
        "bbox": np.concatenate([boxes[:, :2], sides], 1),
        "area": np.asarray(arrays["area"], dtype=np.float64)[images, places] if "area" in arrays else sides.prod(1),
    }
    if "keypoints" in arrays:
        points = np.asarray(arrays["keypoints"], dtype=np.float64)[images, places]
        rows["keypoints"] = points.reshape(len(points), -1)
        rows["num_keypoints"] = (points[..., 2] > 0).sum(1)
    sizes: list[dict[str, int]] = [{} for _ in arrays["labels"]]
    if "runs" in arrays:
        sizes = [{"height": int(height), "width": int(width)} for height, width in arrays["size"]]
        masks = [unpack_masks(arrays, i) for i in range(len(sizes))]
        segmentation = [masks[image][place] for image, place in zip(images.tolist(), places.tolist())]
    if "scores" in arrays:
        rows["score"] = np.asarray(arrays["scores"], dtype=np.float64)[images, places]
    crowd = arrays["crowd"][images, places] if "crowd" in arrays else np.zeros(len(images))
    rows["iscrowd"] = crowd.astype(np.int64)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, **size} for i, size in enumerate(sizes)],
        "categories": [{"id": i} for i in range(classes)],
        # Ids start at 1, because the evaluator uses 0 for unmatched boxes.
        "annotations": [
            dict(zip(("id", *rows), values))
            for values in zip(range(1, len(images) + 1), *(column.tolist() for column in rows.values()))
        ],
    }
    if "runs" in arrays:
        for annotation, runs in zip(coco.dataset["annotations"], segmentation):
            annotation["segmentation"] = runs
    coco.createIndex()
    return coco


def check_arrays(found: Arrays, truth: Arrays, classes: int) -> None:
    """Raise `DataError` if the arrays cannot be evaluated."""
    sides: list[tuple[str, Arrays, tuple[str, ...]]] = [
        ("predicted", found, ("labels", "scores")),
        ("true", truth, ("labels",)),
    ]
    for name_of_boxes, arrays, flat in sides:
        if missing := [name for name in ("boxes", *flat) if name not in arrays]:
            raise DataError(f"the {name_of_boxes} boxes have no {' and '.join(missing)}")
        shape = arrays["labels"].shape
        flat += tuple({"crowd"} & arrays.keys())
        if arrays["boxes"].shape != (*shape, 4) or any(arrays[name].shape != shape for name in flat):
            raise DataError(
                f"the shapes of the {name_of_boxes} boxes do not match: "
                + ", ".join(f"{name} {arrays[name].shape}" for name in ("boxes", *flat))
                + "; expected N M 4 and N M"
            )
        real = arrays["labels"] >= 0
        if (arrays["labels"] >= classes).any():
            raise DataError(
                f"the {name_of_boxes} boxes have class {int(arrays['labels'].max())}, but there are only {classes} classes"
            )
        if not all(np.isfinite(arrays[name][real]).all() for name in ("boxes", *flat)):
            raise DataError(f"some {name_of_boxes} boxes or their scores are not finite")
    if len(found["labels"]) != len(truth["labels"]):
        raise DataError(f"there are predictions for {len(found['labels'])} images, but true boxes for {len(truth['labels'])}")
    ordinary = truth["labels"] >= 0
    if "crowd" in truth:
        ordinary &= ~truth["crowd"].astype(bool)
    if not ordinary.any():
        raise DataError("no image has a true box, so the detections cannot be scored. Provide images with labeled objects.")

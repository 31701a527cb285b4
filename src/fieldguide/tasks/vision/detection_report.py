"""Report elements of object detection: scores by class, curves, and images with true and predicted boxes."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fieldguide.core.report_elements import Gallery, Lines, Picture, ReportElement, Table
from fieldguide.data.media import images
from fieldguide.metrics.detection import average_precision
from fieldguide.tasks.base import Arrays

SHOWN_IMAGES = 12  # images in each gallery
MAX_CURVES = 12  # classes whose curves are drawn, the most frequent ones
GALLERY_SIDE = 400  # pixels of an image's longer side in a gallery
FONT_FRACTION = 18  # of an image's longer side is the size of its labels
Match = Callable[[int, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
Draw = Callable[[Image.Image, Arrays, int, np.ndarray, float], Image.Image]
MIN_LABELED_SIDE = 100  # pixels; the boxes of smaller images have no labels


def open_image(path: str, scale: images.Scale | None = None) -> Image.Image:
    with images.suppress_warnings(), images.open_image(path) as image:
        return images.convert_mode(image, "RGB", scale).copy()


def class_color(label: int) -> tuple[int, int, int]:
    """Return a color per class: hues spaced by the golden angle."""
    red, green, blue = colorsys.hsv_to_rgb((0.33 + 0.618034 * label) % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    picture: Image.Image, boxes: np.ndarray, labels: np.ndarray, names: Sequence[str], scores: np.ndarray | None = None
) -> Image.Image:
    """Return the image with boxes (M, 4, in pixels) and class names, and scores if given, in a size that follows the image size.

    A label is above, below or inside its box, wherever it does not cover another label.
    """
    out = picture.copy()
    pen, width = ImageDraw.Draw(out), max(1, round(max(out.size) / 200))
    font = ImageFont.load_default(max(10, round(max(out.size) / FONT_FRACTION)))
    for place in range(len(labels)):
        left, top, right, bottom = (float(v) for v in boxes[place])
        pen.rectangle(
            (left, top, max(left, right - 1), max(top, bottom - 1)), outline=class_color(int(labels[place])), width=width
        )
    if min(out.size) < MIN_LABELED_SIDE:
        return out
    taken: list[tuple[float, float, float, float]] = []
    for place in range(len(labels)):
        left, top, right, bottom = (float(v) for v in boxes[place])
        label = int(labels[place])
        words = names[label] if scores is None else f"{names[label]} {scores[place]:.2f}"
        begin, over, long, high = pen.textbbox((0, 0), words, font=font)
        long, high = long - begin + 6, high - over + 6
        x = min(max(0.0, left), max(0.0, out.width - long))
        spots = [(x, y, x + long, y + high) for y in (top - high, bottom, top, bottom - high) if 0 <= y <= out.height - high]
        spots = spots or [(x, 0.0, x + long, high)]
        spot = next((s for s in spots if not any(overlaps(s, other) for other in taken)), spots[0])
        taken.append(spot)
        pen.rectangle(spot, fill=class_color(label))
        red, green, blue = class_color(label)
        ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 110 else "white"
        pen.text((spot[0] + 3 - begin, spot[1] + 3 - over), words, fill=ink, font=font)
    return out


def overlaps(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    """Return whether two rectangles (left, top, right, bottom) overlap."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def match_boxes(
    boxes: np.ndarray, labels: np.ndarray, true: np.ndarray, is_: np.ndarray, crowd: np.ndarray, limit: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Match predicted boxes (sorted by score) to true boxes one to one, with IoU of at least `limit`.

    Returns which predictions are correct and which true boxes are found. A prediction on a crowd box counts as
    correct, and crowd boxes need not be found.
    """
    if not len(labels) or not len(is_):
        return np.zeros(len(labels), dtype=bool), np.zeros(len(is_), dtype=bool)
    size = lambda b: np.clip(b[..., 2:] - b[..., :2], 0, None).prod(-1)
    corners = np.maximum(boxes[:, None, :2], true[None, :, :2]), np.minimum(boxes[:, None, 2:], true[None, :, 2:])
    shared = size(np.concatenate(corners, -1))
    joint = np.where(crowd, size(boxes)[:, None], size(boxes)[:, None] + size(true)[None] - shared)
    return match_overlaps(np.where(labels[:, None] == is_[None], shared / np.maximum(joint, 1e-9), 0), crowd, limit)


def match_overlaps(overlap: np.ndarray, crowd: np.ndarray, limit: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Match predictions (sorted by score) to true objects as `match_boxes` does, given the overlap of each pair of equal class."""
    right, met = (np.zeros(size, dtype=bool) for size in overlap.shape)
    if not overlap.size:
        return right, met
    for place in range(len(right)):
        free = np.where(met & ~crowd, 0, overlap[place])
        ordinary = np.where(crowd, 0, free)
        best = int((ordinary if ordinary.max() >= limit else free).argmax())
        if free[best] >= limit:
            right[place] = met[best] = True
    return right, met


def build_elements(
    paths: Sequence[str],
    titles: Sequence[str],
    outputs: Arrays,
    targets: Arrays,
    names: Sequence[str],
    least: float,
    values: images.Scale | None = None,
    *,
    kind: str = "bbox",
    noun: str = "boxes",
    match: Match | None = None,
    draw: Draw | None = None,
) -> dict[str, list[ReportElement]]:
    """Return a table of the classes, curves and galleries.

    `least` is the score from which on objects count. `match(image, real, known)` returns which of the predicted objects `real` are
    right and which of the true ones `known` are found; by default boxes are matched. `draw(picture, objects, image, which, scale)`
    draws some objects, `outputs` or `targets`, of an image on a reduced picture; by default their boxes are drawn.
    """
    scores, classes = average_precision(outputs, targets, len(names), kind=kind), len(names)
    there, found, missed, false = (np.zeros(classes, dtype=int) for _ in range(4))
    wrong, kept = np.zeros(len(paths)), []
    for i in range(len(paths)):
        real, known = (outputs["labels"][i] >= 0) & (outputs["scores"][i] >= least), targets["labels"][i] >= 0
        boxes, labels, sure = outputs["boxes"][i][real], outputs["labels"][i][real].astype(int), outputs["scores"][i][real]
        true, is_, crowd = targets["boxes"][i][known], targets["labels"][i][known], targets["crowd"][i][known]
        right, met = match(i, real, known) if match else match_boxes(boxes, labels, true, is_, crowd)
        for counts, some in (
            (there, is_[~crowd]),
            (found, is_[met & ~crowd]),
            (missed, is_[~met & ~crowd]),
            (false, labels[~right]),
        ):
            counts += np.bincount(some, minlength=classes)
        errors = int((~met & ~crowd).sum() + (~right).sum())
        wrong[i] = errors / max(1, len(labels) + len(is_))
        kept.append((boxes, labels, sure, true, is_, errors, real, known))
    order = np.argsort(-there, kind="stable")
    rows = [
        (
            names[k],
            int(there[k]),
            int(found[k]),
            int(missed[k]),
            int(false[k]),
            float(scores["class_map50"][k]),
            float(scores["class_map"][k]),
        )
        for k in order
    ]
    curves = {names[k]: (scores["recall"].tolist(), scores["precision"][k].tolist()) for k in order[:MAX_CURVES] if there[k]}

    def gallery(title: str, which: Sequence[int]) -> Gallery:
        pictures = []
        for i in which:
            boxes, labels, sure, true, is_, errors, real, known = kept[i]
            picture = open_image(paths[i], values)
            scale = GALLERY_SIDE / max(picture.size)
            small = picture.resize([max(1, round(v * scale)) for v in picture.size], Image.Resampling.BILINEAR)
            true_view, said_view = (
                draw(small, targets, i, known, scale) if draw else draw_boxes(small, true * scale, is_, names),
                draw(small, outputs, i, real, scale) if draw else draw_boxes(small, boxes * scale, labels, names, sure),
            )
            caption = f"{titles[i]}: {len(is_)} true, {len(labels)} predicted, {errors} wrong"
            views = {"predicted": encode_jpeg(said_view)}
            pictures.append(Picture(encode_jpeg(true_view), caption, errors > 0, view="true", views=views))
        return Gallery(title, f"True {noun} on the left, predicted {noun} on the right.", pictures)

    worst = np.argsort(-wrong, kind="stable")[:SHOWN_IMAGES]
    chance = np.random.default_rng(0).permutation(len(paths))[:SHOWN_IMAGES]
    return {
        "Classes": [
            Table(
                "By class",
                f"Found and false at a score of at least {least:.2f} and an IoU of 0.5. AP50: average precision "
                "at IoU 0.5; AP: mean over IoU 0.5 to 0.95.",
                ("class", f"true {noun}", "found", "missed", "false positives", "AP50", "AP"),
                rows,
                heat=("AP50", "AP"),
            ),
            Lines(
                "Precision and recall",
                f"At IoU 0.5. Higher recall needs {noun} with lower scores, fewer of which are correct.",
                "recall",
                "precision",
                curves,
            ),
        ],
        "Images": [gallery("Worst", worst.tolist()), gallery("Random sample", chance.tolist())],
    }


def encode_jpeg(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    return out.getvalue()

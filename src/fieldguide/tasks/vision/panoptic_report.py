"""Report elements of panoptic segmentation: quality by class, and images with true and predicted segments."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fieldguide.core.packed_masks import Arrays, decode_mask, unpack_masks
from fieldguide.core.report_elements import Gallery, Picture, ReportElement, Table
from fieldguide.data.media import images
from fieldguide.metrics.panoptic import FALSE, FOUND, MISSED, class_quality
from fieldguide.tasks.vision.detection_report import (
    FONT_FRACTION,
    GALLERY_SIDE,
    MIN_LABELED_SIDE,
    SHOWN_IMAGES,
    class_color,
    encode_jpeg,
    open_image,
)
from fieldguide.tasks.vision.instance_report import paint_masks

MIN_LABELED_FRACTION = 0.01  # of the image: smaller segments have no label


def draw_segments(picture: Image.Image, objects: Arrays, image: int, which: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Return a picture with some segments of an image in the colors of their classes, and names on the larger ones."""
    out = paint_masks(picture, objects, image, which)
    if min(out.size) < MIN_LABELED_SIDE:
        return out
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(max(10, round(max(out.size) / FONT_FRACTION)))
    masks = unpack_masks(objects, image)
    for place in np.flatnonzero(which):
        mask = decode_mask(masks[place])
        if mask.sum() < MIN_LABELED_FRACTION * mask.size:
            continue
        y, x = find_center(mask)
        label = int(objects["labels"][image][place])
        at = (x / mask.shape[1] * out.width, y / mask.shape[0] * out.height)
        color = class_color(label)
        box = pen.textbbox(at, names[label], font=font, anchor="mm")
        pen.rectangle((box[0] - 3, box[1] - 2, box[2] + 3, box[3] + 2), fill=color)
        ink = "black" if 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] > 110 else "white"
        pen.text(at, names[label], fill=ink, font=font, anchor="mm")
    return out


def find_center(mask: np.ndarray) -> tuple[float, float]:  # H W bool -> y, x
    """Return a point inside of a mask: the middle of the longest run in the row where the mask is widest."""
    row = int(mask.sum(1).argmax())
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask[row].astype(np.int8), [0]])))
    starts, ends = edges[::2], edges[1::2]
    longest = int((ends - starts).argmax())
    return row + 0.5, float(starts[longest] + ends[longest]) / 2


def build_panoptic_elements(
    paths: Sequence[str],
    titles: Sequence[str],
    outputs: Arrays,
    targets: Arrays,
    names: Sequence[str],
    things: Collection[int],
    counts: np.ndarray,
    values: images.Scale | None = None,
) -> dict[str, list[ReportElement]]:  # counts N K 4, see `fieldguide.metrics.panoptic`
    """Return a table of the classes, and galleries of images with the worst and with random segments."""
    total = counts.sum(0)
    each = class_quality(total)
    true = total[:, FOUND] + total[:, MISSED]
    rows = [
        (
            names[k],
            "thing" if k in things else "stuff",
            int(true[k]),
            *(int(total[k, column]) for column in (FOUND, MISSED, FALSE)),
            *(float(each[name][k]) for name in ("sq", "rq", "pq")),
        )
        for k in np.argsort(-true, kind="stable")
    ]
    errors = counts[..., FALSE].sum(1) + counts[..., MISSED].sum(1)
    share = errors / np.maximum(errors + counts[..., FOUND].sum(1), 1)

    def gallery(title: str, which: Sequence[int]) -> Gallery:
        pictures = []
        for i in which:
            picture = open_image(paths[i], values)
            scale = GALLERY_SIDE / max(picture.size)
            small = picture.resize([max(1, round(v * scale)) for v in picture.size], Image.Resampling.BILINEAR)
            true_view, said_view = (
                draw_segments(small, arrays, i, arrays["labels"][i] >= 0, names) for arrays in (targets, outputs)
            )
            found, missed, false = (int(counts[i, :, column].sum()) for column in (FOUND, MISSED, FALSE))
            caption = f"{titles[i]}: {found} found, {missed} missed, {false} false"
            views = {"predicted": encode_jpeg(said_view)}
            pictures.append(Picture(encode_jpeg(true_view), caption, missed + false > 0, view="true", views=views))
        return Gallery(title, "True segments on the left, predicted segments on the right.", pictures)

    worst = np.argsort(-share, kind="stable")[:SHOWN_IMAGES]
    chance = np.random.default_rng(0).permutation(len(paths))[:SHOWN_IMAGES]
    return {
        "Classes": [
            Table(
                "By class",
                "A segment is found if one of its class has an IoU above 0.5 with it. SQ: mean IoU of found segments; RQ: found "
                "segments, divided by these plus half of the missed and half of the false ones; PQ: their product.",
                ("class", "kind", "true segments", "found", "missed", "false positives", "SQ", "RQ", "PQ"),
                rows,
                heat=("SQ", "RQ", "PQ"),
            )
        ],
        "Images": [gallery("Worst", worst.tolist()), gallery("Random sample", chance.tolist())],
    }

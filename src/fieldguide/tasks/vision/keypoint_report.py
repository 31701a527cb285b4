"""Report elements of keypoint detection: a table of keypoints, and images with true and predicted poses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from fieldguide.core.report_elements import Gallery, Picture, ReportElement, Table
from fieldguide.data.media import images
from fieldguide.data.media.boxes import Skeleton
from fieldguide.tasks.base import Arrays
from fieldguide.tasks.vision.detection_report import GALLERY_SIDE, SHOWN_IMAGES, class_color, encode_jpeg, open_image

NEAR = 0.1  # of the root of the object's area: the distance up to which a keypoint is near
MIN_SIMILARITY = 0.5  # OKS from which on an object counts as found


def draw_poses(picture: Image.Image, poses: np.ndarray, lines: Sequence[tuple[int, int]], least: float) -> Image.Image:
    """Return the image with poses (M, P, 3): the keypoints whose third value is at least `least`, and the lines between them."""
    out = picture.copy()
    pen, width = ImageDraw.Draw(out), max(1, round(max(out.size) / 150))
    for points in poses:
        for a, b in lines:
            if min(points[a, 2], points[b, 2]) >= least:
                pen.line(
                    [tuple(map(float, points[a, :2])), tuple(map(float, points[b, :2]))], fill=(255, 255, 255), width=width
                )
        for place, (x, y, known) in enumerate(points.tolist()):
            if known >= least:
                box = (x - 1.5 * width, y - 1.5 * width, x + 1.5 * width, y + 1.5 * width)
                pen.ellipse(box, fill=class_color(place), outline="black")
    return out


def measure_similarity(found: np.ndarray, true: np.ndarray, area: np.ndarray, sigmas: Sequence[float]) -> np.ndarray:
    """Return the OKS of poses found (D, P, 3) with true ones (M, P, 3) of some area (M): (D, M)."""
    known = true[..., 2] > 0
    apart = ((found[:, None, :, :2] - true[None, :, :, :2]) ** 2).sum(-1)  # D M P
    near = np.exp(-apart / (2 * area[:, None] * (2 * np.array(sigmas)) ** 2 + np.spacing(1))) * known
    return near.sum(-1) / np.maximum(known.sum(-1), 1)


def match_poses(similarity: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs of found (sorted by score) and true poses, one to one, each with the most similar that is free."""
    pairs: list[tuple[int, int]] = []
    free = np.ones(similarity.shape[1], dtype=bool)
    for place, row in enumerate(similarity):
        if free.any() and (best := int(np.where(free, row, -1).argmax())) >= 0 and row[best] >= MIN_SIMILARITY:
            free[best] = False
            pairs.append((place, best))
    return pairs


def build_pose_elements(
    paths: Sequence[str],
    titles: Sequence[str],
    outputs: Arrays,
    targets: Arrays,
    skeleton: Skeleton,
    sigmas: Sequence[float],
    least: float,
    known_from: float,
    values: images.Scale | None = None,
) -> dict[str, list[ReportElement]]:
    """Return a table of the keypoints of found objects, and galleries; `least` is the score from which on objects count."""
    count = len(skeleton.names)
    labeled, near = np.zeros(count, dtype=int), np.zeros(count, dtype=int)
    distances: list[list[float]] = [[] for _ in range(count)]
    kept, errors = [], np.zeros(len(paths))
    for i in range(len(paths)):
        real = (outputs["labels"][i] >= 0) & (outputs["scores"][i] >= least)
        there = (targets["labels"][i] >= 0) & ~targets["crowd"][i].astype(bool) & (targets["keypoints"][i][..., 2] > 0).any(-1)
        found, true, area = outputs["keypoints"][i][real], targets["keypoints"][i][there], targets["area"][i][there]
        same = outputs["labels"][i][real][:, None] == targets["labels"][i][there][None]
        similarity = measure_similarity(found, true, area, sigmas) * same
        pairs = match_poses(similarity)
        labeled += (true[..., 2] > 0).sum(0)
        for mine, other in pairs:
            apart = np.hypot(*(found[mine, :, :2] - true[other, :, :2]).T) / np.sqrt(max(area[other], 1.0))
            for k in np.flatnonzero(true[other, :, 2] > 0):
                distances[k].append(float(apart[k]))
                near[k] += apart[k] <= NEAR
        mean = float(np.mean([similarity[a, b] for a, b in pairs])) if pairs else 0.0
        errors[i] = 1 - mean * 2 * len(pairs) / max(1, len(found) + len(true))
        kept.append((found, true, len(pairs), mean))
    rows = [
        (
            name,
            int(labeled[k]),
            len(distances[k]),
            float(np.median(distances[k])) if distances[k] else float("nan"),
            near[k] / max(1, labeled[k]),
            sigmas[k],
        )
        for k, name in enumerate(skeleton.names)
    ]

    def gallery(title: str, which: Sequence[int]) -> Gallery:
        pictures = []
        for i in which:
            found, true, right, mean = kept[i]
            picture = open_image(paths[i], values)
            scale = GALLERY_SIDE / max(picture.size)
            small = picture.resize([max(1, round(v * scale)) for v in picture.size], Image.Resampling.BILINEAR)
            factor = np.array([scale, scale, 1.0])
            views = {"predicted": encode_jpeg(draw_poses(small, found * factor, skeleton.lines, known_from))}
            shown = encode_jpeg(draw_poses(small, true * factor, skeleton.lines, 1))
            caption = f"{titles[i]}: {len(true)} true, {len(found)} predicted, {right} matched, mean OKS {mean:.2f}"
            pictures.append(Picture(shown, caption, right < max(len(true), len(found)), view="true", views=views))
        return Gallery(title, "True keypoints on the left, predicted keypoints on the right.", pictures)

    chance = np.random.default_rng(0).permutation(len(paths))[:SHOWN_IMAGES]
    about = (
        f"Of objects found with a score of at least {least:.2f} and an OKS of at least {MIN_SIMILARITY}. The distance is a fraction "
        f"of the root of the object's area; near: at most {NEAR} of it, of all labeled keypoints."
    )
    return {
        "Keypoints": [
            Table(
                "By keypoint", about, ("keypoint", "labeled", "found", "median distance", "near", "sigma"), rows, heat=("near",)
            )
        ],
        "Images": [
            gallery("Worst", np.argsort(-errors, kind="stable")[:SHOWN_IMAGES].tolist()),
            gallery("Random sample", chance.tolist()),
        ],
    }

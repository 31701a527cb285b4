"""Anomaly maps as images, and the report elements of anomaly detection in images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fieldguide.core.report_elements import Gallery, Picture, ReportElement, Table
from fieldguide.data.media import images
from fieldguide.data.preprocessing import ImageTransform
from fieldguide.metrics.anomalies import roc_auc

SHOWN_IMAGES = 12  # in each gallery
SHOWN_SIDE = 256  # maximum pixels per side of an image in the report
HOT, MAX_OPACITY = np.array([255.0, 40.0, 20.0]), 0.7  # color of the map where it is twice the threshold
MAX_VALUE = 2.0  # of a map, in thresholds, that is drawn in full


def open_picture(path: str | Path, scale: images.Scale | None, most: int | None = None) -> np.ndarray:  # -> H W 3 uint8
    """Return an image in color; with `most`, it is reduced to that many pixels per side."""
    with images.suppress_warnings(), images.open_image(path) as image:
        picture = images.convert_mode(image, "RGB", scale).copy()
    if most is not None:
        picture.thumbnail((most, most))
    return np.asarray(picture)


def paint_map(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:  # H W 3 uint8, h w -> H W 3 uint8
    """Return an image with its anomaly map over it: nothing below half of the threshold, red at twice the threshold."""
    size = (picture.shape[1], picture.shape[0])
    full = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    opacity = MAX_OPACITY * np.clip((full - 0.5) / (MAX_VALUE - 0.5), 0, 1)[..., None]
    return ((1 - opacity) * picture + opacity * HOT).astype(np.uint8)


def encode_map(heat: np.ndarray) -> bytes:
    """Return a map as a gray PNG: values of 0 to 2 are 0 to 255, larger ones 255."""
    out = io.BytesIO()
    Image.fromarray(np.clip(heat * (255 / MAX_VALUE), 0, 255).round().astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def list_kinds(names: Sequence[str], score: np.ndarray, label: np.ndarray) -> list[ReportElement]:
    """Return how well the anomalies of each label are detected."""
    kinds = sorted({name for name, value in zip(names, label) if value == 1})
    if not kinds:
        return []
    normal, array, rows = label == 0, np.array(names), []
    for kind in kinds:
        own = (array == kind) & (label == 1)
        area = roc_auc(np.concatenate([score[own], score[normal]]), np.arange(own.sum() + normal.sum()) < own.sum())
        rows.append((kind, int(own.sum()), float((score[own] >= 1).mean()), area))
    return [
        Table(
            "By kind of anomaly",
            "Fraction of the anomalies of each label that are detected, and the chance that one ranks above a normal image.",
            ("label", "images", "detected", "AUC"),
            rows,
            heat=("detected", "AUC"),
        )
    ]


def draw_galleries(
    paths: Sequence[str],
    places: Sequence[str],
    maps: np.ndarray,
    score: np.ndarray,
    label: np.ndarray,
    masks: np.ndarray | None,
    transform: ImageTransform,
) -> list[ReportElement]:
    """Return images with their anomaly maps: the highest scores, missed anomalies and false alarms. `maps` N S S, `masks` too."""
    order = np.argsort(-score, kind="stable")
    chosen = {
        "Highest scores": ("The most unusual test images. Red is where they are unlike normal images.", list(order)),
        "Missed anomalies": (
            "Anomalies with the lowest scores, below the threshold.",
            [i for i in order[::-1] if label[i] == 1 and score[i] < 1],
        ),
        "False alarms": (
            "Images labeled normal with a score above the threshold. Is the alarm wrong, or the label?",
            [i for i in order if label[i] == 0 and score[i] >= 1],
        ),
    }
    words = {1: "anomaly", 0: "normal", -1: "no label"}
    found: list[ReportElement] = []
    for title, (about, rows) in chosen.items():
        pictures = []
        for i in rows[:SHOWN_IMAGES]:
            picture = open_picture(paths[i], transform.scale, SHOWN_SIDE)
            views = {"anomaly map": encode_jpeg(paint_map(picture, maps[i]))}
            if masks is not None:
                mask = (masks[i] == 1).astype(np.uint8) * 255
                views["true mask"] = encode_jpeg(mask)
            caption = f"{Path(places[i]).parent.name}/{Path(places[i]).name}: {score[i]:.2f}, {words[int(label[i])]}"
            wrong = label[i] >= 0 and (score[i] >= 1) != (label[i] == 1)
            pictures.append(Picture(encode_jpeg(picture), caption, bad=bool(wrong), view="image", views=views))
        if pictures:
            found.append(Gallery(title, about, pictures))
    return found


def encode_jpeg(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=85)
    return out.getvalue()

"""Galleries of translated images: next to their targets, or translated there and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fieldguide.core.report_elements import Gallery, Picture, ReportElement
from fieldguide.data.dataset import Data
from fieldguide.metrics import image_quality
from fieldguide.tasks.evaluator import Arrays
from fieldguide.tasks.vision.image_encoding import encode_png
from fieldguide.tasks.vision.image_restoration import convert_channels

SHOWN_IMAGES = 12  # of each gallery


def show_pairs(test: Data, outputs: Arrays, targets: Arrays) -> list[ReportElement]:
    """Return a random sample and the worst predictions, each with its input and its target."""
    made, real = np.clip(outputs["made"], -1, 1), targets["real"]
    errors = image_quality.absolute_error(torch.from_numpy(made), torch.from_numpy(real)).numpy()
    random = np.random.default_rng(0).permutation(len(errors))[:SHOWN_IMAGES]
    found: list[ReportElement] = []
    for title, rows in (("Random sample", random), ("Worst", np.argsort(-errors)[:SHOWN_IMAGES])):
        shown = [
            Picture(
                join_images(targets["input"][i], made[i], real[i]), f"{Path(test.locate_row(int(i))).name}: {errors[i]:.3f}"
            )
            for i in rows
        ]
        found.append(Gallery(title, "Left the input, in the middle the prediction, right the target; L1.", shown))
    return found


def show_domains(domains: list[str], outputs: Arrays, targets: Arrays) -> list[ReportElement]:
    """Return a random sample of translations to each domain, with the images and the translations back."""
    made, again = (np.clip(outputs[name], -1, 1) for name in ("made", "again"))
    second, rng = targets["reverse"].astype(bool), np.random.default_rng(0)
    about = "Left the image, in the middle its translation, right the translation back. Not selected."
    found: list[ReportElement] = []
    for rows, there in ((np.flatnonzero(~second), domains[1]), (np.flatnonzero(second), domains[0])):
        chosen = rng.permutation(rows)[:SHOWN_IMAGES]
        shown = [Picture(join_images(targets["input"][i], made[i], again[i]), "") for i in chosen]
        found.append(Gallery(f"To {there}", about, shown))
    return found


def join_images(*parts: np.ndarray) -> bytes:  # C S S each -> PNG
    """Return images side by side."""
    most = max(len(part) for part in parts)
    return encode_png(np.concatenate([convert_channels(torch.from_numpy(p)[None], most)[0].numpy() for p in parts], 2))

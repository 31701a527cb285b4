"""The objective that trains a detector, by the output type of its card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fieldguide.objectives.denoising_detection import DenoisingDetection
from fieldguide.objectives.detection import Detection
from fieldguide.objectives.region_detection import RegionDetection
from fieldguide.objectives.set_detection import SetDetection

# Each is made from (model, inputs, max_detections=..., overlap=...) and returns `boxes`, `scores` and `labels` as `Detection` does.
DETECTORS: Mapping[str, type[Any]] = {
    "boxes": Detection,
    "queries": SetDetection,
    "scored-queries": DenoisingDetection,
    "regions": RegionDetection,
}

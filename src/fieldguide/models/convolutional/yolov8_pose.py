"""YOLOv8-pose: detection of objects with their keypoints (Ultralytics 2023; Maji et al. 2022, arXiv:2204.06806).

New here: a third branch of each head predicts the keypoints of the object that a grid point detects, relative to the point, with
the probability that each is labeled. So a pose needs neither heatmaps nor a second network per object, and its cost does not
depend on the number of objects. Keypoints are trained by the object keypoint similarity that they are scored with.

The rest is YOLOv8. This file was written from public descriptions and parameter counts. The original code is AGPL-3.0; none of
it is used.

Initialization: as YOLOv8.
Shapes: B batch, C channels, H W height and width, D width of a map, R bins of a distance, K classes, P keypoints, A points of all
levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fieldguide.core.card import UNIT, Card, Size
from fieldguide.models.convolutional import yolov8
from fieldguide.models.convolutional.yolov8 import Head, Step, YOLOv8


@dataclass(frozen=True, kw_only=True)
class Config(yolov8.Config):
    num_classes: int = 1  # K
    keypoints: int = 17  # P


class PoseHead(Head):
    """Head of one level: distances, classes, and three values for each keypoint, in three separate branches."""

    def __init__(self, dim: int, box: int, label: int, pose: int, config: Config):
        super().__init__(dim, box, label, config.bins, config.num_classes)
        self.pose = nn.Sequential(Step(dim, pose, 3), Step(pose, pose, 3), nn.Conv2d(pose, 3 * config.keypoints, 1))

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B HW 4R+K+3P
        return torch.cat([super().forward(x), self.pose(x).flatten(2).mT], -1)


class YOLOv8Pose(YOLOv8):
    """YOLOv8 with keypoints: images of any size -> B A 4R+K+3P (see `OUTPUT_TYPES["poses"]`)."""

    def __init__(self, config: Config):
        super().__init__(config)
        c3 = config.widths[2]
        box, label = max(16, c3 // 4, 4 * config.bins), max(c3, min(config.num_classes, 100))
        pose = max(c3 // 4, 3 * config.keypoints)
        self.heads = nn.ModuleList(PoseHead(dim, box, label, pose, config) for dim in config.widths[2:])
        self.reset_parameters()


POSE = {"{k}.conv.weight": "{k}.conv.weight", "{k}.bn.*": "{k}.norm.*", "{k}.*": "{k}.*"}
ULTRALYTICS = {
    **{f"model.22.cv4.{{l}}.{theirs}": f"heads.{{l}}.pose.{ours}" for theirs, ours in POSE.items()},
    **yolov8.ultralytics_keys(),
}

# Published is only the number of millions, with the 16 constants of model.22.dfl.conv.
SOURCE = "docs.ultralytics.com: {}M"

CARD = Card(
    name="yolov8-pose",
    model=YOLOv8Pose,
    config=Config,
    paper="https://docs.ultralytics.com/tasks/pose",
    year=2023,
    input_type="image",
    output_type="poses",
    sizes={
        "yolov8n-pose": Size(params=3_295_454, source=SOURCE.format("3.3")),
        "yolov8s-pose": Size(**yolov8.CARD.sizes["yolov8s"].overrides, params=11_626_030, source=SOURCE.format("11.6")),
        "yolov8m-pose": Size(**yolov8.CARD.sizes["yolov8m"].overrides, params=26_464_446, source=SOURCE.format("26.4")),
        "yolov8l-pose": Size(**yolov8.CARD.sizes["yolov8l"].overrides, params=44_489_180, source=SOURCE.format("44.4")),
        "yolov8x-pose": Size(**yolov8.CARD.sizes["yolov8x"].overrides, params=69_491_708, source=SOURCE.format("69.4")),
        # Not published; for CPUs: half the widths of n.
        "yolov8-pose-pico": Size(**yolov8.CARD.sizes["yolov8-pico"].overrides),
        "yolov8-pose-test": Size(**yolov8.CARD.sizes["yolov8-test"].overrides, keypoints=2),
    },
    weights={"ultralytics": ULTRALYTICS},
    scale=UNIT,
    recipe=yolov8.CARD.recipe,
)

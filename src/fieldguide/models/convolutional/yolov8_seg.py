"""YOLOv8-seg: detection of objects with their masks (Ultralytics 2023; Bolya et al. 2019, arXiv:1904.02689).

New here: masks without a second network per object. The network predicts M prototype masks for the whole image, and each grid point
M coefficients for the object that it detects; the mask is the sum of the prototypes weighted by the coefficients, cut by the box
(YOLACT). So the cost hardly depends on the number of objects, and masks are sharp for large ones.

The rest is YOLOv8. Unlike YOLACT, neither prototypes nor coefficients are bounded. This file was written from public descriptions and
parameter counts. The original code is AGPL-3.0; none of it is used.

Initialization: as YOLOv8; the transposed convolution uniform by fan-in.
Shapes: B batch, C channels, H W height and width, h w those of the prototypes, D width of a map, R bins of a distance, K classes,
M prototypes, A points of all levels.
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
    prototypes: int = 32  # M
    prototype_width: int = 64  # D of the maps that prototypes are made of


class MaskHead(Head):
    """Head of one level: distances, classes and coefficients of prototypes, in three separate branches."""

    def __init__(self, dim: int, box: int, label: int, mask: int, config: Config):
        super().__init__(dim, box, label, config.bins, config.num_classes)
        self.mask = nn.Sequential(Step(dim, mask, 3), Step(mask, mask, 3), nn.Conv2d(mask, config.prototypes, 1))

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B HW 4R+K+M
        return torch.cat([super().forward(x), self.mask(x).flatten(2).mT], -1)


class Prototypes(nn.Module):
    """Prototype masks with twice the sides of the finest map."""

    def __init__(self, dim: int, width: int, count: int):
        super().__init__()
        self.conv1, self.up = Step(dim, width, 3), nn.ConvTranspose2d(width, width, 2, 2)
        self.conv2, self.conv3 = Step(width, width, 3), Step(width, count)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B M 2H 2W
        return self.conv3(self.conv2(self.up(self.conv1(x))))


class YOLOv8Seg(YOLOv8):
    """YOLOv8 with masks: images of any size -> B A*(4R+K+M)+M*h*w (see `OUTPUT_TYPES["prototypes"]`)."""

    def __init__(self, config: Config):
        super().__init__(config)
        c3 = config.widths[2]
        box, label = max(16, c3 // 4, 4 * config.bins), max(c3, min(config.num_classes, 100))
        mask = max(c3 // 4, config.prototypes)
        self.heads = nn.ModuleList(MaskHead(dim, box, label, mask, config) for dim in config.widths[2:])
        self.prototypes = Prototypes(c3, config.prototype_width, config.prototypes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d):
                module.reset_parameters()

    def predict_parts(self, x: Tensor) -> tuple[Tensor, Tensor]:  # B C H W -> B A 4R+K+M, B M h w
        """Return the outputs of all points, and the prototypes."""
        levels = self.features(x)
        return torch.cat([head(level) for head, level in zip(self.heads, levels)], 1), self.prototypes(levels[0])

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B A*(4R+K+M)+M*h*w
        return torch.cat([part.flatten(1) for part in self.predict_parts(x)], 1)


BRANCH = {"{k}.conv.weight": "{k}.conv.weight", "{k}.bn.*": "{k}.norm.*", "{k}.*": "{k}.*"}
ULTRALYTICS = {
    **{f"model.22.cv4.{{l}}.{theirs}": f"heads.{{l}}.mask.{ours}" for theirs, ours in BRANCH.items()},
    **{f"model.22.proto.cv{i}.conv.weight": f"prototypes.conv{i}.conv.weight" for i in (1, 2, 3)},
    **{f"model.22.proto.cv{i}.bn.*": f"prototypes.conv{i}.norm.*" for i in (1, 2, 3)},
    "model.22.proto.upsample.*": "prototypes.up.*",
    **yolov8.ultralytics_keys(),
}

# Published is only the number of millions, with the 16 constants of model.22.dfl.conv.
SOURCE = "docs.ultralytics.com: {}M"
SIZES = {name: size.overrides for name, size in yolov8.CARD.sizes.items()}

CARD = Card(
    name="yolov8-seg",
    model=YOLOv8Seg,
    config=Config,
    paper="https://docs.ultralytics.com/tasks/segment",
    year=2023,
    input_type="image",
    output_type="prototypes",
    sizes={
        "yolov8n-seg": Size(params=3_409_952, source=SOURCE.format("3.4")),
        "yolov8s-seg": Size(**SIZES["yolov8s"], prototype_width=128, params=11_821_040, source=SOURCE.format("11.8")),
        "yolov8m-seg": Size(**SIZES["yolov8m"], prototype_width=192, params=27_285_952, source=SOURCE.format("27.3")),
        "yolov8l-seg": Size(**SIZES["yolov8l"], prototype_width=256, params=45_997_712, source=SOURCE.format("46.0")),
        "yolov8x-seg": Size(**SIZES["yolov8x"], prototype_width=320, params=71_827_872, source=SOURCE.format("71.8")),
        # Not published; for CPUs: half the widths of n.
        "yolov8-seg-pico": Size(**SIZES["yolov8-pico"], prototypes=16, prototype_width=32),
        "yolov8-seg-test": Size(**SIZES["yolov8-test"], prototypes=3, prototype_width=5),
    },
    weights={"ultralytics": ULTRALYTICS},
    scale=UNIT,
    recipe=yolov8.CARD.recipe,
)

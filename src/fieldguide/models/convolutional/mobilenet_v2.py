"""MobileNetV2: inverted residual blocks with linear bottlenecks (Sandler et al. 2018, arXiv:1801.04381).

New here: the inverted residual. The residual connections are narrow and have no activation, which would lose information in
few channels. Each block expands them six times for a depthwise convolution, which is cheap. ReLU6 suits low precision.

Initialization: normal by fan-out, per group for grouped convolutions; the head normal with standard deviation 0.01.
Shapes: B batch, C channels, H W height and width, D width of a level; level c1 is at H/2, c5 at H/32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.conv import conv_norm
from fieldguide.models.layers.mbconv import InvertedResidual, make_divisible
from fieldguide.models.mapping.key_rules import Row

# Table 2: expansion, width, blocks and stride of each stage; stride 0: the next one of `early`.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 0), (6, 32, 3, 0), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM, TOP = 32, 1280  # widths of the layers before and after the stages
LEVELS = {"c1": 0, "c2": 1, "c3": 2, "c4": 4, "c5": 6}  # index of the last stage at each stride


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 1000
    channels: int = 3  # C
    width: float = 1.0  # multiplier of all widths; the last width is at least the published one
    depth: float = 1.0  # multiplier of the numbers of blocks
    early: tuple[int, ...] = (2, 2, 2)  # strides of the stem, the second and the third stage
    dropout: float = 0.2  # before the head


def scale_stages(config: Config) -> list[tuple[int, int, int, int]]:
    """Return `STAGES` scaled to this configuration."""
    early = iter(config.early[1:])
    return [
        (growth, make_divisible(config.width * width), math.ceil(config.depth * depth), stride or next(early))
        for growth, width, depth, stride in STAGES
    ]


class MobileNetV2(nn.Module):
    """MobileNetV2 classifier for images of any size. `features` returns the last map of each stride.

    Raises `SettingsError` if `early` does not have three strides.
    """

    def __init__(self, config: Config):
        super().__init__()
        if len(config.early) != 3:
            raise SettingsError(f"early={config.early} must have three strides")
        self.config = config
        dim, top = make_divisible(config.width * STEM), make_divisible(TOP * max(config.width, 1.0))
        self.stem = conv_norm(config.channels, dim, 3, config.early[0])
        self.stages = nn.ModuleList()
        for growth, width, depth, stride in scale_stages(config):
            stage = nn.Sequential()
            for i in range(depth):
                stage.append(InvertedResidual(dim, growth * dim, width, 3, 1 if i else stride, act=F.relu6))
                dim = width
            self.stages.append(stage)
        self.top = conv_norm(dim, top, 1)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(top, config.num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.out_channels // module.groups * module.kernel_size[0] ** 2
                nn.init.normal_(module.weight, 0, (2 / fan) ** 0.5)
        nn.init.normal_(self.head.weight, 0, 0.01)
        nn.init.zeros_(self.head.bias)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Return the width D and the stride in pixels of each map of `features`."""
        stages = scale_stages(self.config)
        return {
            name: (stages[s][1], self.config.early[0] * math.prod(stride for *_, stride in stages[: s + 1]))
            for name, s in LEVELS.items()
        }

    def features(self, x: Tensor) -> dict[str, Tensor]:  # B C H W -> {"c1": B D H/2 W/2, "c2": ...}
        x = F.relu6(self.stem(x), inplace=True)
        seen = []
        for stage in self.stages:
            seen.append(x := stage(x))
        return {name: seen[s] for name, s in LEVELS.items()}

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B classes
        x = F.relu6(self.top(self.features(x)["c5"]), inplace=True)
        return self.head(self.dropout(x.mean((2, 3))))


def torchvision(config: Config) -> dict[str, Row]:
    """Return the key table of torchvision, which numbers blocks across stages, and the layers of a block."""
    places = [(s, b) for s, (_, _, depth, _) in enumerate(scale_stages(config)) for b in range(depth)]
    last = len(places) + 1
    table: dict[str, Row] = {
        "features.0.0.weight": "stem.conv.weight",
        "features.0.1.*": "stem.norm.*",
        "classifier.1.*": "head.*",
        f"features.{last}.0.weight": "top.conv.weight",
        f"features.{last}.1.*": "top.norm.*",
    }
    for n, (s, b) in enumerate(places, 1):
        theirs, ours, wide = f"features.{n}.conv", f"stages.{s}.{b}", int(s > 0)
        for k, part in enumerate(["expand"] * wide + ["depth"]):
            table |= {f"{theirs}.{k}.0.weight": f"{ours}.{part}.conv.weight", f"{theirs}.{k}.1.*": f"{ours}.{part}.norm.*"}
        table |= {
            f"{theirs}.{wide + 1}.weight": f"{ours}.project.conv.weight",
            f"{theirs}.{wide + 2}.*": f"{ours}.project.norm.*",
        }
    return table


TIMM = {
    "conv_stem.weight": "stem.conv.weight",
    "bn1.*": "stem.norm.*",
    "blocks.0.0.conv_dw.weight": "stages.0.0.depth.conv.weight",
    "blocks.0.0.bn1.*": "stages.0.0.depth.norm.*",
    "blocks.0.0.conv_pw.weight": "stages.0.0.project.conv.weight",
    "blocks.0.0.bn2.*": "stages.0.0.project.norm.*",
    "blocks.{s}.{b}.conv_pw.weight": "stages.{s}.{b}.expand.conv.weight",
    "blocks.{s}.{b}.bn1.*": "stages.{s}.{b}.expand.norm.*",
    "blocks.{s}.{b}.conv_dw.weight": "stages.{s}.{b}.depth.conv.weight",
    "blocks.{s}.{b}.bn2.*": "stages.{s}.{b}.depth.norm.*",
    "blocks.{s}.{b}.conv_pwl.weight": "stages.{s}.{b}.project.conv.weight",
    "blocks.{s}.{b}.bn3.*": "stages.{s}.{b}.project.norm.*",
    "conv_head.weight": "top.conv.weight",
    "bn2.*": "top.norm.*",
    "classifier.*": "head.*",
}


def adapt_to_image_size(side: int) -> dict[str, tuple[int, ...]]:
    """Return strides with which small images have a last map of 2 to 4 pixels per side."""
    return {"early": (1, 1 if side <= 32 else 2, 1 if side <= 16 else 2)} if side <= 64 else {}


CARD = Card(
    name="mobilenetv2",
    model=MobileNetV2,
    config=Config,
    paper="arXiv:1801.04381",
    year=2018,
    input_type="image",
    output_type="label",
    adapt=lambda need: adapt_to_image_size(need["image"]),
    sizes={
        "mobilenetv2": Size(params=3_504_872, source="torchvision mobilenet_v2, timm mobilenetv2_100"),
        "mobilenetv2-050": Size(width=0.5, params=1_968_680, source="timm mobilenetv2_050"),
        "mobilenetv2-140": Size(width=1.4, params=6_108_776, source="timm mobilenetv2_140"),
        "mobilenetv2-test": Size(width=0.1, depth=0.3, dropout=0.0, num_classes=5),
    },
    weights={"torchvision": torchvision, "timm": TIMM},
    aliases={
        "timm": {"mobilenetv2_100": "mobilenetv2", "mobilenetv2_050": "mobilenetv2-050", "mobilenetv2_140": "mobilenetv2-140"}
    },
    # As for EfficientNet; the paper's RMSprop settings need very large batches.
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.02, "warmup": 0.1, "label_smoothing": 0.1},
)

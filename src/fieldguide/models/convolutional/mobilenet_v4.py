"""MobileNetV4: inverted bottlenecks for all kinds of phone hardware (Qin et al. 2024, arXiv:2404.10518).

New here: a block with two optional depthwise convolutions, one before the expansion and one after it. The four combinations
are the inverted bottleneck, a ConvNeXt-like block, a feed-forward block without spatial mixing, and the new ExtraDW with both.
Architecture search chooses one of them for each block. There are only ReLUs and no squeeze-and-excitation, so that the network
is fast on CPUs, GPUs and accelerators alike. The first stage is made of dense convolutions, and the widest layer follows the
pooling.

These are the convolutional sizes; the hybrid ones, which also have attention, are in `mobilenet_v4_hybrid`.
Initialization: normal by fan-out, per group for grouped convolutions; uniform in the head.
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
from fieldguide.models.layers.mbconv import make_divisible
from fieldguide.models.layers.stochastic_depth import DropPath
from fieldguide.models.mapping.key_rules import Row

# Kind ("conv", "fused" or "universal"), kernels of the first and the second convolution (0: none), expansion, width. The first
# block of each stage reduces the resolution.
BlockRow = tuple[str, int, int, float, int]
Stages = tuple[tuple[BlockRow, ...], ...]
CONV, FUSED, UNIVERSAL = KINDS = ("conv", "fused", "universal")


def blocks(*rows: tuple[int, int, float], width: int) -> tuple[BlockRow, ...]:
    """Return universal inverted bottlenecks of one width."""
    return tuple((UNIVERSAL, *row, width) for row in rows)


SMALL: Stages = (
    ((CONV, 0, 3, 1, 32), (CONV, 0, 1, 1, 32)),
    ((CONV, 0, 3, 1, 96), (CONV, 0, 1, 1, 64)),
    blocks((5, 5, 3), *[(0, 3, 2)] * 4, (3, 0, 4), width=96),
    blocks((3, 3, 6), (5, 5, 4), (0, 5, 4), (0, 5, 3), (0, 3, 4), (0, 3, 4), width=128),
)
MEDIUM: Stages = (
    ((FUSED, 0, 3, 4, 48),),
    blocks((3, 5, 4), (3, 3, 2), width=80),
    blocks((3, 5, 6), (3, 3, 4), (3, 3, 4), (3, 5, 4), (3, 3, 4), (3, 0, 4), (0, 0, 2), (3, 0, 4), width=160),
    blocks(
        *((5, 5, 6), (5, 5, 4), (3, 5, 4), (3, 5, 4), (0, 0, 4), (3, 0, 4), (3, 5, 2), (5, 5, 4), (0, 0, 4), (0, 0, 4)),
        (5, 0, 2),
        width=256,
    ),
)
LARGE: Stages = (
    ((FUSED, 0, 3, 4, 48),),
    blocks((3, 5, 4), (3, 3, 4), width=96),
    blocks((3, 5, 4), *[(3, 3, 4)] * 3, (3, 5, 4), *[(5, 3, 4)] * 5, (3, 0, 4), width=192),
    blocks(*[(5, 5, 4)] * 4, (5, 0, 4), (5, 3, 4), (5, 0, 4), (5, 0, 4), (5, 3, 4), (5, 5, 4), *[(5, 0, 4)] * 3, width=512),
)
TINY: Stages = (
    ((CONV, 0, 3, 1, 16), (CONV, 0, 1, 1, 8)),
    ((FUSED, 0, 3, 2, 16),),
    blocks((5, 3, 2), (3, 0, 2), width=24),
    blocks((3, 5, 3), (0, 3, 2), (0, 0, 2), width=32),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 1000
    channels: int = 3  # C
    width: float = 1.0  # multiplier of the widths of the stages
    stem: int = 32  # width of the stem
    stages: Stages = SMALL  # rows of blocks in four stages
    top: int = 960  # width of the last convolution
    hidden: int = 1280  # width of the layer after the pooling
    early: tuple[int, ...] = (2, 2, 2)  # strides of the stem and of the first two stages
    dropout: float = 0.2  # before the head
    drop_path: float = 0.0  # of the last block; increases linearly from 0


def get_strides(config: Config) -> list[int]:
    """Return the stride of the first block of each stage."""
    return [*config.early[1:], *[2] * (len(config.stages) - 2)]


def describe_levels(config: Config) -> dict[str, tuple[int, int]]:
    """Return the width and the stride in pixels of the stem and of each stage."""
    strides = [config.early[0], *get_strides(config)]
    widths = [config.stem, *(make_divisible(config.width * rows[-1][-1]) for rows in config.stages)]
    return {f"c{i}": (width, math.prod(strides[:i])) for i, width in enumerate(widths, 1)}


class ConvBlock(nn.Module):
    """A dense convolution with normalization and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int):
        super().__init__()
        self.layer = conv_norm(inputs, outputs, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H/stride W/stride
        return F.relu(self.layer(x), inplace=True)


class FusedInvertedBottleneck(nn.Module):
    """An inverted bottleneck whose expansion and spatial convolution are one dense convolution."""

    def __init__(self, inputs: int, hidden: int, outputs: int, kernel: int, stride: int, drop_path: float):
        super().__init__()
        self.expand = conv_norm(inputs, hidden, kernel, stride)
        self.project = conv_norm(hidden, outputs, 1)
        self.drop_path = DropPath(drop_path)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H/stride W/stride
        y = self.project(F.relu(self.expand(x), inplace=True))
        return x + self.drop_path(y) if self.residual else y


class UniversalInvertedBottleneck(nn.Module):
    """The block of section 4: depthwise convolution of size `first`, expansion, depthwise convolution of size `second`,
    projection.

    A size of 0 omits the convolution. The stride is that of the second depthwise convolution, else of the first. Only the
    expansion and the second convolution are followed by an activation.

    Raises `SettingsError` if neither convolution exists to reduce the resolution.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, first: int, second: int, stride: int, drop_path: float):
        super().__init__()
        if stride > 1 and not first and not second:
            raise SettingsError("The first block of a stage needs a depthwise convolution, because it reduces the resolution.")
        self.start = conv_norm(inputs, inputs, first, 1 if second else stride, inputs) if first else None
        self.expand = conv_norm(inputs, hidden, 1)
        self.depth = conv_norm(hidden, hidden, second, stride, hidden) if second else None
        self.project = conv_norm(hidden, outputs, 1)
        self.drop_path = DropPath(drop_path)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H/stride W/stride
        y = x if self.start is None else self.start(x)
        y = F.relu(self.expand(y), inplace=True)
        y = y if self.depth is None else F.relu(self.depth(y), inplace=True)
        y = self.project(y)
        return x + self.drop_path(y) if self.residual else y


class MobileNetV4(nn.Module):
    """MobileNetV4 classifier for images of any size. `features` returns the last map of each stride.

    Raises `SettingsError` if there are not four stages and three early strides, or for an unknown kind of block.
    """

    def __init__(self, config: Config):
        super().__init__()
        unknown = {row[0] for rows in config.stages for row in rows} - set(KINDS)
        if len(config.stages) != 4 or len(config.early) != 3 or unknown:
            raise SettingsError(
                f"MobileNetV4 needs four stages (here {len(config.stages)}), three strides (early={config.early}) and blocks of "
                f"the kinds {', '.join(KINDS)}{f', not {sorted(unknown)[0]}' if unknown else ''}."
            )
        self.config = config
        count, seen, dim = sum(map(len, config.stages)) + 1, 0, config.stem  # the last convolution counts as a block
        self.stem = conv_norm(config.channels, dim, 3, config.early[0])
        self.stages = nn.ModuleList()
        for rows, reduction in zip(config.stages, get_strides(config)):
            stage = nn.Sequential()
            for i, (kind, first, second, growth, width) in enumerate(rows):
                stride, rate = 1 if i else reduction, config.drop_path * seen / count
                outputs, hidden = make_divisible(config.width * width), make_divisible(dim * growth)
                if kind == CONV:
                    stage.append(ConvBlock(dim, outputs, second, stride))
                elif kind == FUSED:
                    stage.append(FusedInvertedBottleneck(dim, hidden, outputs, second, stride, rate))
                else:
                    stage.append(UniversalInvertedBottleneck(dim, hidden, outputs, first, second, stride, rate))
                dim, seen = outputs, seen + 1
            self.stages.append(stage)
        top = make_divisible(config.width * config.top)
        self.top = conv_norm(dim, top, 1)
        self.fc = conv_norm(top, config.hidden, 1)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden, config.num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.out_channels // module.groups * module.kernel_size[0] ** 2
                nn.init.normal_(module.weight, 0, (2 / fan) ** 0.5)
        nn.init.uniform_(self.head.weight, -(self.config.num_classes**-0.5), self.config.num_classes**-0.5)
        nn.init.zeros_(self.head.bias)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Return the width D and the stride in pixels of each map of `features`."""
        return describe_levels(self.config)

    def features(self, x: Tensor) -> dict[str, Tensor]:  # B C H W -> {"c1": B D H/2 W/2, "c2": ...}
        maps = {"c1": F.relu(self.stem(x), inplace=True)}
        for i, stage in enumerate(self.stages, 1):
            maps[f"c{i + 1}"] = stage(maps[f"c{i}"])
        return maps

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B classes
        x = F.relu(self.top(self.features(x)["c5"]), inplace=True)
        x = F.relu(self.fc(x.mean((2, 3), keepdim=True)), inplace=True)
        return self.head(self.dropout(x.flatten(1)))


PARTS = {  # names of timm, and ours
    CONV: (("conv", "bn1", "layer"),),
    FUSED: (("conv_exp", "bn1", "expand"), ("conv_pwl", "bn2", "project")),
    UNIVERSAL: tuple(
        (f"{theirs}.conv", f"{theirs}.bn", ours)
        for theirs, ours in (("dw_start", "start"), ("pw_exp", "expand"), ("dw_mid", "depth"), ("pw_proj", "project"))
    ),
}


def timm(config: Config) -> dict[str, Row]:
    """Return the key table of timm, where the last convolution is a stage."""
    table: dict[str, Row] = {
        "conv_stem.weight": "stem.conv.weight",
        "bn1.*": "stem.norm.*",
        f"blocks.{len(config.stages)}.0.conv.weight": "top.conv.weight",
        f"blocks.{len(config.stages)}.0.bn1.*": "top.norm.*",
        "conv_head.weight": "fc.conv.weight",
        "norm_head.*": "fc.norm.*",
        "classifier.*": "head.*",
    }
    for s, rows in enumerate(config.stages):
        for b, (kind, first, second, *_) in enumerate(rows):
            missing = [name for name, kernel in (("start", first), ("depth", second)) if not kernel]
            for conv, norm, ours in PARTS.get(kind, ()):
                if ours not in missing:
                    table[f"blocks.{s}.{b}.{conv}.weight"] = f"stages.{s}.{b}.{ours}.conv.weight"
                    table[f"blocks.{s}.{b}.{norm}.*"] = f"stages.{s}.{b}.{ours}.norm.*"
    return table


def adapt_to_image_size(side: int) -> dict[str, tuple[int, ...]]:
    """Return strides with which small images have a last map of 2 to 4 pixels per side."""
    return {"early": (1, 1 if side <= 32 else 2, 1 if side <= 16 else 2)} if side <= 64 else {}


CARD = Card(
    name="mobilenetv4",
    model=MobileNetV4,
    config=Config,
    paper="arXiv:2404.10518",
    year=2024,
    input_type="image",
    output_type="label",
    adapt=lambda need: adapt_to_image_size(need["image"]),
    sizes={
        "mobilenetv4-conv-small": Size(params=3_774_024, source="timm mobilenetv4_conv_small"),
        "mobilenetv4-conv-small-050": Size(width=0.5, params=2_238_952, source="timm mobilenetv4_conv_small_050"),
        "mobilenetv4-conv-medium": Size(stages=MEDIUM, params=9_715_512, source="timm mobilenetv4_conv_medium"),
        "mobilenetv4-conv-large": Size(stem=24, stages=LARGE, params=32_590_864, source="timm mobilenetv4_conv_large"),
        "mobilenetv4-test": Size(stem=8, stages=TINY, top=40, hidden=24, dropout=0.0, num_classes=5),
    },
    weights={"timm": timm},
    aliases={
        "timm": {
            f"mobilenetv4_conv_{name.replace('-', '_')}": f"mobilenetv4-conv-{name}"
            for name in ("small", "small-050", "medium", "large")
        }
    },
    # As for MobileNetV3; the paper trains for thousands of epochs with batches of 4,096 and more.
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.02, "warmup": 0.1, "label_smoothing": 0.1},
)

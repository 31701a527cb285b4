"""MobileNetV4 hybrid: inverted bottlenecks, and attention in two stages (Qin et al. 2024, arXiv:2404.10518).

New here: Mobile MQA, attention at all places of a map with many heads of queries, and one of keys and values that all of them share.
In the first of the two stages, keys and values are read from a map of half the resolution. All residual branches are scaled by a
learned factor for each channel, small at first. The large size uses GELU in place of ReLU.

Initialization: as MobileNetV4; Glorot uniform in the attention, 1e-5 for the factors of the branches.
Shapes: B batch, C channels, H W height and width, D width of a level, Q heads, d width of a head; level c1 is at H/2, c5 at H/32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.convolutional import mobilenet_v4
from fieldguide.models.convolutional.mobilenet_v4 import CONV, FUSED, UNIVERSAL, BlockRow, Stages, blocks, get_strides
from fieldguide.models.layers.conv import conv_norm
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.mbconv import make_divisible
from fieldguide.models.layers.stochastic_depth import DropPath
from fieldguide.models.mapping.key_rules import Row

ATTENTION = "attention"  # kind of a block: heads, stride of keys and values, width of a head, width
KINDS = (*mobilenet_v4.KINDS, ATTENTION)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
SCALE = 1e-5  # of the branches at first


def attend(heads: int, stride: int, head_width: int, *row: tuple[int, int, float], width: int) -> tuple[BlockRow, ...]:
    """Return a block of attention, and universal inverted bottlenecks after it."""
    return ((ATTENTION, heads, stride, head_width, width), *blocks(*row, width=width))


MEDIUM: Stages = (
    ((FUSED, 0, 3, 4, 48),),
    blocks((3, 5, 4), (3, 3, 2), width=80),
    (
        *blocks((3, 5, 6), (0, 0, 2), (3, 3, 4), (3, 5, 4), width=160),
        *attend(4, 2, 64, (3, 3, 4), width=160),
        *attend(4, 2, 64, (3, 0, 4), width=160),
        *attend(4, 2, 64, (3, 3, 4), width=160),
        *attend(4, 2, 64, (3, 0, 4), width=160),
    ),
    (
        *blocks(
            *((5, 5, 6), (5, 5, 4), (3, 5, 4), (3, 5, 4), (0, 0, 2), (3, 5, 2), (0, 0, 2), (0, 0, 4)),
            width=256,
        ),
        *attend(4, 1, 64, (3, 0, 4), width=256),
        *attend(4, 1, 64, (5, 5, 4), width=256),
        *attend(4, 1, 64, (5, 0, 4), width=256),
        *attend(4, 1, 64, (5, 0, 4), width=256),
    ),
)
LARGE: Stages = (
    ((FUSED, 0, 3, 4, 48),),
    blocks((3, 5, 4), (3, 3, 4), width=96),
    (
        *blocks((3, 5, 4), *[(3, 3, 4)] * 3, (3, 5, 4), *[(5, 3, 4)] * 2, width=192),
        *attend(8, 2, 48, (5, 3, 4), width=192),
        *attend(8, 2, 48, (5, 3, 4), width=192),
        *attend(8, 2, 48, (5, 3, 4), width=192),
        *attend(8, 2, 48, (3, 0, 4), width=192),
    ),
    (
        *blocks(*[(5, 5, 4)] * 4, (5, 0, 4), (5, 3, 4), (5, 0, 4), (5, 0, 4), (5, 3, 4), (5, 5, 4), width=512),
        *[block for _ in range(4) for block in attend(8, 1, 64, (5, 0, 4), width=512)],
    ),
)
TINY: Stages = (
    ((CONV, 0, 3, 1, 16), (CONV, 0, 1, 1, 8)),
    ((FUSED, 0, 3, 2, 16),),
    (*blocks((5, 3, 2), width=24), *attend(2, 2, 6, (3, 0, 2), width=24)),
    (*blocks((3, 5, 3), width=32), *attend(3, 1, 4, (0, 0, 2), width=32)),
)


@dataclass(frozen=True, kw_only=True)
class Config(mobilenet_v4.Config):
    stages: Stages = MEDIUM  # rows of blocks in four stages
    activation: str = "relu"  # or "gelu"


class ConvBlock(nn.Module):
    """A dense convolution with normalization and activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, activation: str):
        super().__init__()
        self.layer, self.act = conv_norm(inputs, outputs, kernel, stride), ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H/stride W/stride
        return self.act(self.layer(x))


class FusedInvertedBottleneck(mobilenet_v4.FusedInvertedBottleneck):
    """An inverted bottleneck whose expansion and spatial convolution are one dense convolution."""

    def __init__(self, inputs: int, hidden: int, outputs: int, kernel: int, stride: int, drop_path: float, activation: str):
        super().__init__(inputs, hidden, outputs, kernel, stride, drop_path)
        self.act = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H/stride W/stride
        y = self.project(self.act(self.expand(x)))
        return x + self.drop_path(y) if self.residual else y


class UniversalInvertedBottleneck(mobilenet_v4.UniversalInvertedBottleneck):
    """The block of MobileNetV4 with a factor for each channel of its output."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, first: int, second: int, stride: int, drop_path: float, activation: str
    ):
        super().__init__(inputs, hidden, outputs, first, second, stride, drop_path)
        self.act, self.scale = ACTIVATIONS[activation], nn.Parameter(torch.full((outputs,), SCALE))

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H/stride W/stride
        y = x if self.start is None else self.start(x)
        y = self.act(self.expand(y))
        y = y if self.depth is None else self.act(self.depth(y))
        y = self.project(y) * self.scale[:, None, None]
        return x + self.drop_path(y) if self.residual else y


class MobileAttention(nn.Module):
    """Mobile MQA (section 5): every place attends to all places of a map, which is reduced by `stride`."""

    def __init__(self, dim: int, heads: int, width: int, stride: int, drop_path: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.BatchNorm2d(dim)
        self.query = nn.Conv2d(dim, heads * width, 1, bias=False)
        self.near_key = conv_norm(dim, dim, 3, stride, dim) if stride > 1 else nn.Identity()
        self.near_value = conv_norm(dim, dim, 3, stride, dim) if stride > 1 else nn.Identity()
        self.key, self.value = nn.Conv2d(dim, width, 1, bias=False), nn.Conv2d(dim, width, 1, bias=False)
        self.proj = nn.Conv2d(heads * width, dim, 1, bias=False)
        self.scale, self.drop_path = nn.Parameter(torch.full((dim,), SCALE)), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        y = self.norm(x)
        q = self.query(y).unflatten(1, (self.heads, -1)).flatten(3).mT  # B Q HW d
        k, v = (
            conv(near(y)).flatten(2).mT[:, None] for conv, near in ((self.key, self.near_key), (self.value, self.near_value))
        )
        k, v = (part.expand(-1, self.heads, -1, -1) for part in (k, v))  # B Q hw d
        y = dot_product_attention(q, k, v, None, 0.0).mT.flatten(1, 2).unflatten(2, tuple(x.shape[2:]))  # B Qd H W
        return x + self.drop_path(self.proj(y) * self.scale[:, None, None])


class MobileNetV4Hybrid(nn.Module):
    """MobileNetV4 hybrid classifier for images of any size. `features` returns the last map of each stride.

    Raises `SettingsError` if there are not four stages and three early strides, for an unknown kind of block or activation, and for
    attention in the first block of a stage, which reduces the resolution.
    """

    def __init__(self, config: Config):
        super().__init__()
        unknown = {row[0] for rows in config.stages for row in rows} - set(KINDS)
        if len(config.stages) != 4 or len(config.early) != 3 or unknown:
            raise SettingsError(
                f"MobileNetV4 needs four stages (here {len(config.stages)}), three strides (early={config.early}) and blocks of "
                f"the kinds {', '.join(KINDS)}{f', not {sorted(unknown)[0]}' if unknown else ''}."
            )
        if config.activation not in ACTIVATIONS:
            raise SettingsError(f"activation={config.activation!r} must be one of {', '.join(ACTIVATIONS)}.")
        if any(rows[0][0] == ATTENTION for rows in config.stages):
            raise SettingsError("The first block of a stage must not be attention, because it reduces the resolution.")
        self.config, self.act = config, ACTIVATIONS[config.activation]
        count, seen, dim = sum(map(len, config.stages)) + 1, 0, config.stem  # the last convolution counts as a block
        self.stem = conv_norm(config.channels, dim, 3, config.early[0])
        self.stages = nn.ModuleList()
        for rows, reduction in zip(config.stages, get_strides(config)):
            stage = nn.Sequential()
            for i, row in enumerate(rows):
                stage.append(make_block(row, config, dim, 1 if i else reduction, config.drop_path * seen / count))
                dim, seen = make_divisible(config.width * row[-1]), seen + 1
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
        for module in self.modules():
            if isinstance(module, MobileAttention):
                for part in module.modules():
                    if isinstance(part, nn.Conv2d):
                        nn.init.xavier_uniform_(part.weight)
            if isinstance(module, MobileAttention | UniversalInvertedBottleneck):
                nn.init.constant_(module.scale, SCALE)
        nn.init.uniform_(self.head.weight, -(self.config.num_classes**-0.5), self.config.num_classes**-0.5)
        nn.init.zeros_(self.head.bias)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Return the width D and the stride in pixels of each map of `features`."""
        return mobilenet_v4.describe_levels(self.config)

    def features(self, x: Tensor) -> dict[str, Tensor]:  # B C H W -> {"c1": B D H/2 W/2, "c2": ...}
        maps = {"c1": self.act(self.stem(x))}
        for i, stage in enumerate(self.stages, 1):
            maps[f"c{i + 1}"] = stage(maps[f"c{i}"])
        return maps

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B classes
        x = self.act(self.top(self.features(x)["c5"]))
        x = self.act(self.fc(x.mean((2, 3), keepdim=True)))
        return self.head(self.dropout(x.flatten(1)))


def make_block(row: BlockRow, config: Config, dim: int, stride: int, drop_path: float) -> nn.Module:
    """Return the block of a row, for a map of width `dim`."""
    kind, first, second, growth, width = row
    outputs, hidden, act = make_divisible(config.width * width), make_divisible(dim * growth), config.activation
    if kind == ATTENTION:
        return MobileAttention(dim, first, int(growth), second, drop_path)
    if kind == CONV:
        return ConvBlock(dim, outputs, second, stride, act)
    if kind == FUSED:
        return FusedInvertedBottleneck(dim, hidden, outputs, second, stride, drop_path, act)
    return UniversalInvertedBottleneck(dim, hidden, outputs, first, second, stride, drop_path, act)


def timm(config: Config) -> dict[str, Row]:
    """Return the key table of timm."""
    table = mobilenet_v4.timm(config)
    for s, rows in enumerate(config.stages):
        for b, (kind, _, stride, *_) in enumerate(rows):
            theirs, ours = f"blocks.{s}.{b}.", f"stages.{s}.{b}."
            if kind in (ATTENTION, UNIVERSAL):
                table[f"{theirs}layer_scale.gamma"] = f"{ours}scale"
            if kind == ATTENTION:
                table[f"{theirs}norm.*"] = f"{ours}norm.*"
                for part in ("query", "key", "value"):
                    table[f"{theirs}attn.{part}.proj.weight"] = f"{ours}{part}.weight"
                table[f"{theirs}attn.output.proj.weight"] = f"{ours}proj.weight"
                for part in ("key", "value") if stride > 1 else ():
                    table[f"{theirs}attn.{part}.down_conv.weight"] = f"{ours}near_{part}.conv.weight"
                    table[f"{theirs}attn.{part}.norm.*"] = f"{ours}near_{part}.norm.*"
    return table


CARD = Card(
    name="mobilenetv4-hybrid",
    model=MobileNetV4Hybrid,
    config=Config,
    paper="arXiv:2404.10518",
    year=2024,
    input_type="image",
    output_type="label",
    adapt=lambda need: mobilenet_v4.adapt_to_image_size(need["image"]),
    sizes={
        "mobilenetv4-hybrid-medium": Size(params=11_074_648, source="timm mobilenetv4_hybrid_medium"),
        "mobilenetv4-hybrid-medium-075": Size(width=0.75, params=7_313_528, source="timm mobilenetv4_hybrid_medium_075"),
        "mobilenetv4-hybrid-large": Size(
            stem=24, stages=LARGE, activation="gelu", params=37_764_624, source="timm mobilenetv4_hybrid_large"
        ),
        "mobilenetv4-hybrid-large-075": Size(
            stem=24, stages=LARGE, activation="gelu", width=0.75, params=22_754_984, source="timm mobilenetv4_hybrid_large_075"
        ),
        "mobilenetv4-hybrid-test": Size(stem=8, stages=TINY, top=40, hidden=24, dropout=0.0, num_classes=5),
    },
    weights={"timm": timm},
    aliases={
        "timm": {
            f"mobilenetv4_hybrid_{name.replace('-', '_')}": f"mobilenetv4-hybrid-{name}"
            for name in ("medium", "medium-075", "large", "large-075")
        }
    },
    recipe=mobilenet_v4.CARD.recipe,
)

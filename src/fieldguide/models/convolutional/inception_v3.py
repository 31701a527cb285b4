"""Inception v3: parallel branches of factorized convolutions (Szegedy et al. 2015, arXiv:1512.00567).

New here: large filters are factorized, 7 x 7 into 1 x 7 and 7 x 1, and the branches of a block see neighborhoods of several sizes at
the same cost as one convolution. Its features are those that the Fréchet inception distance (FID) compares images by.

Initialization: normal by fan-out; the head normal with standard deviation 0.01.
Shapes: B batch, C channels, H W height and width, D width of a level; level c1 is at H/2, c5 at H/32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import HALF, Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.conv import check_min_side
from fieldguide.models.mapping.key_rules import Dropped, Row

STEM = ((32, 3, False), (32, 3, False), (64, 3, True), (80, 1, False), (192, 3, False))  # widths, kernels, whether padded
POOLED = (2, 4)  # layers of the stem that pooling follows
LAST_BLOCKS = (2, 7, 10)  # of each stride
Spec = tuple[int, tuple[int, int], int]  # width, kernel, stride; kernels of stride 2 are not padded


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 1000
    channels: int = 3  # C
    image: int = 299  # pixels per side of the published network; other sides are accepted, from 75 on with `early` as published
    early: tuple[int, ...] = (2, 2, 2)  # strides of the first layer and of the two poolings of the stem
    shrink: int = 1  # divisor of all widths
    dropout: float = 0.5  # before the head
    tensorflow: bool = False  # pooling as in the network of 2015 that FID is defined with


def spec(width: int, height: int = 1, breadth: int | None = None, stride: int = 1) -> Spec:
    return width, (height, breadth or height), stride


@dataclass(frozen=True)
class BranchPlan:
    """A branch: first pooling, if any, then convolutions, the last of which may be split into 1 x 3 and 3 x 1 side by side."""

    names: tuple[str, ...]  # of the convolutions in torchvision
    convs: tuple[Spec, ...]
    pool: str = ""  # "" | average | maximum | stride: maximum with stride 2
    split: int = 0  # width of each of the two convolutions at the end

    def width(self, dim: int) -> int:
        return 2 * self.split or (self.convs[-1][0] if self.convs else dim)


def branch(name: str, *convs: Spec, pool: str = "", split: int = 0) -> BranchPlan:
    names = tuple(f"{name}_{k}" for k in range(1, len(convs) + 1)) if len(convs) > 1 or split else (name,) * len(convs)
    if split:
        names += tuple(f"{name}_{len(convs) + 1}{letter}" for letter in "ab")
    return BranchPlan(names, convs, pool, split)


def plan_35(pool: int) -> list[BranchPlan]:
    """Return the branches of a block at 35 x 35 (figure 5)."""
    return [
        branch("branch1x1", spec(64)),
        branch("branch5x5", spec(48), spec(64, 5)),
        branch("branch3x3dbl", spec(64), spec(96, 3), spec(96, 3)),
        branch("branch_pool", spec(pool), pool="average"),
    ]


def plan_17(width: int) -> list[BranchPlan]:
    """Return the branches of a block at 17 x 17 (figure 6, n = 7)."""
    return [
        branch("branch1x1", spec(192)),
        branch("branch7x7", spec(width), spec(width, 1, 7), spec(192, 7, 1)),
        branch("branch7x7dbl", spec(width), spec(width, 7, 1), spec(width, 1, 7), spec(width, 7, 1), spec(192, 1, 7)),
        branch("branch_pool", spec(192), pool="average"),
    ]


def plan_8(pool: str) -> list[BranchPlan]:
    """Return the branches of a block at 8 x 8 (figure 7)."""
    return [
        branch("branch1x1", spec(320)),
        branch("branch3x3", spec(384), split=384),
        branch("branch3x3dbl", spec(448), spec(384, 3), split=384),
        branch("branch_pool", spec(192), pool=pool),
    ]


REDUCE_35 = [  # section 5: grids shrink by convolutions and pooling side by side
    branch("branch3x3", spec(384, 3, stride=2)),
    branch("branch3x3dbl", spec(64), spec(96, 3), spec(96, 3, stride=2)),
    branch("", pool="stride"),
]
REDUCE_17 = [
    branch("branch3x3", spec(192), spec(320, 3, stride=2)),
    branch("branch7x7x3", spec(192), spec(192, 1, 7), spec(192, 7, 1), spec(192, 3, stride=2)),
    branch("", pool="stride"),
]


def plan_blocks(config: Config) -> dict[str, list[BranchPlan]]:
    """Return the branches of each block by its name in torchvision."""
    return {
        "Mixed_5b": plan_35(32),
        "Mixed_5c": plan_35(64),
        "Mixed_5d": plan_35(64),
        "Mixed_6a": REDUCE_35,
        "Mixed_6b": plan_17(128),
        "Mixed_6c": plan_17(160),
        "Mixed_6d": plan_17(160),
        "Mixed_6e": plan_17(192),
        "Mixed_7a": REDUCE_17,
        "Mixed_7b": plan_8("average"),
        "Mixed_7c": plan_8("maximum" if config.tensorflow else "average"),
    }


def compute_min_side(config: Config) -> int:
    """Return the least pixels per side for which the last map has one position."""
    stem, first, second = config.early
    side = 7  # at the first block: 7 -> 3 -> 1
    for stride in (second, first):  # each pooling follows a convolution without padding
        side = (side - 1) * stride + 5
    return (side - 1) * stem + 3


class Conv(nn.Module):
    """A convolution without bias, batch normalization and ReLU. Kernels of stride 1 keep the sides unless `padded` is False."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1, padded: bool = True):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(outputs, 1e-3)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B D H' W'
        return F.relu(self.norm(self.conv(x)), inplace=True)


class Branch(nn.Module):
    """A branch of a block."""

    def __init__(self, dim: int, plan: BranchPlan, config: Config):
        super().__init__()
        self.pool, self.counts_padding = plan.pool, not config.tensorflow
        self.convs = nn.ModuleList()
        for width, kernel, stride in plan.convs:
            self.convs.append(Conv(dim, width // config.shrink, kernel, stride))
            dim = width // config.shrink
        kernels = ((1, 3), (3, 1)) if plan.split else ()
        self.split = nn.ModuleList(Conv(dim, plan.split // config.shrink, kernel) for kernel in kernels)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H' W'
        if self.pool == "average":
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=self.counts_padding)
        elif self.pool == "maximum":
            x = F.max_pool2d(x, 3, 1, 1)
        elif self.pool == "stride":
            x = F.max_pool2d(x, 3, 2)
        for conv in self.convs:
            x = conv(x)
        return torch.cat([conv(x) for conv in self.split], 1) if len(self.split) else x


class Block(nn.Module):
    """Branches side by side, whose outputs are concatenated."""

    def __init__(self, dim: int, plans: Sequence[BranchPlan], config: Config):
        super().__init__()
        self.branches = nn.ModuleList(Branch(dim, plan, config) for plan in plans)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H' W'
        return torch.cat([branch(x) for branch in self.branches], 1)


class InceptionV3(nn.Module):
    """Inception v3 classifier without the auxiliary head. `features` returns the last map of each stride.

    Raises `SettingsError` if `early` does not have three strides, and `DataError` for images that are too small for it.
    """

    def __init__(self, config: Config):
        super().__init__()
        if len(config.early) != 3:
            raise SettingsError(f"early={config.early} must have three strides")
        self.config, self.min_side = config, compute_min_side(config)
        scale = config.shrink
        dim, self.stem = config.channels, nn.ModuleList()
        for k, (width, kernel, padded) in enumerate(STEM):
            self.stem.append(Conv(dim, width // scale, (kernel, kernel), 1 if k else config.early[0], padded))
            dim = width // scale
        widths, self.blocks = [STEM[k][0] // scale for k in POOLED], nn.ModuleList()
        for b, plans in enumerate(plan_blocks(config).values()):
            self.blocks.append(Block(dim, plans, config))
            dim = sum(plan.width(dim * scale) for plan in plans) // scale
            widths += [dim] * (b in LAST_BLOCKS)
        stem, first, second = config.early
        strides = [stem, stem * first] + [stem * first * second * 2**k for k in range(3)]
        self.levels = {
            f"c{k}": pair for k, pair in enumerate(zip(widths, strides), 1)
        }  # width D and stride in pixels of each map
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(dim, config.num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.head.weight, 0, 0.01)
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> dict[str, Tensor]:  # B C H W -> {"c1": B D H/2 W/2, "c2": ...}
        check_min_side(x, self.min_side, "Inception v3")
        seen, pools = [], iter(self.config.early[1:])
        for k, conv in enumerate(self.stem):
            x = conv(x)
            if k in POOLED:
                seen.append(x)
                x = F.max_pool2d(x, 3, next(pools))
        for b, block in enumerate(self.blocks):
            x = block(x)
            if b in LAST_BLOCKS:
                seen.append(x)
        return dict(zip(self.levels, seen))

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B classes
        return self.head(self.dropout(self.features(x)["c5"].mean((2, 3))))


STEM_NAMES = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")


def torchvision(config: Config) -> dict[str, Row]:
    """Return the key table of torchvision, of timm, and of the file that FID is computed with."""
    places = {name: f"stem.{k}" for k, name in enumerate(STEM_NAMES)}
    for b, (block, plans) in enumerate(plan_blocks(config).items()):
        for k, plan in enumerate(plans):
            ours = [f"convs.{n}" for n in range(len(plan.convs))] + [f"split.{n}" for n in range(2 * bool(plan.split))]
            places |= {f"{block}.{name}": f"blocks.{b}.branches.{k}.{own}" for name, own in zip(plan.names, ours)}
    auxiliary = Dropped("the auxiliary head is for training only", means={"tensorflow": False})
    table: dict[str, Row] = {"fc.*": "head.*"}
    for theirs, own in places.items():
        table |= {f"{theirs}.conv.weight": f"{own}.conv.weight", f"{theirs}.bn.*": f"{own}.norm.*"}
    for name in ("conv0", "conv1"):
        table |= {f"AuxLogits.{name}.conv.weight": auxiliary, f"AuxLogits.{name}.bn.*": auxiliary}
    return table | {"AuxLogits.fc.*": auxiliary}


def adapt_to_image_size(side: int) -> dict[str, tuple[int, ...]]:
    """Return strides with which the last map of small images has several positions."""
    return {"early": (1, 1 if side < 48 else 2, 1 if side < 32 else 2)} if side < 96 else {}


CARD = Card(
    name="inception-v3",
    model=InceptionV3,
    config=Config,
    paper="arXiv:1512.00567",
    year=2015,
    input_type="image",
    output_type="label",
    adapt=lambda need: adapt_to_image_size(need["image"]),
    sizes={
        "inception-v3": Size(
            params=23_834_568, source="torchvision inception_v3 without the auxiliary head, timm inception_v3"
        ),
        "inception-v3-fid": Size(
            tensorflow=True, num_classes=1008, params=23_850_960, source="the network of Heusel et al. 2017, pytorch-fid"
        ),
        "inception-v3-test": Size(shrink=16, image=33, early=(1, 1, 2), dropout=0.0, num_classes=5),
    },
    weights={"torchvision": torchvision, "timm": torchvision},
    aliases={"timm": {"inception_v3": "inception-v3"}},
    # As for EfficientNet; the paper's RMSprop settings need large batches.
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.02, "warmup": 0.1, "label_smoothing": 0.1},
    scale=HALF,  # torchvision's own network scales ImageNet's normalization back to this
)

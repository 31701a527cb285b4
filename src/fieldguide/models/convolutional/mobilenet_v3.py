"""MobileNetV3: inverted residuals found by architecture search for phones (Howard et al. 2019, arXiv:1905.02244).

New here: piecewise linear approximations of the sigmoid, cheap on phones, in squeeze-and-excitation and in the activation
(hard-swish, only in the second half of the network), and a last stage whose widest layer follows the global average
pooling.

Epsilon and padding are torchvision's; timm's own weights have `eps=1e-5`, its `tf` weights 1e-3 and `padding="same"`.
Initialization: normal by fan-out, per group for grouped convolutions; dense layers normal with standard deviation 0.01.
Shapes: B batch, C channels, H W height and width, D width of a level; level c1 is at H/2, c5 at H/32.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.conv import PADDINGS, ConvNormOptions, conv_norm
from fieldguide.models.layers.mbconv import InvertedResidual, make_divisible
from fieldguide.models.mapping.key_rules import Reshaped, Row

# Tables 1 and 2: kernel, hidden width, width, squeeze-and-excitation, hard-swish, stride; 0: the next one of `early`.
BlockRow = tuple[int, int, int, bool, bool, int]
LARGE = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 0),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 0),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)
SMALL = (
    (3, 16, 16, True, False, 0),
    (3, 72, 24, False, False, 0),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)
TINY = (
    (3, 8, 8, True, False, 0),
    (3, 24, 16, False, False, 0),
    (5, 40, 16, True, True, 1),
    (5, 48, 24, True, True, 2),
    (5, 72, 32, True, True, 2),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 1000
    channels: int = 3  # C
    stem: int = 16  # width of the stem
    blocks: tuple[BlockRow, ...] = LARGE  # one row per block
    hidden: int = 1280  # width of the dense layer after the pooling
    early: tuple[int, ...] = (2, 2, 2)  # strides of the stem and of the two blocks with stride 0
    dropout: float = 0.2  # before the head
    eps: float = 1e-3  # of normalization
    padding: str = "symmetric"  # or "same", the padding of TensorFlow


def group_stages(config: Config) -> list[list[BlockRow]]:
    """Group the rows of equal width into stages and fill in the early strides."""
    early = iter(config.early[1:])
    rows = [(*row[:-1], row[-1] or next(early)) for row in config.blocks]
    return [list(group) for _, group in groupby(rows, key=lambda row: row[2])]


def get_last_stages(config: Config) -> dict[str, int]:
    """Return the last stage of each level in the published network, counted from 1; 0 is the stem."""
    level, found = 1, {"c1": 0}
    for s, (_, group) in enumerate(groupby(config.blocks, key=lambda row: row[2]), 1):
        level += next(group)[-1] != 1
        found[f"c{level}"] = s
    return found


class MobileNetV3(nn.Module):
    """MobileNetV3 classifier for images of any size. `features` returns the last map of each stride.

    Raises `SettingsError` for an unknown padding, or if `early` does not have three strides.
    """

    def __init__(self, config: Config):
        super().__init__()
        if config.padding not in PADDINGS or len(config.early) != 3 or sum(not row[-1] for row in config.blocks) != 2:
            raise SettingsError(
                f"padding={config.padding!r} must be one of {', '.join(PADDINGS)}, and early="
                f"{config.early} must have three strides, two of them for the blocks with stride 0"
            )
        self.config = config
        same: ConvNormOptions = {"eps": config.eps, "padding": config.padding}
        dim = config.stem
        self.stem = conv_norm(config.channels, dim, 3, config.early[0], **same)
        self.stages = nn.ModuleList()
        for rows in group_stages(config):
            stage = nn.Sequential()
            for kernel, hidden, width, gate, swish, stride in rows:
                stage.append(
                    InvertedResidual(
                        dim,
                        hidden,
                        width,
                        kernel,
                        stride,
                        squeeze=make_divisible(hidden // 4) if gate else 0,
                        act=F.hardswish if swish else F.relu,
                        gate=F.hardsigmoid,
                        **same,
                    )
                )
                dim = width
            self.stages.append(stage)
        self.top = conv_norm(dim, 6 * dim, 1, eps=config.eps)
        self.fc = nn.Linear(6 * dim, config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden, config.num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.out_channels // module.groups * module.kernel_size[0] ** 2
                nn.init.normal_(module.weight, 0, (2 / fan) ** 0.5)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Return the width D and the stride in pixels of each map of `features`."""
        config, stride = self.config, self.config.early[0]
        widths, reached = [config.stem], [stride]
        for rows in group_stages(config):
            widths.append(rows[-1][2])
            reached.append(stride := stride * rows[0][-1])
        return {name: (widths[i], reached[i]) for name, i in get_last_stages(config).items()}

    def features(self, x: Tensor) -> dict[str, Tensor]:  # B C H W -> {"c1": B D H/2 W/2, "c2": ...}
        seen = [F.hardswish(self.stem(x), inplace=True)]
        for stage in self.stages:
            seen.append(stage(seen[-1]))
        return {name: seen[i] for name, i in get_last_stages(self.config).items()}

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B classes
        x = F.hardswish(self.top(self.features(x)["c5"]), inplace=True)
        x = F.hardswish(self.fc(x.mean((2, 3))), inplace=True)
        return self.head(self.dropout(x))


def get_block_parts(config: Config) -> list[tuple[int, int, list[str]]]:
    """Return the stage, the index and the names of the parts of each block."""
    found, dim = [], config.stem
    for s, rows in enumerate(group_stages(config)):
        for b, (_, hidden, width, gate, *_) in enumerate(rows):
            found.append((s, b, [*["expand"] * (hidden != dim), "depth", *["squeeze"] * gate, "project"]))
            dim = width
    return found


def torchvision(config: Config) -> dict[str, Row]:
    """Return the key table of torchvision, which numbers blocks across stages, and the parts of a block."""
    blocks = get_block_parts(config)
    table: dict[str, Row] = {
        "features.0.0.weight": "stem.conv.weight",
        "features.0.1.*": "stem.norm.*",
        "classifier.0.*": "fc.*",
        "classifier.3.*": "head.*",
        f"features.{len(blocks) + 1}.0.weight": "top.conv.weight",
        f"features.{len(blocks) + 1}.1.*": "top.norm.*",
    }
    for n, (s, b, has) in enumerate(blocks, 1):
        for k, part in enumerate(has):
            theirs, ours = f"features.{n}.block.{k}", f"stages.{s}.{b}.{part}"
            table |= (
                {f"{theirs}.fc1.*": f"{ours}.down.*", f"{theirs}.fc2.*": f"{ours}.up.*"}
                if part == "squeeze"
                else {f"{theirs}.0.weight": f"{ours}.conv.weight", f"{theirs}.1.*": f"{ours}.norm.*"}
            )
    return table


def timm(config: Config) -> dict[str, Row]:
    """Return the key table of timm: blocks without expansion have other names; the last convolution is a stage."""
    last = len(group_stages(config))
    table: dict[str, Row] = {
        "conv_stem.weight": "stem.conv.weight",
        "bn1.*": "stem.norm.*",
        f"blocks.{last}.0.conv.weight": "top.conv.weight",
        f"blocks.{last}.0.bn1.*": "top.norm.*",
        "conv_head.weight": Reshaped("fc.weight", (config.hidden, -1), (config.hidden, -1, 1, 1)),
        "conv_head.bias": "fc.bias",
        "classifier.*": "head.*",
    }
    for s, b, has in get_block_parts(config):
        theirs, ours = f"blocks.{s}.{b}", f"stages.{s}.{b}"
        names = ["conv_pw", "conv_dw", "conv_pwl"] if "expand" in has else ["conv_dw", "conv_pw"]
        for k, (name, part) in enumerate(zip(names, (part for part in has if part != "squeeze")), 1):
            table |= {f"{theirs}.{name}.weight": f"{ours}.{part}.conv.weight", f"{theirs}.bn{k}.*": f"{ours}.{part}.norm.*"}
        table |= (
            {f"{theirs}.se.conv_reduce.*": f"{ours}.squeeze.down.*", f"{theirs}.se.conv_expand.*": f"{ours}.squeeze.up.*"}
            if "squeeze" in has
            else {}
        )
    return table


def adapt_to_image_size(side: int) -> dict[str, tuple[int, ...]]:
    """Return strides with which small images have a last map of 2 to 4 pixels per side."""
    return {"early": (1, 1 if side <= 32 else 2, 1 if side <= 16 else 2)} if side <= 64 else {}


CARD = Card(
    name="mobilenetv3",
    model=MobileNetV3,
    config=Config,
    paper="arXiv:1905.02244",
    year=2019,
    input_type="image",
    output_type="label",
    adapt=lambda need: adapt_to_image_size(need["image"]),
    sizes={
        "mobilenetv3-large": Size(params=5_483_032, source="torchvision"),
        "mobilenetv3-small": Size(blocks=SMALL, hidden=1024, params=2_542_856, source="torchvision"),
        "mobilenetv3-test": Size(stem=8, blocks=TINY, hidden=24, dropout=0.0, num_classes=5),
    },
    weights={"torchvision": torchvision, "timm": timm},
    aliases={
        "timm": {
            f"{tf}mobilenetv3_{size}_100": (f"mobilenetv3-{size}", changes)
            for size in ("large", "small")
            for tf, changes in (("", {"eps": 1e-5}), ("tf_", {"padding": "same"}))
        }
    },
    # As for EfficientNet; the paper's RMSprop settings need a batch of 4,096.
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.02, "warmup": 0.1, "label_smoothing": 0.1},
)

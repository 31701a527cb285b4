"""EfficientNetV2: faster training at the same accuracy (Tan and Le 2021, arXiv:2104.00298).

New here: in the first three stages one full 3x3 convolution replaces the expansion and the depthwise convolution
(Fused-MBConv), which is faster on accelerators; kernels are small and early stages shallow. The paper's progressive
increase of image size and regularization during training is not implemented.

Names that begin with `tf` have TensorFlow's padding, for weights trained there; the others follow torchvision.
Initialization: normal by fan-out, per group for grouped convolutions; the head uniform in +-1 / sqrt(classes).
Shapes: B batch, C channels, H W height and width, D width of a level; level c1 is at H/2, c5 at H/32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.conv import PADDINGS, ConvNormOptions, conv_norm
from fieldguide.models.layers.mbconv import InvertedResidual
from fieldguide.models.layers.stochastic_depth import DropPath
from fieldguide.models.mapping.key_rules import Row

NUM_FUSED_STAGES = 3  # stages with Fused-MBConv, from the first


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 1000
    channels: int = 3  # C
    widths: tuple[int, ...] = (24, 48, 64, 128, 160, 256)  # per stage
    depths: tuple[int, ...] = (2, 4, 4, 6, 9, 15)  # blocks per stage
    growths: tuple[int, ...] = (1, 4, 4, 4, 6, 6)  # expansion ratio per stage
    early: tuple[int, ...] = (2, 2, 2)  # strides of the stem, the second and the third stage
    top: int = 1280  # width before the head
    dropout: float = 0.2  # before the head
    drop_path: float = 0.2  # of the last block; increases linearly from 0
    eps: float = 1e-3  # of normalization
    padding: str = "symmetric"  # or "same", the padding of TensorFlow


class FusedResidual(nn.Module):
    """Fused-MBConv: 3x3 expansion to `hidden`, 1x1 projection; a single 3x3 if `hidden` equals the input width."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int, drop_path: float, eps: float, padding: str):
        super().__init__()
        single = hidden == inputs
        self.expand = conv_norm(inputs, outputs if single else hidden, 3, stride, eps=eps, padding=padding)
        self.project = None if single else conv_norm(hidden, outputs, 1, eps=eps)
        self.drop_path = DropPath(drop_path)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H/stride W/stride
        if self.project is None:  # not in place: the result is needed for the gradient of the activation
            y = F.silu(self.expand(x))
            return self.drop_path(y) + x if self.residual else y
        y = self.project(F.silu(self.expand(x), inplace=True))
        return self.drop_path(y).add_(x) if self.residual else y


def get_strides(config: Config) -> tuple[int, ...]:
    """Return the stride of the first block of each of the 6 or 7 stages."""
    return (1, *config.early[1:], 2, 1, 2, 1)[: len(config.widths)]


class EfficientNetV2(nn.Module):
    """EfficientNetV2 classifier for images of any size. `features` returns the last map of each stride.

    Raises `SettingsError` for an unknown padding, or if the numbers of stages differ.
    """

    def __init__(self, config: Config):
        super().__init__()
        stages = {len(config.widths), len(config.depths), len(config.growths)}
        if config.padding not in PADDINGS or stages not in ({6}, {7}) or len(config.early) != 3:
            raise SettingsError(
                f"padding={config.padding!r} must be one of {', '.join(PADDINGS)}, widths, depths and "
                f"growths must have the same 6 or 7 stages (not {sorted(stages)}), and early={config.early} "
                "must have three strides"
            )
        self.config = config
        count, seen = sum(config.depths), 0
        same: ConvNormOptions = {"eps": config.eps, "padding": config.padding}
        dim = config.widths[0]
        self.stem = conv_norm(config.channels, dim, 3, config.early[0], **same)
        self.stages = nn.ModuleList()
        for s, (width, depth, growth, first) in enumerate(
            zip(config.widths, config.depths, config.growths, get_strides(config))
        ):
            stage = nn.Sequential()
            for i in range(depth):
                stride, drop = 1 if i else first, config.drop_path * seen / count
                stage.append(
                    FusedResidual(dim, growth * dim, width, stride, drop, **same)
                    if s < NUM_FUSED_STAGES
                    else InvertedResidual(
                        dim,
                        growth * dim,
                        width,
                        3,
                        stride,
                        squeeze=max(1, dim // 4),
                        act=F.silu,
                        squeeze_act=F.silu,
                        drop_path=drop,
                        **same,
                    )
                )
                dim, seen = width, seen + 1
            self.stages.append(stage)
        self.top = conv_norm(dim, config.top, 1, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.top, config.num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.out_channels // module.groups * module.kernel_size[0] ** 2
                nn.init.normal_(module.weight, 0, (2 / fan) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.uniform_(self.head.weight, -(self.config.num_classes**-0.5), self.config.num_classes**-0.5)
        nn.init.zeros_(self.head.bias)

    def get_last_stages(self) -> dict[str, int]:
        """Return the index of the last stage of each level, the one before a stride of the published network."""
        last = len(self.stages) - 1
        return {"c1": 0, "c2": 1, "c3": 2, "c4": min(4, last), "c5": last}

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Return the width D and the stride in pixels of each map of `features`."""
        c = self.config
        return {
            name: (c.widths[s], c.early[0] * math.prod(get_strides(c)[: s + 1])) for name, s in self.get_last_stages().items()
        }

    def features(self, x: Tensor) -> dict[str, Tensor]:  # B C H W -> {"c1": B D H/2 W/2, "c2": ...}
        x = F.silu(self.stem(x), inplace=True)
        seen = []
        for stage in self.stages:
            seen.append(x := stage(x))
        return {name: seen[s] for name, s in self.get_last_stages().items()}

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B classes
        x = F.silu(self.top(self.features(x)["c5"]), inplace=True)
        return self.head(self.dropout(x.mean((2, 3))))


def torchvision(config: Config) -> dict[str, Row]:
    """Return the key table of torchvision, which numbers the parts of a block: fused blocks have one or two."""
    table: dict[str, Row] = {}
    stages = len(config.widths)
    for s in range(stages):
        parts = ("expand", "depth", "squeeze", "project") if s >= NUM_FUSED_STAGES else ("expand", "project")
        for k, part in enumerate(parts):
            theirs, ours = f"features.{s + 1}.{{b}}.block.{k}", f"stages.{s}.{{b}}.{part}"
            table |= (
                {f"{theirs}.fc1.*": f"{ours}.down.*", f"{theirs}.fc2.*": f"{ours}.up.*"}
                if part == "squeeze"
                else {f"{theirs}.0.weight": f"{ours}.conv.weight", f"{theirs}.1.*": f"{ours}.norm.*"}
            )
    return table | {
        "features.0.0.weight": "stem.conv.weight",
        "features.0.1.*": "stem.norm.*",
        "classifier.1.*": "head.*",
        f"features.{stages + 1}.0.weight": "top.conv.weight",
        f"features.{stages + 1}.1.*": "top.norm.*",
    }


TIMM = {  # rows of the fused stages precede the general ones
    "blocks.0.{b}.conv.weight": "stages.0.{b}.expand.conv.weight",
    "blocks.1.{b}.conv_exp.weight": "stages.1.{b}.expand.conv.weight",
    "blocks.1.{b}.conv_pwl.weight": "stages.1.{b}.project.conv.weight",
    "blocks.1.{b}.bn2.*": "stages.1.{b}.project.norm.*",
    "blocks.2.{b}.conv_exp.weight": "stages.2.{b}.expand.conv.weight",
    "blocks.2.{b}.conv_pwl.weight": "stages.2.{b}.project.conv.weight",
    "blocks.2.{b}.bn2.*": "stages.2.{b}.project.norm.*",
    "blocks.{s}.{b}.bn1.*": "stages.{s}.{b}.expand.norm.*",
    "blocks.{s}.{b}.conv_pw.weight": "stages.{s}.{b}.expand.conv.weight",
    "blocks.{s}.{b}.conv_dw.weight": "stages.{s}.{b}.depth.conv.weight",
    "blocks.{s}.{b}.bn2.*": "stages.{s}.{b}.depth.norm.*",
    "blocks.{s}.{b}.se.conv_reduce.*": "stages.{s}.{b}.squeeze.down.*",
    "blocks.{s}.{b}.se.conv_expand.*": "stages.{s}.{b}.squeeze.up.*",
    "blocks.{s}.{b}.conv_pwl.weight": "stages.{s}.{b}.project.conv.weight",
    "blocks.{s}.{b}.bn3.*": "stages.{s}.{b}.project.norm.*",
    "conv_stem.weight": "stem.conv.weight",
    "bn1.*": "stem.norm.*",
    "conv_head.weight": "top.conv.weight",
    "bn2.*": "top.norm.*",
    "classifier.*": "head.*",
}


def adapt_to_image_size(side: int) -> dict[str, tuple[int, ...]]:
    """Return strides with which small images have a last map of 2 to 4 pixels per side."""
    return {"early": (1, 1 if side <= 32 else 2, 1 if side <= 16 else 2)} if side <= 64 else {}


GROWTHS = (1, 4, 4, 4, 6, 6, 6)  # of the sizes with seven stages
V2: dict[str, dict[str, Any]] = {
    "s": {"params": 21_458_488},
    "m": {
        "widths": (24, 48, 80, 160, 176, 304, 512),
        "depths": (3, 5, 5, 7, 14, 18, 5),
        "growths": GROWTHS,
        "dropout": 0.3,
        "params": 54_139_356,
    },
    "l": {
        "widths": (32, 64, 96, 192, 224, 384, 640),
        "depths": (4, 7, 7, 10, 19, 25, 7),
        "growths": GROWTHS,
        "dropout": 0.4,
        "params": 118_515_272,
    },
}
XL: dict[str, Any] = {
    "widths": (32, 64, 96, 192, 256, 512, 640),
    "depths": (4, 8, 8, 16, 24, 32, 8),
    "growths": GROWTHS,
    "dropout": 0.4,
    "params": 208_119_808,
}

CARD = Card(
    name="efficientnetv2",
    model=EfficientNetV2,
    config=Config,
    paper="arXiv:2104.00298",
    year=2021,
    input_type="image",
    output_type="label",
    adapt=lambda need: adapt_to_image_size(need["image"]),
    sizes={
        **{f"efficientnetv2-{name}": Size(source="torchvision", **size) for name, size in V2.items()},
        **{
            f"tf-efficientnetv2-{name}": Size(padding="same", source="timm", **size) for name, size in (V2 | {"xl": XL}).items()
        },
        "efficientnetv2-test": Size(
            widths=(8, 12, 16, 16, 24, 32), depths=(1, 2, 2, 2, 1, 1), top=32, dropout=0.0, drop_path=0.0, num_classes=5
        ),
    },
    weights={"torchvision": torchvision, "timm": TIMM},
    aliases={
        "timm": {f"tf_efficientnetv2_{name}": f"tf-efficientnetv2-{name}" for name in (*V2, "xl")}
        | {f"efficientnetv2_{name}": (f"efficientnetv2-{name}", {"eps": 1e-5}) for name in V2}
    },
    # As for EfficientNet.
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.05, "warmup": 0.1, "label_smoothing": 0.1},
)

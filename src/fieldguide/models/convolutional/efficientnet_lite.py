"""EfficientNet-Lite: EfficientNet for phones (Google 2020, github.com/tensorflow/tpu).

New here: what accelerators of phones compute slowly or imprecisely is left out: there is no squeeze-and-excitation, and ReLU6,
whose outputs suit 8-bit integers, replaces the swish. Scaling changes neither the width of the stem and of the layer before the
head nor the depth of the first and the last stage.

Names that begin with `tf` have TensorFlow's padding and epsilon, for weights trained there; the others those of torch.
Initialization: as in EfficientNet.
Shapes: B batch, C channels, H W height and width, D width of a level; level c1 is at H/2, c5 at H/32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import HALF, Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.conv import PADDINGS, ConvNormOptions, conv_norm
from fieldguide.models.layers.mbconv import InvertedResidual, make_divisible
from fieldguide.models.mapping.key_rules import Dropped, Row

# As in EfficientNet-B0: expansion, kernel, width, blocks and stride of each stage; stride 0: the next one of `early`.
STAGES = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 0),
    (6, 5, 40, 2, 0),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)
LEVELS = {"c1": 0, "c2": 1, "c3": 2, "c4": 4, "c5": 6}  # index of the last stage at each stride


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 1000
    channels: int = 3  # C
    width: float = 1.0  # multiplier of the widths of the stages
    depth: float = 1.0  # multiplier of the numbers of blocks, except in the first and the last stage
    stem: int = 32  # width of the first layer
    top: int = 1280  # width of the layer before the head
    early: tuple[int, ...] = (2, 2, 2)  # strides of the stem, the second and the third stage
    dropout: float = 0.2  # before the head
    drop_path: float = 0.2  # of the last block; increases linearly from 0
    eps: float = 1e-5  # of normalization
    padding: str = "symmetric"  # or "same", the padding of TensorFlow


def scale_stages(config: Config) -> list[tuple[int, int, int, int, int]]:
    """Return `STAGES` scaled to this configuration."""
    early, ends = iter(config.early[1:]), (0, len(STAGES) - 1)
    return [
        (
            growth,
            kernel,
            make_divisible(config.width * width),
            depth if s in ends else math.ceil(config.depth * depth),
            stride or next(early),
        )
        for s, (growth, kernel, width, depth, stride) in enumerate(STAGES)
    ]


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite classifier for images of any size. `features` returns the last map of each stride.

    Raises `SettingsError` for an unknown padding, or if `early` does not have three strides.
    """

    def __init__(self, config: Config):
        super().__init__()
        if config.padding not in PADDINGS or len(config.early) != 3:
            raise SettingsError(
                f"padding={config.padding!r} must be one of {', '.join(PADDINGS)}, and early={config.early} have three strides"
            )
        self.config = config
        stages = scale_stages(config)
        count, seen = sum(depth for *_, depth, _ in stages), 0
        same: ConvNormOptions = {"eps": config.eps, "padding": config.padding}
        dim = config.stem
        self.stem = conv_norm(config.channels, dim, 3, config.early[0], **same)
        self.stages = nn.ModuleList()
        for growth, kernel, width, depth, stride in stages:
            stage = nn.Sequential()
            for i in range(depth):
                rate = config.drop_path * seen / count
                stage.append(
                    InvertedResidual(dim, growth * dim, width, kernel, 1 if i else stride, act=F.relu6, drop_path=rate, **same)
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
        nn.init.uniform_(self.head.weight, -(self.config.num_classes**-0.5), self.config.num_classes**-0.5)
        nn.init.zeros_(self.head.bias)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Return the width D and the stride in pixels of each map of `features`."""
        stages = scale_stages(self.config)
        return {
            name: (stages[s][2], self.config.early[0] * math.prod(stride for *_, stride in stages[: s + 1]))
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


TIMM = {
    "conv_stem.weight": "stem.conv.weight",
    "bn1.*": "stem.norm.*",
    "blocks.0.{b}.conv_dw.weight": "stages.0.{b}.depth.conv.weight",
    "blocks.0.{b}.bn1.*": "stages.0.{b}.depth.norm.*",
    "blocks.0.{b}.conv_pw.weight": "stages.0.{b}.project.conv.weight",
    "blocks.0.{b}.bn2.*": "stages.0.{b}.project.norm.*",
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


def converted(config: Config) -> dict[str, Row]:
    """Return the key table of TensorFlow's weights converted to EfficientNet-PyTorch, which numbers blocks across stages."""
    table: dict[str, Row] = {
        "_conv_stem.weight": "stem.conv.weight",
        "_bn0.*": "stem.norm.*",
        "_conv_head.weight": "top.conv.weight",
        "_bn1.*": "top.norm.*",
        "_fc.*": "head.*",
    }
    places = [(s, b) for s, (*_, depth, _) in enumerate(scale_stages(config)) for b in range(depth)]
    for n, (s, b) in enumerate(places):
        theirs, ours = f"_blocks.{n}", f"stages.{s}.{b}"
        table |= {
            f"{theirs}._expand_conv.weight": f"{ours}.expand.conv.weight",
            f"{theirs}._bn0.*": f"{ours}.expand.norm.*",
            f"{theirs}._depthwise_conv.weight": f"{ours}.depth.conv.weight",
            f"{theirs}._bn1.*": f"{ours}.depth.norm.*",
            f"{theirs}._project_conv.weight": f"{ours}.project.conv.weight",
            f"{theirs}._bn2.*": f"{ours}.project.norm.*",
        }
    if config.padding != "same":  # all of these files are TensorFlow's, so others cannot be meant
        table["_conv_stem.weight"] = Dropped("weights of TensorFlow need its padding", means={"padding": "same"})
    return table


def adapt_to_image_size(side: int) -> dict[str, tuple[int, ...]]:
    """Return strides with which small images have a last map of 2 to 4 pixels per side."""
    return {"early": (1, 1 if side <= 32 else 2, 1 if side <= 16 else 2)} if side <= 64 else {}


LITE = {  # width, depth, dropout, parameters
    "lite0": (1.0, 1.0, 0.2, 4_652_008),
    "lite1": (1.0, 1.1, 0.2, 5_416_680),
    "lite2": (1.1, 1.2, 0.3, 6_092_072),
    "lite3": (1.2, 1.4, 0.3, 8_197_096),
    "lite4": (1.4, 1.8, 0.3, 13_006_568),
}
SOURCE = "tensorflow/tpu models/official/efficientnet/lite, timm"
CARD = Card(
    name="efficientnet-lite",
    model=EfficientNetLite,
    config=Config,
    paper="https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite",
    year=2020,
    input_type="image",
    output_type="label",
    adapt=lambda need: adapt_to_image_size(need["image"]),
    sizes={
        **{
            f"efficientnet-{name}": Size(width=width, depth=depth, dropout=dropout, params=params, source=SOURCE)
            for name, (width, depth, dropout, params) in LITE.items()
        },
        **{
            f"tf-efficientnet-{name}": Size(
                width=width, depth=depth, dropout=dropout, eps=1e-3, padding="same", params=params, source=SOURCE
            )
            for name, (width, depth, dropout, params) in LITE.items()
        },
        "efficientnet-lite-test": Size(
            width=0.1, depth=0.3, stem=16, top=32, dropout=0.0, drop_path=0.0, padding="same", eps=1e-3, num_classes=5
        ),
    },
    weights={"timm": TIMM, "efficientnet-pytorch": converted},
    aliases={
        "timm": {f"tf_efficientnet_{name}": f"tf-efficientnet-{name}" for name in LITE}
        | {f"efficientnet_{name}": f"efficientnet-{name}" for name in LITE}
    },
    # As for EfficientNet; the RMSprop settings of the authors need very large batches.
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.02, "warmup": 0.1, "label_smoothing": 0.1},
    scale=HALF,  # the authors' (x - 127) / 128
)

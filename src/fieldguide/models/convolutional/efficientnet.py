"""EfficientNet: compound scaling of depth, width and resolution (Tan and Le 2019, arXiv:1905.11946).

New here: a small network, B0, found by architecture search, and one rule to scale it: each step multiplies the depth by
1.2, the width by 1.1 and the image side by 1.15, which costs about twice the multiply-adds. The blocks are the inverted
residuals of MobileNetV2 with squeeze-and-excitation.

Names that begin with `tf` have TensorFlow's padding and epsilon, for weights trained there (including
"google/efficientnet-b0"); the others follow torchvision, whose B5 to B7 have the same epsilon.
Initialization: normal by fan-out, per group for grouped convolutions; the head uniform in +-1 / sqrt(classes).
Shapes: B batch, C channels, H W height and width, D width of a level; level c1 is at H/2, c5 at H/32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.conv import PADDINGS, ConvNormOptions, conv_norm
from fieldguide.models.layers.mbconv import InvertedResidual, make_divisible
from fieldguide.models.mapping.config_rules import Constant, Expect, LabelCount
from fieldguide.models.mapping.key_rules import Row

# B0, table 1: expansion, kernel, width, blocks and stride of each stage; stride 0: the next one of `early`.
STAGES = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 0),
    (6, 5, 40, 2, 0),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)
STEM, HEAD = 32, 1280  # widths of the layers before and after the stages
LEVELS = {"c1": 0, "c2": 1, "c3": 2, "c4": 4, "c5": 6}  # index of the last stage at each stride


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 1000
    channels: int = 3  # C
    width: float = 1.0  # multiplier of the widths of B0
    depth: float = 1.0  # multiplier of the numbers of blocks of B0
    early: tuple[int, ...] = (2, 2, 2)  # strides of the stem, the second and the third stage
    dropout: float = 0.2  # before the head
    drop_path: float = 0.2  # of the last block; increases linearly from 0
    eps: float = 1e-5  # of normalization
    padding: str = "symmetric"  # or "same", the padding of TensorFlow


def scale_stages(config: Config) -> list[tuple[int, int, int, int, int]]:
    """Return `STAGES` scaled to this configuration."""
    early = iter(config.early[1:])
    return [
        (growth, kernel, make_divisible(config.width * width), math.ceil(config.depth * depth), stride or next(early))
        for growth, kernel, width, depth, stride in STAGES
    ]


class EfficientNet(nn.Module):
    """EfficientNet classifier for images of any size. `features` returns the last map of each stride.

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
        dim = make_divisible(config.width * STEM)
        self.stem = conv_norm(config.channels, dim, 3, config.early[0], **same)
        self.stages = nn.ModuleList()
        for growth, kernel, width, depth, stride in stages:
            stage = nn.Sequential()
            for i in range(depth):  # the squeeze width follows the width of the block's input
                stage.append(
                    InvertedResidual(
                        dim,
                        growth * dim,
                        width,
                        kernel,
                        1 if i else stride,
                        squeeze=max(1, dim // 4),
                        act=F.silu,
                        squeeze_act=F.silu,
                        drop_path=config.drop_path * seen / count,
                        **same,
                    )
                )
                dim, seen = width, seen + 1
            self.stages.append(stage)
        self.top = conv_norm(dim, make_divisible(config.width * HEAD), 1, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(make_divisible(config.width * HEAD), config.num_classes)
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

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Return the width D and the stride in pixels of each map of `features`."""
        stages = scale_stages(self.config)
        return {
            name: (stages[s][2], self.config.early[0] * math.prod(stride for *_, stride in stages[: s + 1]))
            for name, s in LEVELS.items()
        }

    def features(self, x: Tensor) -> dict[str, Tensor]:  # B C H W -> {"c1": B D H/2 W/2, "c2": ...}
        x = F.silu(self.stem(x), inplace=True)
        seen = []
        for stage in self.stages:
            seen.append(x := stage(x))
        return {name: seen[s] for name, s in LEVELS.items()}

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B classes
        x = F.silu(self.top(self.features(x)["c5"]), inplace=True)
        return self.head(self.dropout(x.mean((2, 3))))


TORCHVISION = {  # the first stage has no expansion, so its layers are numbered differently
    "features.0.0.weight": "stem.conv.weight",
    "features.0.1.*": "stem.norm.*",
    "features.1.{b}.block.0.0.weight": "stages.0.{b}.depth.conv.weight",
    "features.1.{b}.block.0.1.*": "stages.0.{b}.depth.norm.*",
    "features.1.{b}.block.1.fc1.*": "stages.0.{b}.squeeze.down.*",
    "features.1.{b}.block.1.fc2.*": "stages.0.{b}.squeeze.up.*",
    "features.1.{b}.block.2.0.weight": "stages.0.{b}.project.conv.weight",
    "features.1.{b}.block.2.1.*": "stages.0.{b}.project.norm.*",
    "features.8.0.weight": "top.conv.weight",
    "features.8.1.*": "top.norm.*",
    "features.{s+1}.{b}.block.0.0.weight": "stages.{s}.{b}.expand.conv.weight",
    "features.{s+1}.{b}.block.0.1.*": "stages.{s}.{b}.expand.norm.*",
    "features.{s+1}.{b}.block.1.0.weight": "stages.{s}.{b}.depth.conv.weight",
    "features.{s+1}.{b}.block.1.1.*": "stages.{s}.{b}.depth.norm.*",
    "features.{s+1}.{b}.block.2.fc1.*": "stages.{s}.{b}.squeeze.down.*",
    "features.{s+1}.{b}.block.2.fc2.*": "stages.{s}.{b}.squeeze.up.*",
    "features.{s+1}.{b}.block.3.0.weight": "stages.{s}.{b}.project.conv.weight",
    "features.{s+1}.{b}.block.3.1.*": "stages.{s}.{b}.project.norm.*",
    "classifier.1.*": "head.*",
}
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
    "blocks.{s}.{b}.se.conv_reduce.*": "stages.{s}.{b}.squeeze.down.*",
    "blocks.{s}.{b}.se.conv_expand.*": "stages.{s}.{b}.squeeze.up.*",
    "blocks.{s}.{b}.conv_pwl.weight": "stages.{s}.{b}.project.conv.weight",
    "blocks.{s}.{b}.bn3.*": "stages.{s}.{b}.project.norm.*",
    "conv_head.weight": "top.conv.weight",
    "bn2.*": "top.norm.*",
    "classifier.*": "head.*",
}


def huggingface(config: Config) -> dict[str, Row]:
    """Return the key table of EfficientNetForImageClassification, which numbers blocks across stages."""
    table: dict[str, Row] = {
        "efficientnet.embeddings.convolution.weight": "stem.conv.weight",
        "efficientnet.embeddings.batchnorm.*": "stem.norm.*",
        "efficientnet.encoder.top_conv.weight": "top.conv.weight",
        "efficientnet.encoder.top_bn.*": "top.norm.*",
        "classifier.*": "head.*",
    }
    places = [(s, b) for s, (*_, depth, _) in enumerate(scale_stages(config)) for b in range(depth)]
    for n, (s, b) in enumerate(places):
        theirs, ours = f"efficientnet.encoder.blocks.{n}", f"stages.{s}.{b}"
        table |= {
            f"{theirs}.expansion.expand_conv.weight": f"{ours}.expand.conv.weight",
            f"{theirs}.expansion.expand_bn.*": f"{ours}.expand.norm.*",
            f"{theirs}.depthwise_conv.depthwise_conv.weight": f"{ours}.depth.conv.weight",
            f"{theirs}.depthwise_conv.depthwise_norm.*": f"{ours}.depth.norm.*",
            f"{theirs}.squeeze_excite.reduce.*": f"{ours}.squeeze.down.*",
            f"{theirs}.squeeze_excite.expand.*": f"{ours}.squeeze.up.*",
            f"{theirs}.projection.project_conv.weight": f"{ours}.project.conv.weight",
            f"{theirs}.projection.project_bn.*": f"{ours}.project.norm.*",
        }
    return table


CONFIG = {  # of transformers
    "model_type": Expect("efficientnet"),
    "architectures": Expect(["EfficientNetForImageClassification"]),
    "id2label": LabelCount("num_classes"),
    "num_channels": "channels",
    "width_coefficient": "width",
    "depth_coefficient": "depth",
    "dropout_rate": "dropout",
    "drop_connect_rate": "drop_path",
    "batch_norm_eps": "eps",
    "hidden_dim": Expect(lambda c: make_divisible(c.width * HEAD)),
    "depth_divisor": Expect(8),
    "expand_ratios": Expect([stage[0] for stage in STAGES]),
    "kernel_sizes": Expect([stage[1] for stage in STAGES]),
    "in_channels": Expect([STEM, *(stage[2] for stage in STAGES[:-1])]),
    "out_channels": Expect([stage[2] for stage in STAGES]),
    "num_block_repeats": Expect([stage[3] for stage in STAGES]),
    "strides": Expect([stage[4] or 2 for stage in STAGES]),
    "squeeze_expansion_ratio": Expect(0.25),
    "hidden_act": Expect("swish"),
    "pooling_type": Expect("mean"),
    "<sides are padded as in TensorFlow>": Constant("padding", "same"),  # `depthwise_padding` lists it for one image size
    "<strides are those of the paper>": Constant("early", (2, 2, 2)),
}


def adapt_to_image_size(side: int) -> dict[str, tuple[int, ...]]:
    """Return strides with which small images have a last map of 2 to 4 pixels per side."""
    return {"early": (1, 1 if side <= 32 else 2, 1 if side <= 16 else 2)} if side <= 64 else {}


B = {  # width, depth, dropout, parameters
    "b0": (1.0, 1.0, 0.2, 5_288_548),
    "b1": (1.0, 1.1, 0.2, 7_794_184),
    "b2": (1.1, 1.2, 0.3, 9_109_994),
    "b3": (1.2, 1.4, 0.3, 12_233_232),
    "b4": (1.4, 1.8, 0.4, 19_341_616),
    "b5": (1.6, 2.2, 0.4, 30_389_784),
    "b6": (1.8, 2.6, 0.5, 43_040_704),
    "b7": (2.0, 3.1, 0.5, 66_347_960),
}
CARD = Card(
    name="efficientnet",
    model=EfficientNet,
    config=Config,
    paper="arXiv:1905.11946",
    year=2019,
    input_type="image",
    output_type="label",
    adapt=lambda need: adapt_to_image_size(need["image"]),
    sizes={
        **{
            f"efficientnet-{name}": Size(
                width=width,
                depth=depth,
                dropout=dropout,
                eps=1e-3 if name > "b4" else 1e-5,
                params=params,
                source="torchvision",
            )
            for name, (width, depth, dropout, params) in B.items()
        },
        **{
            f"tf-efficientnet-{name}": Size(
                width=width,
                depth=depth,
                dropout=dropout,
                eps=1e-3,
                padding="same",
                params=params,
                source="timm, google/efficientnet",
            )
            for name, (width, depth, dropout, params) in B.items()
        },
        "efficientnet-test": Size(width=0.1, depth=0.3, dropout=0.0, drop_path=0.0, padding="same", eps=1e-3, num_classes=5),
    },
    weights={"torchvision": TORCHVISION, "timm": TIMM, "huggingface": huggingface},
    configs={"huggingface": CONFIG},
    aliases={
        "timm": {f"tf_efficientnet_{name}": f"tf-efficientnet-{name}" for name in B}
        | {f"efficientnet_{name}": (f"efficientnet-{name}", {"eps": 1e-5}) for name in B}
    },
    # Batch norm in every block allows high learning rates; the paper's RMSprop settings need a batch of 4,096.
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.05, "warmup": 0.1, "label_smoothing": 0.1},
)

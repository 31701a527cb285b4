"""ResNet: blocks with residual connections (He et al. 2015, arXiv:1512.03385).

New here: every block adds its output to its input, which solves degradation, the rising training error of deep plain
networks. The stride of a bottleneck is on its 3x3 convolution ("v1.5" of torchvision, timm and NVIDIA; in the paper it
is on the first 1x1).

Initialization: He normal by fan-out for convolutions; the last norm of each block starts at zero, so that blocks start
as the identity (Goyal et al. 2017, arXiv:1706.02677, section 5.1); the head is uniform by fan-in.
Shapes: B batch, C channels, H W height and width, D width of a level; level c2 is at H/4, c5 at H/32
(H and H/8 with the 3x3 stem).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.classifier_head import OUTPUT_TYPES, architectures, classifier_head
from fieldguide.models.mapping.config_rules import Constant, Derived, Expect, LabelCount
from fieldguide.models.mapping.key_rules import strip_prefix


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "label"  # or "vector": the features before the classifier
    num_classes: int = 1000
    channels: int = 3  # C
    block: str = "bottleneck"  # or "basic"
    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks per level
    widths: tuple[int, ...] = (64, 128, 256, 512)  # inner width per level; bottlenecks output 4 times that
    stem: str = "7x7-pool"  # or "3x3", stride 1, for images below 64 pixels


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """Return the shortcut of a block that changes the shape, or None for the identity."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(OrderedDict(conv=conv(inputs, outputs, 1, stride), norm=nn.BatchNorm2d(outputs)))


class Basic(nn.Module):
    """Basic block: two 3x3 convolutions."""

    growth: ClassVar[int] = 1  # output channels per inner width

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = projection(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H/stride W/stride
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        y += x if self.shortcut is None else self.shortcut(x)  # in place: the output of the norm is not needed for its gradient
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """Bottleneck block: 1x1 reduction, 3x3, 1x1 expansion to four times the width."""

    growth: ClassVar[int] = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = conv(inputs, width, 1)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, 4 * width, 1)
        self.norm3 = nn.BatchNorm2d(4 * width)
        self.shortcut = projection(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H/stride W/stride
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        y = self.norm3(self.conv3(y))
        y += x if self.shortcut is None else self.shortcut(x)  # in place: the output of the norm is not needed for its gradient
        return F.relu(y, inplace=True)


BLOCKS: dict[str, type[Basic | Bottleneck]] = {"basic": Basic, "bottleneck": Bottleneck}
STEMS = {"7x7-pool": (7, 2), "3x3": (3, 1)}  # kernel, stride


class ResNet(nn.Module):
    """ResNet classifier for images of any size. `features` returns the maps of the levels c2, c3, ...

    Raises `SettingsError` for an unknown block or stem, or if the numbers of depths and widths differ.
    """

    heads: ClassVar[tuple[str, ...]] = ("head",)  # layers that a checkpoint may lack or have in another size

    def __init__(self, config: Config):
        super().__init__()
        if config.block not in BLOCKS or config.stem not in STEMS:
            raise SettingsError(
                f"block={config.block!r} must be one of {', '.join(BLOCKS)}, and stem={config.stem!r} one of {', '.join(STEMS)}"
            )
        if len(config.depths) != len(config.widths):
            raise SettingsError(f"depths={config.depths} and widths={config.widths} must have the same length")
        self.config = config
        block = BLOCKS[config.block]
        kernel, stride = STEMS[config.stem]
        dim = config.widths[0]
        self.stem = nn.Sequential(OrderedDict(conv=conv(config.channels, dim, kernel, stride), norm=nn.BatchNorm2d(dim)))
        self.stages = nn.ModuleList()
        for level, (depth, width) in enumerate(zip(config.depths, config.widths)):
            stage = nn.Sequential()
            for i in range(depth):
                stage.append(block(dim, width, 2 if level and not i else 1))
                dim = width * block.growth
            self.stages.append(stage)
        self.head = classifier_head(config, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, Basic | Bottleneck):
                nn.init.zeros_((module.norm2 if isinstance(module, Basic) else module.norm3).weight)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Return the width D and the stride in pixels of each map of `features`."""
        growth, first = BLOCKS[self.config.block].growth, 4 if self.config.stem == "7x7-pool" else 1
        return {f"c{i + 2}": (growth * width, first * 2**i) for i, width in enumerate(self.config.widths)}

    def features(self, x: Tensor) -> dict[str, Tensor]:  # B C H W -> {"c2": B D H/4 W/4, "c3": ...}
        x = F.relu(self.stem(x), inplace=True)
        if self.config.stem == "7x7-pool":
            x = F.max_pool2d(x, 3, 2, 1)
        levels = {}
        for i, stage in enumerate(self.stages):
            levels[f"c{i + 2}"] = x = stage(x)
        return levels

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B classes, or B D
        *_, x = self.features(x).values()
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


TORCHVISION = {  # timm uses the same names
    "conv1.weight": "stem.conv.weight",
    "bn1.*": "stem.norm.*",
    "layer{s+1}.{b}.conv{k}.weight": "stages.{s}.{b}.conv{k}.weight",
    "layer{s+1}.{b}.bn{k}.*": "stages.{s}.{b}.norm{k}.*",
    "layer{s+1}.{b}.downsample.0.weight": "stages.{s}.{b}.shortcut.conv.weight",
    "layer{s+1}.{b}.downsample.1.*": "stages.{s}.{b}.shortcut.norm.*",
    "fc.*": "head.*",
}
HUGGINGFACE = {  # ResNetForImageClassification
    "resnet.embedder.embedder.convolution.weight": "stem.conv.weight",
    "resnet.embedder.embedder.normalization.*": "stem.norm.*",
    "resnet.encoder.stages.{s}.layers.{b}.layer.{k}.convolution.weight": "stages.{s}.{b}.conv{k+1}.weight",
    "resnet.encoder.stages.{s}.layers.{b}.layer.{k}.normalization.*": "stages.{s}.{b}.norm{k+1}.*",
    "resnet.encoder.stages.{s}.layers.{b}.shortcut.convolution.weight": "stages.{s}.{b}.shortcut.conv.weight",
    "resnet.encoder.stages.{s}.layers.{b}.shortcut.normalization.*": "stages.{s}.{b}.shortcut.norm.*",
    "classifier.1.*": "head.*",
}


def get_growth(block: str) -> int:
    return BLOCKS[block].growth if block in BLOCKS else 1


CONFIG = {  # of transformers
    "model_type": Expect("resnet"),
    "architectures": architectures("ResNet"),
    "id2label": LabelCount("num_classes"),
    "num_channels": "channels",
    "layer_type": "block",
    "depths": "depths",
    "hidden_sizes": Derived(
        lambda raw: {"widths": tuple(n // get_growth(raw.get("layer_type", "bottleneck")) for n in raw["hidden_sizes"])},
        lambda c: [n * get_growth(c.block) for n in c.widths],
    ),
    "embedding_size": Expect(lambda c: c.widths[0]),
    "hidden_act": Expect("relu"),
    "downsample_in_first_stage": Expect(False),
    "downsample_in_bottleneck": Expect(False),  # True is the paper's stride on the 1x1
    "<the stem is of 7x7>": Constant("stem", "7x7-pool"),
}

CARD = Card(
    name="resnet",
    model=ResNet,
    config=Config,
    paper="arXiv:1512.03385",
    year=2015,
    input_type="image",
    output_type=OUTPUT_TYPES,
    # The default stem downsamples by four, which is too much for small images.
    adapt=lambda need: {"stem": "3x3"} if need["image"] <= 64 else {},
    sizes={
        "resnet18": Size(block="basic", depths=(2, 2, 2, 2), params=11_689_512, source="torchvision"),
        "resnet34": Size(block="basic", depths=(3, 4, 6, 3), params=21_797_672, source="torchvision"),
        "resnet50": Size(params=25_557_032, source="torchvision"),
        "resnet101": Size(depths=(3, 4, 23, 3), params=44_549_160, source="torchvision"),
        "resnet152": Size(depths=(3, 8, 36, 3), params=60_192_808, source="torchvision"),
        # For small images. ResNet-20 is that of section 4.2 with projections instead of padded shortcuts,
        # which adds 2,752 parameters.
        "resnet20": Size(block="basic", depths=(3, 3, 3), widths=(16, 32, 64), stem="3x3", num_classes=10),
        "resnet18-small": Size(block="basic", depths=(2, 2, 2, 2), stem="3x3", num_classes=10),
        "resnet-test": Size(depths=(1, 2, 1), widths=(8, 16, 24), num_classes=5),
    },
    weights={"torchvision": TORCHVISION, "huggingface": HUGGINGFACE, "huggingface-base": strip_prefix(HUGGINGFACE, "resnet.")},
    configs={"huggingface": CONFIG},
    aliases={"timm": {name: name for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")}},
    # Batch norm allows high learning rates; weight decay prevents overfitting on small data sets.
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.05, "warmup": 0.05, "label_smoothing": 0.1},
)

"""ConvNeXt: a ResNet modernized with design choices of Transformers (Liu et al. 2022, arXiv:2201.03545).

New here: the design choices of Swin Transformer are applied to a ResNet-50, and those that help are kept: a patch stem,
depthwise 7x7 convolutions before an inverted bottleneck, one GELU per block, one layer norm per block instead of batch
norm, and separate downsampling layers.

Initialization: normal with standard deviation 0.02, truncated at 2, zero biases; layer scales start at 1e-6.
Shapes: B batch, C channels, H W height and width, D width of a level; level c2 is at H/4, c5 at H/32.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.classifier_head import OUTPUT_TYPES, architectures, classifier_head
from fieldguide.models.layers.conv import check_min_side
from fieldguide.models.layers.norm import ChannelNorm
from fieldguide.models.layers.stochastic_depth import DropPath, stochastic_depth_rates
from fieldguide.models.mapping.config_rules import ConfigRow, Expect, LabelCount, WithDefault
from fieldguide.models.mapping.key_rules import Reshaped, Row, strip_prefix


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "label"  # or "vector": the features before the classifier
    num_classes: int = 1000
    channels: int = 3  # C
    patch: int = 4  # side of a patch of the stem in pixels
    depths: tuple[int, ...] = (3, 3, 9, 3)  # blocks per level
    widths: tuple[int, ...] = (96, 192, 384, 768)  # D of each level
    drop_path: float = 0.1  # of the last block; increases linearly from 0
    eps: float = 1e-6  # of the last norm; 1e-12 in the checkpoints of transformers


class Block(nn.Module):
    """Depthwise 7x7 convolution, layer norm, expansion by four, GELU, projection, layer scale."""

    def __init__(self, dim: int, drop_path: float):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.empty(dim))
        self.drop_path = DropPath(drop_path)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, 1e-6)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))  # B H W D, the memory layout
        y = self.down(F.gelu(self.up(y))) * self.gamma
        return self.drop_path(y.permute(0, 3, 1, 2)).add_(x)  # in place: the product is not needed for a gradient


class ConvNeXt(nn.Module):
    """ConvNeXt classifier for images of at least 8 patches per side. `features` returns the map of each level.

    Raises `SettingsError` if the numbers of depths and widths differ, `DataError` for smaller images.
    """

    block: type[Any] = Block
    heads: ClassVar[tuple[str, ...]] = ("head",)  # layers that a checkpoint may lack or have in another size

    def __init__(self, config: Config):
        super().__init__()
        if len(config.depths) != len(config.widths):
            raise SettingsError(f"depths={config.depths} and widths={config.widths} must have the same length")
        self.config = config
        dim = config.widths[0]
        self.stem = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(config.channels, dim, config.patch, config.patch), norm=ChannelNorm(dim))
        )
        self.steps, self.stages = nn.ModuleList(), nn.ModuleList()
        drops = iter(stochastic_depth_rates(config.drop_path, sum(config.depths)))
        for level, (depth, width) in enumerate(zip(config.depths, config.widths)):
            if level:  # downsampling by 2
                self.steps.append(nn.Sequential(OrderedDict(norm=ChannelNorm(dim), conv=nn.Conv2d(dim, width, 2, 2))))
            self.stages.append(nn.Sequential(*(self.block(width, next(drops)) for _ in range(depth))))
            dim = width
        self.norm = nn.LayerNorm(dim, config.eps)
        self.head = classifier_head(config, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, self.block):
                module.reset_parameters()

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Return the width D and the stride in pixels of each map of `features`."""
        return {f"c{i + 2}": (width, self.config.patch * 2**i) for i, width in enumerate(self.config.widths)}

    def features(self, x: Tensor) -> dict[str, Tensor]:  # B C H W -> {"c2": B D H/4 W/4, "c3": ...}
        check_min_side(x, self.config.patch * 2 ** len(self.steps), type(self).__name__)
        x, levels = self.stem(x), {}
        for i, stage in enumerate(self.stages):
            levels[f"c{i + 2}"] = x = stage(self.steps[i - 1](x) if i else x)
        return levels

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B classes, or B D
        *_, x = self.features(x).values()
        return self.head(self.norm(x.mean((2, 3))))


TIMM = {
    "stem.0.*": "stem.conv.*",
    "stem.1.*": "stem.norm.*",
    "stages.{s+1}.downsample.0.*": "steps.{s}.norm.*",
    "stages.{s+1}.downsample.1.*": "steps.{s}.conv.*",
    "stages.{s}.blocks.{b}.conv_dw.*": "stages.{s}.{b}.conv.*",
    "stages.{s}.blocks.{b}.norm.*": "stages.{s}.{b}.norm.*",
    "stages.{s}.blocks.{b}.mlp.fc1.*": "stages.{s}.{b}.up.*",
    "stages.{s}.blocks.{b}.mlp.fc2.*": "stages.{s}.{b}.down.*",
    "stages.{s}.blocks.{b}.gamma": "stages.{s}.{b}.gamma",
    "head.norm.*": "norm.*",
    "head.fc.*": "head.*",
}
AUTHORS = {  # facebookresearch/ConvNeXt
    "downsample_layers.0.0.*": "stem.conv.*",
    "downsample_layers.0.1.*": "stem.norm.*",
    "downsample_layers.{s+1}.0.*": "steps.{s}.norm.*",
    "downsample_layers.{s+1}.1.*": "steps.{s}.conv.*",
    "stages.{s}.{b}.dwconv.*": "stages.{s}.{b}.conv.*",
    "stages.{s}.{b}.norm.*": "stages.{s}.{b}.norm.*",
    "stages.{s}.{b}.pwconv1.*": "stages.{s}.{b}.up.*",
    "stages.{s}.{b}.pwconv2.*": "stages.{s}.{b}.down.*",
    "stages.{s}.{b}.gamma": "stages.{s}.{b}.gamma",
    "norm.*": "norm.*",
    "head.*": "head.*",
}
HUGGINGFACE = {  # ConvNextForImageClassification
    "convnext.embeddings.patch_embeddings.*": "stem.conv.*",
    "convnext.embeddings.layernorm.*": "stem.norm.*",
    "convnext.encoder.stages.{s+1}.downsampling_layer.0.*": "steps.{s}.norm.*",
    "convnext.encoder.stages.{s+1}.downsampling_layer.1.*": "steps.{s}.conv.*",
    "convnext.encoder.stages.{s}.layers.{b}.dwconv.*": "stages.{s}.{b}.conv.*",
    "convnext.encoder.stages.{s}.layers.{b}.layernorm.*": "stages.{s}.{b}.norm.*",
    "convnext.encoder.stages.{s}.layers.{b}.pwconv1.*": "stages.{s}.{b}.up.*",
    "convnext.encoder.stages.{s}.layers.{b}.pwconv2.*": "stages.{s}.{b}.down.*",
    "convnext.encoder.stages.{s}.layers.{b}.layer_scale_parameter": "stages.{s}.{b}.gamma",
    "convnext.layernorm.*": "norm.*",
    "classifier.*": "head.*",
}


def torchvision(config: Config) -> dict[str, Row]:
    """Return the key table of torchvision, which numbers downsampling layers and stages in one list."""
    table: dict[str, Row] = {
        "features.0.0.*": "stem.conv.*",
        "features.0.1.*": "stem.norm.*",
        "classifier.0.*": "norm.*",
        "classifier.2.*": "head.*",
    }
    for s in range(len(config.depths)):
        theirs, ours = f"features.{2 * s + 1}.{{b}}", f"stages.{s}.{{b}}"
        table |= {
            f"{theirs}.block.0.*": f"{ours}.conv.*",
            f"{theirs}.block.2.*": f"{ours}.norm.*",
            f"{theirs}.block.3.*": f"{ours}.up.*",
            f"{theirs}.block.5.*": f"{ours}.down.*",
            f"{theirs}.layer_scale": Reshaped(f"{ours}.gamma", (-1,), (-1, 1, 1)),
            f"features.{2 * s + 2}.0.*": f"steps.{s}.norm.*",
            f"features.{2 * s + 2}.1.*": f"steps.{s}.conv.*",
        }
    return table


def config_rules(model_type: str, name: str) -> dict[str, ConfigRow]:
    """Return the rules for the configurations of transformers, for both versions of ConvNeXt."""
    return {
        "model_type": Expect(model_type),
        "architectures": architectures(name),
        "id2label": LabelCount("num_classes"),
        "num_channels": "channels",
        "patch_size": "patch",
        "num_stages": Expect(lambda c: len(c.depths)),
        "hidden_sizes": "widths",
        "depths": "depths",
        "hidden_act": Expect("gelu"),
        "layer_norm_eps": WithDefault("eps", 1e-12),  # of the last norm; the others have 1e-6 there, too
        "drop_path_rate": WithDefault("drop_path", 0.0),
    }


def adapt_to_image_size(side: int) -> dict[str, int]:
    """Return a smaller patch for small images, so that they can be halved three times."""
    if side < 8:
        raise SettingsError(f"images of {side} pixels per side are too small: ConvNeXt needs at least 8")
    return {"patch": 2 if side > 16 else 1} if side <= 64 else {}


CARD = Card(
    name="convnext",
    model=ConvNeXt,
    config=Config,
    paper="arXiv:2201.03545",
    year=2022,
    input_type="image",
    output_type=OUTPUT_TYPES,
    adapt=lambda need: adapt_to_image_size(need["image"]),
    sizes={
        "convnext-tiny": Size(params=28_589_128, source="torchvision"),
        "convnext-small": Size(depths=(3, 3, 27, 3), drop_path=0.4, params=50_223_688, source="torchvision"),
        "convnext-base": Size(
            depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024), drop_path=0.5, params=88_591_464, source="torchvision"
        ),
        "convnext-large": Size(
            depths=(3, 3, 27, 3), widths=(192, 384, 768, 1536), drop_path=0.5, params=197_767_336, source="torchvision"
        ),
        "convnext-xlarge": Size(
            depths=(3, 3, 27, 3), widths=(256, 512, 1024, 2048), drop_path=0.5, params=350_196_968, source="timm"
        ),
        "convnext-test": Size(patch=2, depths=(1, 2, 1), widths=(8, 12, 16), drop_path=0.0, num_classes=5),
    },
    weights={
        "timm": TIMM,
        "torchvision": torchvision,
        "authors": AUTHORS,
        "huggingface": HUGGINGFACE,
        "huggingface-base": strip_prefix(HUGGINGFACE, "convnext."),
    },
    configs={"huggingface": config_rules("convnext", "ConvNext")},
    aliases={"timm": {f"convnext_{size}": f"convnext-{size}" for size in ("tiny", "small", "base", "large", "xlarge")}},
    # Section 2.1: AdamW with decay 0.05, smoothing 0.1, a long warm-up; 4e-3 at batch 4,096 is 1e-3 at a few hundred.
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.1, "label_smoothing": 0.1},
)

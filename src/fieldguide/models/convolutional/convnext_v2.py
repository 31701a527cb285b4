"""ConvNeXt V2: ConvNeXt with global response normalization (Woo et al. 2023, arXiv:2301.00808).

New here: global response normalization inside each block instead of a layer scale after it. Each channel is scaled by its
norm relative to the mean norm of all channels, which makes channels compete and avoids redundant features. It addresses
the feature collapse of ConvNeXt in masked-autoencoder pretraining.

Initialization: as ConvNeXt; the response normalization starts as the identity.
Shapes: B batch, C channels, H W height and width, D width of a level; level c2 is at H/4, c5 at H/32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.convolutional import convnext
from fieldguide.models.convolutional.convnext import Config
from fieldguide.models.layers.classifier_head import OUTPUT_TYPES
from fieldguide.models.layers.stochastic_depth import DropPath
from fieldguide.models.mapping.key_rules import Reshaped, Row, strip_prefix


class ResponseNorm(nn.Module):
    """Global response normalization: scales each channel by its spatial norm relative to the mean of all D (section 3)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim)), eps

    def forward(self, x: Tensor) -> Tensor:  # B H W D -> B H W D
        length = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)  # B 1 1 D
        gain = self.weight * (length / (length.mean(-1, keepdim=True) + self.eps)) + 1
        return torch.addcmul(self.bias, x, gain)  # the residual is included in the gain: one pass over the map


class Block(nn.Module):
    """Depthwise 7x7 convolution, layer norm, expansion by four, GELU, response norm, projection."""

    def __init__(self, dim: int, drop_path: float):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.up = nn.Linear(dim, 4 * dim)
        self.response = ResponseNorm(4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.response.weight)
        nn.init.zeros_(self.response.bias)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))  # B H W D, the memory layout
        y = self.down(self.response(F.gelu(self.up(y))))
        return self.drop_path(y.permute(0, 3, 1, 2)) + x


class ConvNeXtV2(convnext.ConvNeXt):
    """ConvNeXt V2 classifier for images of at least 8 patches per side. `features` returns the map of each level."""

    block = Block


def drop_layer_scale(table: Mapping[str, Row]) -> dict[str, Row]:
    return {theirs: ours for theirs, ours in table.items() if not str(ours).endswith("gamma")}


def response_norm_rows(weight: str, bias: str) -> dict[str, Reshaped]:
    """Return key rules for parameters that are stored as 1 x 1 x 1 x D."""
    return {
        public: Reshaped(f"stages.{{s}}.{{b}}.response.{kind}", (-1,), (1, 1, 1, -1))
        for public, kind in ((weight, "weight"), (bias, "bias"))
    }


def timm(config: Config) -> dict[str, Row]:
    """Return the key table of timm, whose sizes below Tiny have 1x1 convolutions instead of dense layers."""
    ones = (1, 1) if config.widths[0] < 96 else ()
    table: dict[str, Row] = {"stages.{s}.blocks.{b}.mlp.grn.*": "stages.{s}.{b}.response.*"}
    for s, dim in enumerate(config.widths):
        for public, part, inputs in (("fc1", "up", dim), ("fc2", "down", 4 * dim)):
            table[f"stages.{s}.blocks.{{b}}.mlp.{public}.weight"] = Reshaped(
                f"stages.{s}.{{b}}.{part}.weight", (-1, inputs), (-1, inputs, *ones)
            )
    return table | drop_layer_scale(convnext.TIMM)


AUTHORS = drop_layer_scale(convnext.AUTHORS) | response_norm_rows("stages.{s}.{b}.grn.gamma", "stages.{s}.{b}.grn.beta")
HUGGINGFACE = {
    theirs.replace("convnext.", "convnextv2."): ours for theirs, ours in drop_layer_scale(convnext.HUGGINGFACE).items()
} | response_norm_rows(
    "convnextv2.encoder.stages.{s}.layers.{b}.grn.weight", "convnextv2.encoder.stages.{s}.layers.{b}.grn.bias"
)

CARD = Card(
    name="convnextv2",
    model=ConvNeXtV2,
    config=Config,
    paper="arXiv:2301.00808",
    year=2023,
    input_type="image",
    output_type=OUTPUT_TYPES,
    adapt=lambda need: convnext.adapt_to_image_size(need["image"]),
    sizes={
        "convnextv2-tiny": Size(drop_path=0.2, params=28_635_496, source="timm"),
        "convnextv2-atto": Size(depths=(2, 2, 6, 2), widths=(40, 80, 160, 320), params=3_708_400, source="timm"),
        "convnextv2-femto": Size(depths=(2, 2, 6, 2), widths=(48, 96, 192, 384), params=5_233_240, source="timm"),
        "convnextv2-pico": Size(depths=(2, 2, 6, 2), widths=(64, 128, 256, 512), params=9_066_280, source="timm"),
        "convnextv2-nano": Size(depths=(2, 2, 8, 2), widths=(80, 160, 320, 640), params=15_623_800, source="timm"),
        "convnextv2-base": Size(depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024), params=88_717_800, source="timm"),
        "convnextv2-large": Size(
            depths=(3, 3, 27, 3), widths=(192, 384, 768, 1536), drop_path=0.2, params=197_956_840, source="timm"
        ),
        "convnextv2-huge": Size(
            depths=(3, 3, 27, 3), widths=(352, 704, 1408, 2816), drop_path=0.3, params=660_289_640, source="timm"
        ),
        "convnextv2-test": Size(patch=2, depths=(1, 2, 1), widths=(8, 12, 16), drop_path=0.0, num_classes=5),
    },
    weights={
        "timm": timm,
        "authors": AUTHORS,
        "huggingface": HUGGINGFACE,
        "huggingface-base": strip_prefix(HUGGINGFACE, "convnextv2."),
    },
    configs={"huggingface": convnext.config_rules("convnextv2", "ConvNextV2")},
    aliases={
        "timm": {
            f"convnextv2_{size}": f"convnextv2-{size}"
            for size in ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
        }
    },
    # As for ConvNeXt.
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.1, "label_smoothing": 0.1},
)

"""StyleGAN 2 discriminator: a residual critic with smooth halvings (Karras et al. 2019, arXiv:1912.04958).

New here: residual blocks instead of progressive growing (section 4). Each block filters before it halves the side. Before the
last convolution, a map shows how much the images of a small group differ. With classes, the score is the product of the
features with a mapped class ("projection", Karras et al. 2020, arXiv:2006.06676, appendix C). It returns an unbounded score.

Initialization: N(0, 1), scaled when used (`layers.equalized_lr`); biases zero.
Shapes: B batch, C channels, K classes, S side of an image, D channels of a map, H its side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.adversarial.dcgan_discriminator import count_halvings
from fieldguide.models.layers.equalized_lr import EqualizedConv2d, EqualizedLinear
from fieldguide.models.layers.minibatch_stddev import MinibatchStddev
from fieldguide.models.layers.style_mapping import StyleMapping, normalize
from fieldguide.models.layers.upfirdn import upfirdn
from fieldguide.models.mapping.key_rules import Dropped

TAPS = (0.125, 0.375, 0.375, 0.125)  # of the filter before a side is halved


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    num_classes: int = 0  # K
    image: int = 1024  # S
    style: int = 512  # width of the vector of a class
    depth: int = 8  # dense layers between a class and its vector
    dim: int = 512  # channels of the widest maps
    base: int = 32768  # maps of side H have base / H channels, at most `dim`
    group: int = 4  # images whose differences are measured together


def count_widths(image: int, base: int, widest: int) -> tuple[list[int], list[int]]:
    """Return the sides of the maps, from the smallest, and their channels."""
    count, first = count_halvings(image)
    if not count:
        raise SettingsError(f"image={image} is too small: images need at least 8 pixels per side")
    sides = [first << i for i in range(count + 1)]
    # Widths are those of the power of 2 at or below each side.
    return sides, [max(1, min(base >> (side.bit_length() - 1), widest)) for side in sides]


def leak(x: Tensor) -> Tensor:
    return math.sqrt(2) * F.leaky_relu(x, 0.2)


class Block(nn.Module):
    """Two 3x3 convolutions, the second of half the side, plus the halved input, convolved 1x1; divided by sqrt(2)."""

    taps: Tensor

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv0 = EqualizedConv2d(inputs, inputs, 3, padding=1)
        self.conv1 = EqualizedConv2d(inputs, outputs, 3, stride=2)
        self.skip = EqualizedConv2d(inputs, outputs, 1, bias=False)
        self.register_buffer("taps", torch.tensor(TAPS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # B D H H -> B D' H/2 H/2
        even = [side - side % 2 for side in x.shape[2:]]
        x = x[:, :, : even[0], : even[1]]
        y = leak(self.conv1(upfirdn(leak(self.conv0(x)), self.taps, padding=(2, 2))))
        return (y + self.skip(upfirdn(x, self.taps, down=2, padding=(1, 1)))) / math.sqrt(2)


class Discriminator(nn.Module):
    """StyleGAN 2 critic: an image, optionally with K channels that hold its one-hot class -> a score, high for real images.

    Raises `SettingsError` if `image` is below 8, and `DataError` for images of another side.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        sides, widths = count_widths(config.image, config.base, config.dim)
        self.from_image = EqualizedConv2d(config.channels, widths[-1], 1)
        self.blocks = nn.ModuleList(Block(widths[i], widths[i - 1]) for i in range(len(widths) - 1, 0, -1))
        self.stddev = MinibatchStddev(config.group)
        self.conv = EqualizedConv2d(widths[0] + 1, widths[0], 3, padding=1)
        self.dense = EqualizedLinear(widths[0] * sides[0] ** 2, widths[0])
        self.last = EqualizedLinear(widths[0], config.style if config.num_classes else 1)
        self.mapping = StyleMapping(0, config.num_classes, config.style, config.depth) if config.num_classes else None

    def forward(self, x: Tensor) -> Tensor:  # B C+K S S, or B C S S without a class -> B 1
        x, label = x[:, : self.config.channels], x[:, self.config.channels :]
        if x.shape[2:] != (self.config.image, self.config.image):
            raise DataError(
                f"the images have {x.shape[3]} x {x.shape[2]} pixels, but the network was created for image={self.config.image}"
            )
        x = leak(self.from_image(x))
        for block in self.blocks:
            x = block(x)
        x = leak(self.conv(self.stddev(x)))
        score = self.last(leak(self.dense(x.flatten(1))))
        if self.mapping is None:
            return score
        label = label[:, :, 0, 0] if label.shape[1] else score.new_zeros(x.shape[0], self.config.num_classes)
        return (score * normalize(self.mapping(label))).sum(1, keepdim=True) / math.sqrt(self.config.style)


def nvidia(config: Config) -> dict[str, Any]:
    """Return the names of the files of NVIDIA's stylegan2-ada-pytorch and stylegan3 (`D.state_dict()`)."""
    sides = count_widths(config.image, config.base, config.dim)[0]
    filters = Dropped("the filter is a constant")
    table: dict[str, Any] = {
        f"b{sides[-1]}.fromrgb.*": "from_image.*",
        f"b{sides[-1]}.fromrgb.resample_filter": filters,
        "mapping.embed.*": "mapping.embed.*",
        "mapping.fc{i}.*": "mapping.layers.{i}.*",
        f"b{sides[0]}.conv.*": "conv.*",
        f"b{sides[0]}.conv.resample_filter": filters,
        f"b{sides[0]}.fc.*": "dense.*",
        f"b{sides[0]}.out.*": "last.*",
    }
    for i, side in enumerate(reversed(sides[1:])):
        table |= {f"b{side}.{name}.resample_filter": filters for name in ("conv0", "conv1", "skip")}
        table |= {f"b{side}.resample_filter": filters}
        table |= {f"b{side}.{name}.*": f"blocks.{i}.{name}.*" for name in ("conv0", "conv1", "skip")}
    return table


def rosinality(config: Config) -> dict[str, Any]:
    """Return the names of the files of rosinality's stylegan2-pytorch (`d`)."""
    kernels = Dropped("the filter is a constant")
    table: dict[str, Any] = {
        "convs.0.0.weight": "from_image.weight",
        "convs.0.1.bias": "from_image.bias",
        "final_conv.0.weight": "conv.weight",
        "final_conv.1.bias": "conv.bias",
        "final_linear.0.*": "dense.*",
        "final_linear.1.*": "last.*",
        "mapping.embed.*": "mapping.embed.*",  # of classes, which its networks do not have
        "mapping.layers.{i}.*": "mapping.layers.{i}.*",
    }
    for i in range(len(count_widths(config.image, config.base, config.dim)[0]) - 1):
        table |= {
            f"convs.{i + 1}.conv1.0.weight": f"blocks.{i}.conv0.weight",
            f"convs.{i + 1}.conv1.1.bias": f"blocks.{i}.conv0.bias",
            f"convs.{i + 1}.conv2.0.kernel": kernels,
            f"convs.{i + 1}.conv2.1.weight": f"blocks.{i}.conv1.weight",
            f"convs.{i + 1}.conv2.2.bias": f"blocks.{i}.conv1.bias",
            f"convs.{i + 1}.skip.0.kernel": kernels,
            f"convs.{i + 1}.skip.1.weight": f"blocks.{i}.skip.weight",
        }
    return table


RECIPE: Mapping[str, Any] = {"optimizer": "adamw", "lr": 2.5e-3, "beta1": 0.0, "beta2": 0.99, "weight_decay": 0.0}

CARD = Card(
    name="stylegan2-discriminator",
    model=Discriminator,
    config=Config,
    paper="arXiv:1912.04958",
    year=2019,
    input_type="image",
    output_type="score",
    sizes={
        "stylegan2-discriminator-1024": Size(params=29_012_513, source="NVlabs/stylegan2-ada-pytorch"),
        "stylegan2-discriminator-256": Size(image=256, base=16384, params=24_001_089, source="NVlabs/stylegan2-ada-pytorch"),
        "stylegan2-discriminator-32": Size(image=32, source="NVlabs/stylegan2-ada-pytorch, for CIFAR-10"),
        "stylegan2-discriminator-mini": Size(image=32, style=64, depth=2, dim=64, base=1024),
        "stylegan2-discriminator-test": Size(num_classes=3, image=17, style=5, depth=2, dim=4, base=48, channels=2),
    },
    weights={"nvidia": nvidia, "rosinality": rosinality},
    recipe=RECIPE,
)

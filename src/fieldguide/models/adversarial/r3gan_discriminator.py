"""R3GAN discriminator: a critic of grouped convolutions without norms (Huang et al. 2024, arXiv:2501.05441).

New here: the blocks of ResNeXt with inverted bottlenecks and without normalization, which start as identities ("Fix-Up"), take
the place of StyleGAN's tricks: no group deviation, no equalized learning rate. A relativistic loss with R1 and R2 makes training
stable by itself. With classes, the score is the product of the features with the vector of the class. It returns an unbounded
score.

Initialization: He et al. 2015 (arXiv:1502.01852) for leaky ReLU, divided by the fourth root of the number of blocks in the first
two convolutions of a block; the third is zero; biases zero (section 3.3).
Shapes: B batch, C channels, K classes, S side of an image, D channels of a map, H its side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError
from fieldguide.models.adversarial.stylegan2_discriminator import count_widths
from fieldguide.models.layers.upfirdn import upfirdn
from fieldguide.models.mapping.key_rules import Dropped

TAPS = (0.125, 0.375, 0.375, 0.125)  # of the filter that smooths whatever is resampled
LEAK_GAIN = math.sqrt(2 / (1 + 0.2**2))  # keeps the variance through a leaky ReLU of slope 0.2


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    num_classes: int = 0  # K
    image: int = 256  # S
    dim: int = 768  # channels of the widest maps
    base: int = 24576  # maps of side H have base / H channels, at most `dim`
    depth: int = 2  # blocks of each resolution
    expansion: int = 2  # channels inside of a block / outside
    group: int = 16  # channels inside of a block that are convolved together


def init_conv(layer: nn.Conv2d, gain: float = 1.0) -> nn.Conv2d:
    """Initialize a convolution without bias, and return it."""
    nn.init.normal_(layer.weight, 0.0, gain / math.sqrt(layer.weight[0].numel()))
    return layer


class Block(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolution, with bias and leaky ReLU in between, plus the input."""

    def __init__(self, dim: int, config: Any, blocks: int):
        super().__init__()
        inner, gain = dim * config.expansion, LEAK_GAIN * blocks**-0.25
        self.conv1 = init_conv(nn.Conv2d(dim, inner, 1, bias=False), gain)
        self.bias1 = nn.Parameter(torch.zeros(inner))
        groups = math.gcd(inner, max(1, inner // config.group))
        self.conv2 = init_conv(nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=False), gain)
        self.bias2 = nn.Parameter(torch.zeros(inner))
        self.conv3 = nn.Conv2d(inner, dim, 1, bias=False)
        nn.init.zeros_(self.conv3.weight)

    def forward(self, x: Tensor) -> Tensor:  # B D H H -> B D H H
        y = F.leaky_relu(self.conv1(x) + self.bias1[:, None, None], 0.2)
        y = F.leaky_relu(self.conv2(y) + self.bias2[:, None, None], 0.2)
        return x + self.conv3(y)


class Stage(nn.Module):
    """The blocks of a resolution, then half of the side."""

    taps: Tensor

    def __init__(self, inputs: int, outputs: int, config: Config, blocks: int):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(inputs, config, blocks) for _ in range(config.depth)))
        self.conv = init_conv(nn.Conv2d(inputs, outputs, 1, bias=False)) if inputs != outputs else nn.Identity()
        self.register_buffer("taps", torch.tensor(TAPS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # B D H H -> B D' H/2 H/2
        even = [side - side % 2 for side in x.shape[2:]]
        x = self.blocks(x[:, :, : even[0], : even[1]])
        return self.conv(upfirdn(x, self.taps, down=2, padding=(1, 1)))


class Discriminator(nn.Module):
    """R3GAN critic: an image, optionally with K channels that hold its one-hot class -> a score, high for real images.

    Raises `SettingsError` if `image` is below 8, and `DataError` for images of another side.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        sides, widths = count_widths(config.image, config.base, config.dim)
        blocks = config.depth * len(sides)
        self.first = init_conv(nn.Conv2d(config.channels, widths[-1], 1, bias=False))
        self.stages = nn.ModuleList(Stage(widths[i], widths[i - 1], config, blocks) for i in range(len(widths) - 1, 0, -1))
        self.blocks = nn.Sequential(*(Block(widths[0], config, blocks) for _ in range(config.depth)))
        self.basis = init_conv(nn.Conv2d(widths[0], widths[0], sides[0], groups=widths[0], bias=False))
        outputs = config.dim if config.num_classes else 1
        self.last = nn.Linear(widths[0], outputs, bias=False)
        nn.init.normal_(self.last.weight, 0.0, 1 / math.sqrt(widths[0]))
        self.embed = nn.Linear(config.num_classes, outputs, bias=False) if config.num_classes else None
        if self.embed is not None:
            nn.init.normal_(self.embed.weight, 0.0, 1 / math.sqrt(config.num_classes * outputs))

    def forward(self, x: Tensor) -> Tensor:  # B C+K S S, or B C S S without a class -> B 1
        x, label = x[:, : self.config.channels], x[:, self.config.channels :]
        if x.shape[2:] != (self.config.image, self.config.image):
            raise DataError(
                f"the images have {x.shape[3]} x {x.shape[2]} pixels, but the network was created for image={self.config.image}"
            )
        x = self.first(x)
        for stage in self.stages:
            x = stage(x)
        score = self.last(self.basis(self.blocks(x)).flatten(1))
        if self.embed is None:
            return score
        label = label[:, :, 0, 0] if label.shape[1] else score.new_zeros(x.shape[0], self.config.num_classes)
        return (score * self.embed(label)).sum(1, keepdim=True)


BLOCK = {
    "LinearLayer{k}.Layer.weight": "conv{k}.weight",
    "NonLinearity{k}.Bias": "bias{k}",
}  # names of a block in the authors' files


def authors(config: Config) -> dict[str, Any]:
    """Return the names of the authors' files (`D.state_dict()`)."""
    last = len(count_widths(config.image, config.base, config.dim)[0]) - 1
    table: dict[str, Any] = {
        "Model.ExtractionLayer.Layer.weight": "first.weight",
        f"Model.MainLayers.{last}.Layers.{config.depth}.Basis.weight": "basis.weight",
        f"Model.MainLayers.{last}.Layers.{config.depth}.LinearLayer.weight": "last.weight",
        "Model.EmbeddingLayer.weight": "embed.weight",
    }
    for i in range(last + 1):
        theirs, ours = f"Model.MainLayers.{i}.Layers", f"stages.{i}.blocks" if i < last else "blocks"
        for b in range(config.depth):
            table |= {f"{theirs}.{b}.{name}": f"{ours}.{b}.{own}" for name, own in BLOCK.items()}
        if i < last:
            table[f"{theirs}.{config.depth}.LinearLayer.Layer.weight"] = f"stages.{i}.conv.weight"
            table[f"{theirs}.{config.depth}.Resampler.Kernel"] = Dropped("the filter is a constant")
    return table


CARD = Card(
    name="r3gan-discriminator",
    model=Discriminator,
    config=Config,
    paper="arXiv:2501.05441",
    year=2024,
    input_type="image",
    output_type="score",
    sizes={
        "r3gan-discriminator-256": Size(params=23_009_568, source="the authors' code for FFHQ-256, counted"),
        "r3gan-discriminator-64": Size(image=64, params=22_381_440, source="the authors' code for FFHQ-64, counted"),
        "r3gan-discriminator-32": Size(image=32, params=20_683_776, source="the authors' code for CIFAR-10, counted"),
        "r3gan-discriminator-mini": Size(image=32, dim=64, base=1024, depth=1),
        "r3gan-discriminator-test": Size(num_classes=3, image=17, dim=8, base=64, depth=2, group=4, channels=2),
    },
    weights={"authors": authors},
    recipe={"optimizer": "adamw", "lr": 2e-4, "beta1": 0.0, "beta2": 0.9, "weight_decay": 0.0},
)

"""R3GAN: a generator of grouped-convolution blocks without norms (Huang et al. 2024, arXiv:2501.05441).

New here: a regularized relativistic loss makes tricks unnecessary, so that the generator is that of a plain modern network: noise
weights learned 4 x 4 maps, and each resolution has residual blocks of 1x1, grouped 3x3 and 1x1 convolutions that start as
identities. There are no styles, no noise for pixels, no sum of images, no norms. The critic is `r3gan-discriminator`, built alike.

Initialization: He et al. 2015 (arXiv:1502.01852) for leaky ReLU, divided by the fourth root of the number of blocks in the first
two convolutions of a block; the third is zero; biases zero; first maps N(0, 1) (section 3.3).
Shapes: B batch, Z noise, K classes, C channels, S side of an image, D channels of a map, H its side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.adversarial.r3gan_discriminator import BLOCK, TAPS, Block, Discriminator, init_conv
from fieldguide.models.adversarial.stylegan2_discriminator import count_widths
from fieldguide.models.layers.upfirdn import upfirdn
from fieldguide.models.mapping.key_rules import Dropped

__all__ = ["CARD", "Config", "Discriminator", "Generator"]


@dataclass(frozen=True, kw_only=True)
class Config:
    noise: int = 64  # Z + K: the last K values are the class, one-hot; all zero = no class
    num_classes: int = 0  # K
    embed: int = 64  # width of the vector of a class
    channels: int = 3  # C
    image: int = 256  # S: 4, 5, 6 or 7 times a power of 2
    dim: int = 768  # channels of the widest maps
    base: int = 24576  # maps of side H have base / H channels, at most `dim`
    depth: int = 2  # blocks of each resolution
    expansion: int = 2  # channels inside of a block / outside
    group: int = 16  # channels inside of a block that are convolved together


class Stage(nn.Module):
    """Twice the side, then the blocks of a resolution."""

    taps: Tensor

    def __init__(self, inputs: int, outputs: int, config: Config, blocks: int):
        super().__init__()
        self.conv = init_conv(nn.Conv2d(inputs, outputs, 1, bias=False)) if inputs != outputs else nn.Identity()
        self.blocks = nn.Sequential(*(Block(outputs, config, blocks) for _ in range(config.depth)))
        self.register_buffer("taps", torch.tensor(TAPS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # B D H H -> B D' 2H 2H
        return self.blocks(upfirdn(self.conv(x), self.taps, up=2, padding=(2, 1), gain=4.0))


class Generator(nn.Module):
    """R3GAN generator: noise -> images, about -1 .. 1. Raises `SettingsError` for a side that doubling cannot reach."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        sides, widths = count_widths(config.image, config.base, config.dim)
        if sides[-1] != config.image:
            more = sides[0] + 1 << len(sides) - 1
            raise SettingsError(f"image={config.image} must be 4, 5, 6 or 7 times a power of 2: choose {sides[-1]} or {more}")
        if config.noise <= config.num_classes:
            raise SettingsError(f"noise={config.noise} must be larger than num_classes={config.num_classes}, which it includes")
        blocks, noise = config.depth * len(sides), config.noise - config.num_classes
        self.embed = nn.Linear(config.num_classes, config.embed, bias=False) if config.num_classes else None
        if self.embed is not None:
            nn.init.normal_(self.embed.weight, 0.0, 1 / math.sqrt(config.num_classes))
        self.basis = nn.Parameter(nn.init.normal_(torch.empty(widths[0], sides[0], sides[0])))
        inputs = noise + (config.embed if config.num_classes else 0)
        self.first = nn.Linear(inputs, widths[0], bias=False)
        nn.init.normal_(self.first.weight, 0.0, 1 / math.sqrt(inputs))
        self.blocks = nn.Sequential(*(Block(widths[0], config, blocks) for _ in range(config.depth)))
        self.stages = nn.ModuleList(Stage(a, b, config, blocks) for a, b in pairwise(widths))
        self.last = init_conv(nn.Conv2d(widths[-1], config.channels, 1, bias=False))

    def forward(self, z: Tensor) -> Tensor:  # B Z+K -> B C S S
        if self.embed is not None:
            split = z.shape[1] - self.config.num_classes
            z = torch.cat([z[:, :split], self.embed(z[:, split:])], 1)
        x = self.blocks(self.basis * self.first(z)[:, :, None, None])
        for stage in self.stages:
            x = stage(x)
        return self.last(x)


def authors(config: Config) -> dict[str, Any]:
    """Return the names of the authors' files (`G_ema.state_dict()`)."""
    table: dict[str, Any] = {
        "Model.MainLayers.0.Layers.0.Basis": "basis",
        "Model.MainLayers.0.Layers.0.LinearLayer.weight": "first.weight",
        "Model.AggregationLayer.Layer.weight": "last.weight",
        "Model.EmbeddingLayer.weight": "embed.weight",
    }
    for i in range(len(count_widths(config.image, config.base, config.dim)[0])):
        theirs, ours = f"Model.MainLayers.{i}.Layers", f"stages.{i - 1}.blocks" if i else "blocks"
        for b in range(config.depth):
            table |= {f"{theirs}.{b + 1}.{name}": f"{ours}.{b}.{own}" for name, own in BLOCK.items()}
        if i:
            table[f"{theirs}.0.LinearLayer.Layer.weight"] = f"stages.{i - 1}.conv.weight"
            table[f"{theirs}.0.Resampler.Kernel"] = Dropped("the filter is a constant")
    return table


CARD = Card(
    name="r3gan",
    model=Generator,
    config=Config,
    paper="arXiv:2501.05441",
    year=2024,
    input_type="noise",
    output_type="image",
    sizes={
        "r3gan-256": Size(params=23_057_952, source="the authors' code for FFHQ-256, counted"),
        "r3gan-64": Size(image=64, params=22_429_824, source="the authors' code for FFHQ-64, counted"),
        "r3gan-32": Size(image=32, params=20_732_160, source="the authors' code for CIFAR-10, counted"),
        "r3gan-mini": Size(image=32, dim=64, base=1024, depth=1),
        "r3gan-test": Size(noise=8, num_classes=3, embed=4, image=20, dim=8, base=40, group=4, channels=2),
    },
    weights={"authors": authors},
    recipe={
        "loss": "relativistic",
        "penalty": "r1r2",
        "penalty_weight": 0.05,
        "optimizer": "adamw",
        "lr": 2e-4,
        "beta1": 0.0,
        "beta2": 0.9,
        "weight_decay": 0.0,
        "grad_clip": 0.0,
        "warmup": 0.0,
        "schedule": "cosine",
        "ema": 0.999,
    },  # table 7 of the paper for CIFAR-10, whose rate and penalty fall along a cosine
    adapt=lambda need: {"noise": Config.noise + need["num_classes"]} if need.get("num_classes") else {},  # plus a one-hot class
    parts={"critic": "r3gan-discriminator"},
)

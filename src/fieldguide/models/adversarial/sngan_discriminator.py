"""SNGAN discriminator: a residual critic with spectral normalization (Miyato et al. 2018, arXiv:1802.05957).

New here: every weight is divided by its largest singular value, so that the score changes at most as fast as the image. With
classes, the score is that of the image plus the product of its features with a vector of the class ("projection", Miyato and
Koyama 2018, arXiv:1802.05637, equation 3). It returns an unbounded score, for the hinge loss.

Initialization: Glorot uniform, with a gain of sqrt(2) for the 3x3 convolutions; biases zero.
Shapes: B batch, C channels, K classes, S side of an image, D channels of a map, H W its sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.adversarial.dcgan_discriminator import count_halvings
from fieldguide.models.layers.spectral_norm import spectral_norm

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)
HALVINGS = 2  # of the critic of equal widths; its other blocks keep the side


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    num_classes: int = 0  # K
    image: int = 32  # S, which determines the number of blocks
    dim: int = 128  # channels of the first block
    widens: bool = False  # each block but the first doubles the channels and halves the side


def glorot(layer: Layer, gain: float = 1.0) -> Layer:
    """Initialize a layer as in the paper, and return it."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """ReLU, 3x3 convolution, twice; plus the input, convolved 1x1 where the shape changes. Then the side may be halved.

    The first block of a network has no ReLU before its first convolution, and halves the input before it is convolved 1x1.
    """

    def __init__(self, inputs: int, outputs: int, *, halves: bool, first: bool = False):
        super().__init__()
        self.halves, self.first = halves, first
        hidden = outputs if first else inputs
        self.c1 = spectral_norm(glorot(nn.Conv2d(inputs, hidden, 3, padding=1), math.sqrt(2)))
        self.c2 = spectral_norm(glorot(nn.Conv2d(hidden, outputs, 3, padding=1), math.sqrt(2)))
        self.c_sc = spectral_norm(glorot(nn.Conv2d(inputs, outputs, 1))) if halves or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W, or half of the side
        y = self.c2(F.relu(self.c1(x if self.first else F.relu(x))))
        if self.first:
            return F.avg_pool2d(y, 2) + self.c_sc(F.avg_pool2d(x, 2))
        y = y + self.c_sc(x)
        return F.avg_pool2d(y, 2) if self.halves else y


class Discriminator(nn.Module):
    """SNGAN critic: an image, optionally with K channels that hold its one-hot class -> a score, high for real images."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        count = count_halvings(config.image)[0] + 1
        widths = [config.dim << i if config.widens else config.dim for i in range(count)]
        self.blocks = nn.ModuleList([Block(config.channels, widths[0], halves=True, first=True)])
        for i in range(1, count):
            self.blocks.append(Block(widths[i - 1], widths[i], halves=config.widens or i < HALVINGS))
        self.last = spectral_norm(glorot(nn.Linear(widths[-1], 1)))
        if config.num_classes:
            self.l_y = spectral_norm(glorot(nn.Linear(widths[-1], config.num_classes, bias=False)))

    def forward(self, x: Tensor) -> Tensor:  # B C+K S S, or B C S S without a class -> B 1
        x, label = x[:, : self.config.channels], x[:, self.config.channels :]
        for block in self.blocks:
            x = block(x)
        features = F.relu(x).sum((2, 3))
        score = self.last(features)
        if self.config.num_classes and label.shape[1]:
            score = score + torch.sum(self.l_y(features) * label[:, :, 0, 0], 1, keepdim=True)
        return score


CARD = Card(
    name="sngan-discriminator",
    model=Discriminator,
    config=Config,
    paper="arXiv:1802.05957",
    year=2018,
    input_type="image",
    output_type="score",
    sizes={
        "sngan-discriminator-32": Size(params=1_053_825, source="torch-mimicry; the paper's table 4"),
        "sngan-discriminator-64": Size(image=64, dim=64, widens=True, params=10_141_441, source="torch-mimicry, counted"),
        "sngan-discriminator-test": Size(num_classes=3, image=17, dim=4, widens=True, channels=2),
    },
    recipe={"optimizer": "adamw", "lr": 2e-4, "beta1": 0.0, "beta2": 0.9, "weight_decay": 0.0},
    # Images of more than 32 pixels get the critic of sngan-64.
    adapt=lambda need: {"dim": 64, "widens": True} if need.get("image", 0) > 32 else {},
)

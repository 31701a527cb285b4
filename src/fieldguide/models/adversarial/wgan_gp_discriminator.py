"""WGAN-GP discriminator: a residual critic without any norm (Gulrajani et al. 2017, arXiv:1704.00028).

New here: no batch norm, since the gradient penalty is one of each image by itself and batch norm makes scores depend on the
other images of a batch (section 4). Residual blocks halve the side twice; the mean over places gives an unbounded score.

Initialization: Glorot uniform, with a gain of sqrt(2) for the 3x3 convolutions; biases zero.
Shapes: B batch, C channels, S side of an image, D channels of a map, H W its sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.adversarial.dcgan_discriminator import count_halvings
from fieldguide.models.adversarial.sngan_discriminator import HALVINGS, glorot


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    image: int = 32  # S, which determines the number of blocks
    dim: int = 128  # channels of all maps


class FirstBlock(nn.Module):
    """3x3 convolution, ReLU, 3x3 convolution, half of the side; plus the halved input, convolved 1x1."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.c1 = glorot(nn.Conv2d(inputs, outputs, 3, padding=1), math.sqrt(2))
        self.c2 = glorot(nn.Conv2d(outputs, outputs, 3, padding=1), math.sqrt(2))
        self.c_sc = glorot(nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B D H/2 W/2
        return F.avg_pool2d(self.c2(F.relu(self.c1(x))), 2) + self.c_sc(F.avg_pool2d(x, 2))


class Block(nn.Module):
    """ReLU, 3x3 convolution, twice; plus the input. If the side is halved, the input is convolved 1x1 first."""

    def __init__(self, dim: int, *, halves: bool):
        super().__init__()
        self.halves = halves
        self.c1 = glorot(nn.Conv2d(dim, dim, 3, padding=1), math.sqrt(2))
        self.c2 = glorot(nn.Conv2d(dim, dim, 3, padding=1), math.sqrt(2))
        self.c_sc = glorot(nn.Conv2d(dim, dim, 1)) if halves else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W, or half of the side
        y = self.c2(F.relu(self.c1(F.relu(x)))) + self.c_sc(x)
        return F.avg_pool2d(y, 2) if self.halves else y


class Discriminator(nn.Module):
    """WGAN-GP critic: an image -> a score, high for real images."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        count = count_halvings(config.image)[0]
        rest = [Block(config.dim, halves=i < HALVINGS) for i in range(1, count + 1)]
        self.blocks = nn.Sequential(FirstBlock(config.channels, config.dim), *rest)
        self.last = glorot(nn.Linear(config.dim, 1))

    def forward(self, x: Tensor) -> Tensor:  # B C S S -> B 1
        return self.last(F.relu(self.blocks(x)).mean((2, 3)))


CARD = Card(
    name="wgan-gp-discriminator",
    model=Discriminator,
    config=Config,
    paper="arXiv:1704.00028",
    year=2017,
    input_type="image",
    output_type="score",
    sizes={
        "wgan-gp-discriminator-32": Size(params=1_053_825, source="the authors' code for CIFAR-10, counted; torch-mimicry"),
        "wgan-gp-discriminator-test": Size(image=17, dim=4, channels=2),
    },
    recipe={"optimizer": "adamw", "lr": 2e-4, "beta1": 0.0, "beta2": 0.9, "weight_decay": 0.0},
    adapt=lambda need: {"channels": need["channels"] + need.get("num_classes", 0)},  # plus one channel per class
)

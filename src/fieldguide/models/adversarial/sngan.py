"""SNGAN: a residual image generator for a spectrally normalized critic (Miyato et al. 2018, arXiv:1802.05957).

New here: the critic, `sngan-discriminator`, is kept Lipschitz by spectral normalization of every weight instead of a gradient
penalty. The generator is that of WGAN-GP (Gulrajani et al. 2017, arXiv:1704.00028): residual blocks that double the side,
with batch norm before each convolution. With classes, each class has a scale and a shift for every norm (Miyato and Koyama
2018, arXiv:1802.05637, appendix A).

Initialization: Glorot uniform, with a gain of sqrt(2) for the 3x3 convolutions of the blocks; biases zero; scales of classes
N(1, 0.02), shifts zero.
Shapes: B batch, Z noise, K classes, C channels, S side of an image, D channels of a map, H W its sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.adversarial.dcgan_discriminator import count_halvings
from fieldguide.models.adversarial.sngan_discriminator import Discriminator, glorot

__all__ = ["CARD", "Config", "Discriminator", "Generator"]


@dataclass(frozen=True, kw_only=True)
class Config:
    noise: int = 128  # Z + K: the last K values are the class, one-hot; all zero = no class
    num_classes: int = 0  # K
    channels: int = 3  # C
    image: int = 32  # S: 4, 5, 6 or 7 times a power of 2
    dim: int = 256  # channels of the first, smallest map
    narrows: bool = False  # each block halves the channels


class ClassNorm(nn.Module):
    """Batch norm with a scale and a shift per class; without classes, ordinary batch norm."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim, affine=not num_classes)
        self.embed: nn.Linear | None = None  # scale - 1 and shift, so that no class means neither
        if num_classes:
            self.embed = nn.Linear(num_classes, 2 * dim, bias=False)
            nn.init.normal_(self.embed.weight[:dim], 0.0, 0.02)
            nn.init.zeros_(self.embed.weight[dim:])

    def forward(self, x: Tensor, label: Tensor) -> Tensor:  # B D H W, B K -> B D H W
        x = self.norm(x)
        if self.embed is None:
            return x
        scale, shift = self.embed(label)[:, :, None, None].chunk(2, 1)
        return x * (1 + scale) + shift


class Block(nn.Module):
    """Norm, ReLU, double the side, 3x3 convolution, norm, ReLU, 3x3 convolution; plus the doubled input, convolved 1x1."""

    def __init__(self, inputs: int, outputs: int, num_classes: int):
        super().__init__()
        self.b1, self.b2 = ClassNorm(inputs, num_classes), ClassNorm(outputs, num_classes)
        self.c1 = glorot(nn.Conv2d(inputs, outputs, 3, padding=1), math.sqrt(2))
        self.c2 = glorot(nn.Conv2d(outputs, outputs, 3, padding=1), math.sqrt(2))
        self.c_sc = glorot(nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:  # B D H W, B K -> B D 2H 2W
        y = self.c1(double(F.relu(self.b1(x, label))))
        return self.c2(F.relu(self.b2(y, label))) + self.c_sc(double(x))


def double(x: Tensor) -> Tensor:  # B D H W -> B D 2H 2W
    """Repeat each pixel, as the authors' code does."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Generator(nn.Module):
    """SNGAN generator: noise -> images in -1 .. 1. Raises `SettingsError` for a side that doubling cannot reach."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        count, self.first = count_halvings(config.image)
        if not count or self.first << count != config.image:
            raise SettingsError(
                f"image={config.image} must be 4, 5, 6 or 7 times a power of 2: choose "
                f"{max(self.first << count, 8)} or {max(self.first + 1 << count, 8)}"
            )
        if config.noise <= config.num_classes:
            raise SettingsError(f"noise={config.noise} must be larger than num_classes={config.num_classes}, which it includes")
        widths = [max(1, config.dim >> i) if config.narrows else config.dim for i in range(count + 1)]
        self.l1 = glorot(nn.Linear(config.noise - config.num_classes, self.first**2 * config.dim))
        self.blocks = nn.ModuleList(Block(a, b, config.num_classes) for a, b in pairwise(widths))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.last = glorot(nn.Conv2d(widths[-1], config.channels, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:  # B Z+K -> B C S S
        width = self.l1.in_features
        z, label = z[:, :width], z[:, width:]
        x = self.l1(z).unflatten(1, (-1, self.first, self.first))
        for block in self.blocks:
            x = block(x, label)
        return torch.tanh(self.last(F.relu(self.norm(x))))


CARD = Card(
    name="sngan",
    model=Generator,
    config=Config,
    paper="arXiv:1802.05957",
    year=2018,
    input_type="noise",
    output_type="image",
    sizes={
        "sngan-32": Size(params=4_276_739, source="torch-mimicry; the paper's table 4"),
        "sngan-64": Size(image=64, dim=1024, narrows=True, params=12_220_675, source="torch-mimicry"),
        "sngan-test": Size(noise=8, num_classes=3, image=20, dim=6, narrows=True, channels=2),
    },
    recipe={
        "loss": "hinge",
        "critic_steps": 5,
        "optimizer": "adamw",
        "lr": 2e-4,
        "beta1": 0.0,
        "beta2": 0.9,
        "weight_decay": 0.0,
        "grad_clip": 0.0,
        "warmup": 0.0,
        "schedule": "linear",
        "ema": 0.999,
    },  # section 4 and appendix B of the paper, and an average of the generator
    adapt=lambda need: {"noise": Config.noise + need["num_classes"]} if need.get("num_classes") else {},  # plus a one-hot class
    parts={"critic": "sngan-discriminator"},
)

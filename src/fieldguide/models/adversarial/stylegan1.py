"""StyleGAN 1: an image generator that is steered by styles at each layer (Karras et al. 2018, arXiv:1812.04948).

New here: the input of the synthesis is a learned constant. Noise is mapped to a style by dense layers, and after each convolution
the maps are normalized for each image, and scaled and shifted by the style ("adaptive instance normalization"). Noise for each
pixel makes details. Styles of two noises are mixed in training, and truncation moves the styles of the coarse layers towards
their mean. The critic is `stylegan1-discriminator`.

The authors trained with progressive growing: the side doubles during training, and images of the last two sides are blended.
The layers for that are there with `grows`, and `synthesis(styles, growth)` makes the images; `fit` trains the whole network at
once, as StyleGAN 2 showed to be as good. The mapping, and how classes enter it, are those of StyleGAN 2.

Initialization: N(0, 1), scaled when used (`layers.equalized_lr`); first maps 1, strengths of noise and biases 0.
Shapes: B batch, Z noise, K classes, L styles (one for each convolution and the constant), W width of a style, C channels, S side
of an image, D channels of a map, H its side.
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
from fieldguide.models.adversarial.stylegan1_discriminator import TAPS, Discriminator
from fieldguide.models.adversarial.stylegan2_discriminator import count_widths
from fieldguide.models.layers.equalized_lr import EqualizedConv2d, EqualizedLinear
from fieldguide.models.layers.style_mapping import StyleMapping
from fieldguide.models.layers.upfirdn import upfirdn

__all__ = ["CARD", "Config", "Discriminator", "Generator"]

FUSED_SIDE = 128  # from this side on, the published kernels are those of a transposed convolution


@dataclass(frozen=True, kw_only=True)
class Config:
    noise: int = 512  # Z + K: the last K values are the class, one-hot; all zero = no class
    num_classes: int = 0  # K
    channels: int = 3  # C
    image: int = 1024  # S: 4, 5, 6 or 7 times a power of 2
    style: int = 512  # W
    depth: int = 8  # dense layers between noise and style
    dim: int = 512  # channels of the widest maps
    base: int = 16384  # maps of side H have base / H channels, at most `dim`
    truncated: int = 8  # layers whose styles truncation moves, from the coarsest
    grows: bool = True  # has layers to images at every resolution, of which only the last is used when all layers are


class StyledMaps(nn.Module):
    """Noise for each pixel, bias, leaky ReLU, and adaptive instance normalization: equation 1."""

    noise: Tensor

    def __init__(self, dim: int, side: int, style: int):
        super().__init__()
        self.strength, self.bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.style = EqualizedLinear(style, 2 * dim)  # scale - 1 and shift
        self.register_buffer("noise", nn.init.normal_(torch.empty(side, side)))  # in evaluation

    def forward(self, x: Tensor, w: Tensor) -> Tensor:  # B D H H, B W -> B D H H
        noise = self.noise
        if self.training:
            noise = torch.randn(x.shape[0], 1, *x.shape[2:], dtype=noise.dtype, device=x.device)
        x = x + (noise * self.strength[:, None, None]).to(x.dtype) + self.bias[:, None, None]
        x = F.instance_norm(F.leaky_relu(x, 0.2), eps=1e-8)
        scale, shift = self.style(w)[:, :, None, None].chunk(2, 1)
        return x * (1 + scale) + shift


def double(x: Tensor, weight: Tensor) -> Tensor:  # B I H H, O I 3 3 -> B O 2H 2H
    """Repeat each pixel 2 x 2 and convolve, as one transposed convolution.

    From `FUSED_SIDE` on, the kernel is mirrored: the authors use a transposed convolution there, but a correlation before.
    """
    kernel = weight if 2 * x.shape[2] >= FUSED_SIDE else weight.flip(2, 3)
    kernel = F.pad(kernel, (1, 1, 1, 1))
    kernel = kernel[:, :, 1:, 1:] + kernel[:, :, 1:, :-1] + kernel[:, :, :-1, 1:] + kernel[:, :, :-1, :-1]  # O I 4 4
    return F.conv_transpose2d(x, kernel.transpose(0, 1), stride=2, padding=1)


class Block(nn.Module):
    """Twice the side, smoothed, then another convolution; both with styles."""

    taps: Tensor

    def __init__(self, inputs: int, outputs: int, side: int, style: int):
        super().__init__()
        self.conv0 = EqualizedConv2d(inputs, outputs, 3, bias=False, gain=math.sqrt(2))
        self.maps0 = StyledMaps(outputs, side, style)
        self.conv1 = EqualizedConv2d(outputs, outputs, 3, bias=False, padding=1, gain=math.sqrt(2))
        self.maps1 = StyledMaps(outputs, side, style)
        self.register_buffer("taps", torch.tensor(TAPS), persistent=False)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:  # B D H H, B 2 W -> B D' 2H 2H
        x = upfirdn(double(x, self.conv0.weight * self.conv0.scale), self.taps, padding=(1, 1))
        x = self.maps0(x, w[:, 0])
        return self.maps1(self.conv1(x), w[:, 1])


class Synthesis(nn.Module):
    """Styles -> image."""

    def __init__(self, config: Config):
        super().__init__()
        sides, widths = count_widths(config.image, config.base, config.dim)
        self.const = nn.Parameter(torch.ones(widths[0], sides[0], sides[0]))
        self.maps0 = StyledMaps(widths[0], sides[0], config.style)
        self.conv1 = EqualizedConv2d(widths[0], widths[0], 3, bias=False, padding=1, gain=math.sqrt(2))
        self.maps1 = StyledMaps(widths[0], sides[0], config.style)
        self.blocks = nn.ModuleList(Block(a, b, side, config.style) for (a, b), side in zip(pairwise(widths), sides[1:]))
        shown = widths if config.grows else widths[-1:]
        self.to_image = nn.ModuleList(EqualizedConv2d(width, config.channels, 1) for width in shown)

    def forward(self, styles: Tensor, growth: float | None = None) -> Tensor:  # B L W -> B C S S
        """Make images. With `growth` doublings of the first side, they are smaller; a fraction blends two resolutions."""
        x = self.maps0(self.const.expand(styles.shape[0], -1, -1, -1), styles[:, 0])
        x = self.maps1(self.conv1(x), styles[:, 1])
        if growth is None:
            for i, block in enumerate(self.blocks):
                x = block(x, styles[:, 2 * i + 2 : 2 * i + 4])
            return self.to_image[-1](x)
        if len(self.to_image) == 1 or not 0 <= growth <= len(self.blocks):
            raise SettingsError(f"growth={growth} needs a network with grows=True, and must be 0 to {len(self.blocks)}")
        whole = math.floor(growth)
        for i in range(whole):
            x = self.blocks[i](x, styles[:, 2 * i + 2 : 2 * i + 4])
        image = self.to_image[whole](x)
        if whole == growth:
            return image
        finer = self.to_image[whole + 1](self.blocks[whole](x, styles[:, 2 * whole + 2 : 2 * whole + 4]))
        return F.interpolate(image, scale_factor=2.0).lerp(finer, growth - whole)


class Generator(nn.Module):
    """StyleGAN 1 generator: noise -> images, about -1 .. 1. Raises `SettingsError` for a side that doubling cannot reach."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        sides, _ = count_widths(config.image, config.base, config.dim)
        if sides[-1] != config.image:
            more = sides[0] + 1 << len(sides) - 1
            raise SettingsError(f"image={config.image} must be 4, 5, 6 or 7 times a power of 2: choose {sides[-1]} or {more}")
        if config.noise <= config.num_classes:
            raise SettingsError(f"noise={config.noise} must be larger than num_classes={config.num_classes}, which it includes")
        self.layers = 2 * len(sides)  # L
        self.mapping = StyleMapping(config.noise - config.num_classes, config.num_classes, config.style, config.depth)
        self.synthesis = Synthesis(config)

    def map_styles(self, z: Tensor, truncation: float = 1.0) -> Tensor:  # B Z+K -> B L W
        """Return the style of each layer. Below 1, `truncation` moves those of the coarse layers towards their mean."""
        w = self.mapping(z)[:, None].expand(-1, self.layers, -1)
        if truncation == 1:
            return w
        coarse = torch.arange(self.layers, device=w.device) < self.config.truncated
        return torch.where(coarse[:, None], self.mapping.get_center().lerp(w, truncation), w)

    def forward(self, z: Tensor) -> Tensor:  # B Z+K -> B C S S
        return self.synthesis(self.map_styles(z))


CARD = Card(
    name="stylegan1",
    model=Generator,
    config=Config,
    paper="arXiv:1812.04948",
    year=2018,
    input_type="noise",
    output_type="image",
    sizes={
        "stylegan1-1024": Size(params=26_219_627, source="README of NVlabs/stylegan"),
        "stylegan1-256": Size(image=256, params=26_086_229, source="NVlabs/stylegan, counted"),
        "stylegan1-mini": Size(image=32, noise=64, style=64, depth=2, dim=64, base=1024, grows=False),
        "stylegan1-test": Size(noise=8, num_classes=3, image=20, style=6, depth=2, dim=6, base=40, channels=2, grows=False),
    },
    recipe={
        "loss": "non-saturating",
        "penalty": "r1",
        "style_mixing": 0.9,
        "optimizer": "adamw",
        "lr": 1e-3,
        "beta1": 0.0,
        "beta2": 0.99,
        "weight_decay": 0.0,
        "grad_clip": 0.0,
        "warmup": 0.0,
        "schedule": "constant",
        "ema": 0.999,
    },  # appendix C of the paper
    adapt=lambda need: {"noise": Config.noise + need["num_classes"]} if need.get("num_classes") else {},  # plus a one-hot class
    parts={"critic": "stylegan1-discriminator"},
)

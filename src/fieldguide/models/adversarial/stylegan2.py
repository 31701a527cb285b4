"""StyleGAN 2: an image generator of modulated convolutions (Karras et al. 2019, arXiv:1912.04958).

New here: a network of dense layers maps noise to a style, and each convolution of the synthesis is scaled by the style and then
divided by the norm of its kernel ("demodulation"), instead of the normalized activations of StyleGAN 1. Noise for each pixel
makes details. The image is the sum of contributions of all resolutions, enlarged by a smooth filter. Training adds path-length
regularization, mixes the styles of two noises, and computes regularizers only every few steps (sections 2 to 4). Classes and
`augment_critic=ada`, the augmentation of what the critic sees, are those of StyleGAN 2 with ADA (Karras et al. 2020,
arXiv:2006.06676). The critic is `stylegan2-discriminator`.

In training, the noise for pixels is drawn anew; in evaluation it is a part of the weights, as in the published files, so that an
image depends on its noise vector alone. Smaller first maps than 8 x 8 and larger ones than 3 x 3 allow sides such as 28.

Initialization: N(0, 1), scaled when used (`layers.equalized_lr`), biases of styles 1, strengths of noise and other biases 0.
Shapes: B batch, Z noise, K classes, L styles (one for each convolution and one more), W width of a style, C channels, S side
of an image, D channels of a map, H its side.
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
from fieldguide.core.errors import SettingsError
from fieldguide.models.adversarial.stylegan2_discriminator import Discriminator, count_widths
from fieldguide.models.layers.equalized_lr import EqualizedLinear
from fieldguide.models.layers.modulated_conv import modulated_conv, modulated_conv_up
from fieldguide.models.layers.style_mapping import StyleMapping
from fieldguide.models.layers.upfirdn import upfirdn
from fieldguide.models.mapping.key_rules import Dropped, Reshaped, Zeros

__all__ = ["CARD", "Config", "Discriminator", "Generator"]

Maps = Tensor | None  # of the resolution before, if there is one
TAPS = (0.125, 0.375, 0.375, 0.125)  # of the filter that smooths whatever is resampled


@dataclass(frozen=True, kw_only=True)
class Config:
    noise: int = 512  # Z + K: the last K values are the class, one-hot; all zero = no class
    num_classes: int = 0  # K
    channels: int = 3  # C
    image: int = 1024  # S: 4, 5, 6 or 7 times a power of 2
    style: int = 512  # W
    depth: int = 8  # dense layers between noise and style
    dim: int = 512  # channels of the widest maps
    base: int = 32768  # maps of side H have base / H channels, at most `dim`


class StyledConv(nn.Module):
    """Modulated 3x3 convolution, noise for each pixel, bias and leaky ReLU; with `up`, it doubles the side first."""

    taps: Tensor
    noise: Tensor

    def __init__(self, inputs: int, outputs: int, side: int, style: int, *, up: bool = False):
        super().__init__()
        self.up = up
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3))
        nn.init.normal_(self.weight)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.strength = nn.Parameter(torch.zeros(()))
        self.style = EqualizedLinear(style, inputs, first_bias=1.0)
        self.register_buffer("taps", torch.tensor(TAPS), persistent=False)
        self.register_buffer("noise", nn.init.normal_(torch.empty(side, side)))  # in evaluation

    def forward(self, x: Tensor, w: Tensor) -> Tensor:  # B D H H, B W -> B D' H H, or B D' 2H 2H
        style = self.style(w)
        if self.up:
            x = modulated_conv_up(x, self.weight, style, self.taps)
        else:
            x = modulated_conv(x, self.weight, style)
        noise = self.noise
        if self.training:
            noise = torch.randn(x.shape[0], 1, *x.shape[2:], dtype=noise.dtype, device=x.device)
        x = x + (noise * self.strength).to(x.dtype) + self.bias[:, None, None]
        return math.sqrt(2) * F.leaky_relu(x, 0.2)


class ToImage(nn.Module):
    """Modulated 1x1 convolution to an image, without demodulation."""

    def __init__(self, inputs: int, channels: int, style: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, inputs, 1, 1))
        nn.init.normal_(self.weight)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.style = EqualizedLinear(style, inputs, first_bias=1.0)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:  # B D H H, B W -> B C H H
        style = self.style(w) / math.sqrt(x.shape[1])
        return modulated_conv(x, self.weight, style, demodulate=False) + self.bias[:, None, None]


class Block(nn.Module):
    """The convolutions and the contribution to the image at one resolution.

    The first block has one convolution, of a constant, and keeps its side; it needs two styles.
    """

    taps: Tensor

    def __init__(self, inputs: int, outputs: int, side: int, config: Config):
        super().__init__()
        self.conv0 = StyledConv(inputs, outputs, side, config.style, up=True) if inputs else None
        self.const = None if inputs else nn.Parameter(nn.init.normal_(torch.empty(outputs, side, side)))
        self.conv1 = StyledConv(outputs, outputs, side, config.style)
        self.rgb = ToImage(outputs, config.channels, config.style)
        self.register_buffer("taps", torch.tensor(TAPS), persistent=False)

    def forward(self, x: Maps, image: Maps, w: Tensor) -> tuple[Tensor, Tensor]:  # B D H H, B C H H, B 3 W -> both of 2H 2H
        if self.conv0 is None or x is None:
            assert self.const is not None  # of the first block
            x = self.conv1(self.const.expand(w.shape[0], -1, -1, -1), w[:, 0])
        else:
            x = self.conv1(self.conv0(x, w[:, 0]), w[:, 1])
        own = self.rgb(x, w[:, -1])
        return x, own if image is None else upfirdn(image, self.taps, up=2, padding=(2, 1), gain=4.0) + own


class Synthesis(nn.Module):
    """Styles -> image."""

    def __init__(self, config: Config):
        super().__init__()
        sides, widths = count_widths(config.image, config.base, config.dim)
        self.blocks = nn.ModuleList(Block(a, b, side, config) for a, b, side in zip((0, *widths[:-1]), widths, sides))

    def forward(self, styles: Tensor) -> Tensor:  # B L W -> B C S S
        x = image = None
        for i, block in enumerate(self.blocks):
            first = max(0, 2 * i - 1)
            x, image = block(x, image, styles[:, first : 2 * i + 2])
        assert image is not None  # there is at least one block
        return image


class Generator(nn.Module):
    """StyleGAN 2 generator: noise -> images, about -1 .. 1. Raises `SettingsError` for a side that doubling cannot reach."""

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
        """Return the style of each layer. Below 1, `truncation` moves styles towards their mean, which gives more typical images."""
        return self.mapping(z, truncation)[:, None].expand(-1, self.layers, -1)

    def forward(self, z: Tensor) -> Tensor:  # B Z+K -> B C S S
        return self.synthesis(self.map_styles(z))


def nvidia(config: Config) -> dict[str, Any]:
    """Return the names of the files of NVIDIA's stylegan2-ada-pytorch and stylegan3 (`G_ema.state_dict()`)."""
    table: dict[str, Any] = {
        "mapping.embed.*": "mapping.embed.*",
        "mapping.fc{i}.*": "mapping.layers.{i}.*",
        "mapping.w_avg": "mapping.average",
    }
    filters = Dropped("the filter is a constant")
    for i, side in enumerate(count_widths(config.image, config.base, config.dim)[0]):
        theirs, ours = f"synthesis.b{side}", f"synthesis.blocks.{i}"
        table |= {f"{theirs}.const": f"{ours}.const", f"{theirs}.resample_filter": filters}
        for conv in ("conv0", "conv1")[not i :]:
            table |= {
                f"{theirs}.{conv}.affine.*": f"{ours}.{conv}.style.*",
                f"{theirs}.{conv}.noise_strength": f"{ours}.{conv}.strength",
                f"{theirs}.{conv}.noise_const": f"{ours}.{conv}.noise",
                f"{theirs}.{conv}.resample_filter": filters,
                f"{theirs}.{conv}.*": f"{ours}.{conv}.*",
            }
        table |= {f"{theirs}.torgb.affine.*": f"{ours}.rgb.style.*", f"{theirs}.torgb.*": f"{ours}.rgb.*"}
    return table


def rosinality(config: Config) -> dict[str, Any]:
    """Return the names of the files of rosinality's stylegan2-pytorch (`g_ema`), which know no classes and no mean style."""
    kernels = Dropped("the filter is a constant")
    table: dict[str, Any] = {
        "style.{i+1}.*": "mapping.layers.{i}.*",
        "mapping.embed.*": "mapping.embed.*",  # of classes, which its networks do not have
        "<mean style>": Zeros("mapping.average", like="mapping.layers.0.weight", column=True),
    }
    sides, widths = count_widths(config.image, config.base, config.dim)
    start = (widths[0], sides[0], sides[0])
    table["input.input"] = Reshaped("synthesis.blocks.0.const", start, (1, *start))
    for i, (side, width) in enumerate(zip(sides, widths)):
        ours = f"synthesis.blocks.{i}"
        rgb = f"to_rgbs.{i - 1}" if i else "to_rgb1"
        inner = widths[max(0, i - 1)]
        convs = [("conv0", f"convs.{2 * i - 2}", 2 * i - 1, inner), ("conv1", f"convs.{2 * i - 1}", 2 * i, width)]
        for name, theirs, number, inputs in convs if i else [("conv1", "conv1", 0, width)]:
            table |= {
                f"{theirs}.conv.weight": Reshaped(f"{ours}.{name}.weight", (width, inputs, 3, 3), (1, width, inputs, 3, 3)),
                f"{theirs}.conv.modulation.*": f"{ours}.{name}.style.*",
                f"{theirs}.conv.blur.kernel": kernels,
                f"{theirs}.noise.weight": Reshaped(f"{ours}.{name}.strength", (), (1,)),
                f"{theirs}.activate.bias": f"{ours}.{name}.bias",
                f"noises.noise_{number}": Reshaped(f"{ours}.{name}.noise", (side, side), (1, 1, side, side)),
            }
        table |= {
            f"{rgb}.conv.weight": Reshaped(f"{ours}.rgb.weight", (-1, width, 1, 1), (1, -1, width, 1, 1)),
            f"{rgb}.conv.modulation.*": f"{ours}.rgb.style.*",
            f"{rgb}.bias": Reshaped(f"{ours}.rgb.bias", (-1,), (1, -1, 1, 1)),
            f"{rgb}.upsample.kernel": kernels,
        }
    return table


RECIPE: Mapping[str, Any] = {
    "loss": "non-saturating",
    "penalty": "r1",
    "penalty_weight": 1.0,
    "penalty_interval": 16,
    "path_length_weight": 2.0,
    "style_mixing": 0.9,
    "optimizer": "adamw",
    "lr": 2.5e-3,
    "beta1": 0.0,
    "beta2": 0.99,
    "weight_decay": 0.0,
    "grad_clip": 0.0,
    "warmup": 0.0,
    "schedule": "constant",
    "ema": 0.999,
}  # appendix B of the paper; the rate, and the weight of R1 for small images, from appendix C of arXiv:2006.06676

CARD = Card(
    name="stylegan2",
    model=Generator,
    config=Config,
    paper="arXiv:1912.04958",
    year=2019,
    input_type="noise",
    output_type="image",
    sizes={
        "stylegan2-1024": Size(params=30_370_060, source="NVlabs/stylegan2-ada-pytorch"),
        "stylegan2-256": Size(image=256, base=16384, params=24_767_458, source="NVlabs/stylegan2-ada-pytorch"),
        "stylegan2-32": Size(image=32, depth=2, source="NVlabs/stylegan2-ada-pytorch, for CIFAR-10"),
        "stylegan2-mini": Size(image=32, noise=64, style=64, depth=2, dim=64, base=1024),
        "stylegan2-test": Size(noise=8, num_classes=3, image=20, style=6, depth=2, dim=6, base=40, channels=2),
    },
    weights={"nvidia": nvidia, "rosinality": rosinality},
    recipe=RECIPE,
    adapt=lambda need: {"noise": Config.noise + need["num_classes"]} if need.get("num_classes") else {},  # plus a one-hot class
    parts={"critic": "stylegan2-discriminator"},
)

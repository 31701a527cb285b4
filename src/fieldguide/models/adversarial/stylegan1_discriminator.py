"""StyleGAN 1 discriminator: a progressive critic with smooth halvings (Karras et al. 2018, arXiv:1812.04948).

New here: that of "Progressive Growing of GANs" (Karras et al. 2017, arXiv:1710.10196), with a small filter before each halving
(section 2 and appendix C). Before the last convolution, a map shows how much the images of a small group differ. With classes
there is a score for each. It returns an unbounded score.

Initialization: N(0, 1), scaled when used (`layers.equalized_lr`); biases zero.
Shapes: B batch, C channels, K classes, S side of an image, D channels of a map, H its side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.adversarial.stylegan2_discriminator import count_widths
from fieldguide.models.layers.equalized_lr import EqualizedConv2d, EqualizedLinear
from fieldguide.models.layers.minibatch_stddev import MinibatchStddev
from fieldguide.models.layers.upfirdn import upfirdn

TAPS = (0.25, 0.5, 0.25)  # of the filter that smooths whatever is resampled


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    num_classes: int = 0  # K
    image: int = 1024  # S
    dim: int = 512  # channels of the widest maps
    base: int = 16384  # maps of side H have base / H channels, at most `dim`
    group: int = 4  # images whose differences are measured together
    grows: bool = True  # has layers from images at every resolution, of which only the first is used when all layers are


def leak(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


class Block(nn.Module):
    """3x3 convolution, filter, 3x3 convolution whose outputs are averaged over 2 x 2 pixels; with leaky ReLU."""

    taps: Tensor

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv0 = EqualizedConv2d(inputs, inputs, 3, padding=1, gain=math.sqrt(2))
        self.conv1 = EqualizedConv2d(inputs, outputs, 3, gain=math.sqrt(2))
        self.register_buffer("taps", torch.tensor(TAPS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # B D H H -> B D' H/2 H/2
        even = [side - side % 2 for side in x.shape[2:]]
        x = upfirdn(leak(self.conv0(x[:, :, : even[0], : even[1]])), self.taps, padding=(1, 1))
        kernel = F.pad(self.conv1.weight * (self.conv1.scale / 4), (1, 1, 1, 1))  # a convolution, then means, in one
        kernel = kernel[:, :, 1:, 1:] + kernel[:, :, 1:, :-1] + kernel[:, :, :-1, 1:] + kernel[:, :, :-1, :-1]
        return leak(F.conv2d(x, kernel, self.conv1.bias, stride=2, padding=1))


class Discriminator(nn.Module):
    """StyleGAN 1 critic: an image, optionally with K channels that hold its one-hot class -> a score, high for real images.

    Without a class, the score is the mean over the classes. Raises `SettingsError` if `image` is below 8, and `DataError` for
    images of another side.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.sides, widths = count_widths(config.image, config.base, config.dim)
        shown = widths if config.grows else widths[-1:]
        self.from_image = nn.ModuleList(EqualizedConv2d(config.channels, w, 1, gain=math.sqrt(2)) for w in shown)
        self.blocks = nn.ModuleList(Block(widths[i], widths[i - 1]) for i in range(len(widths) - 1, 0, -1))
        self.stddev = MinibatchStddev(config.group)
        self.conv = EqualizedConv2d(widths[0] + 1, widths[0], 3, padding=1, gain=math.sqrt(2))
        self.dense = EqualizedLinear(widths[0] * self.sides[0] ** 2, widths[0], gain=math.sqrt(2))
        self.last = EqualizedLinear(widths[0], max(1, config.num_classes))

    def forward(self, x: Tensor) -> Tensor:  # B C+K S S, or B C S S without a class -> B 1
        if x.shape[2:] != (self.config.image, self.config.image):
            raise DataError(
                f"the images have {x.shape[3]} x {x.shape[2]} pixels, but the network was created for image={self.config.image}"
            )
        return self.judge(x, float(len(self.blocks)))

    def judge(self, x: Tensor, growth: float) -> Tensor:  # B C+K H H -> B 1
        """Return the scores of smaller images: those of a generator with this `growth`."""
        x, label = x[:, : self.config.channels], x[:, self.config.channels :]
        if growth != len(self.blocks) and (len(self.from_image) == 1 or not 0 <= growth <= len(self.blocks)):
            raise SettingsError(f"growth={growth} needs a network with grows=True, and must be 0 to {len(self.blocks)}")
        upper, share = math.ceil(growth), growth - math.floor(growth)
        maps = leak(self.from_image[min(upper, len(self.from_image) - 1)](x))
        for block in self.blocks[len(self.blocks) - upper :]:
            maps = block(maps)
            if share:  # the coarser of the two resolutions enters behind the first block
                coarse = leak(self.from_image[upper - 1](F.avg_pool2d(x, 2)))
                maps, share = coarse.lerp(maps, share), 0.0
        maps = leak(self.conv(self.stddev(maps)))
        score = self.last(leak(self.dense(maps.flatten(1))))
        if not self.config.num_classes:
            return score
        if not label.shape[1]:
            return score.mean(1, keepdim=True)
        label = label[:, :, 0, 0]
        known = label.sum(1, keepdim=True)
        return (score * label).sum(1, keepdim=True) + (1 - known) * score.mean(1, keepdim=True)


CARD = Card(
    name="stylegan1-discriminator",
    model=Discriminator,
    config=Config,
    paper="arXiv:1812.04948",
    year=2018,
    input_type="image",
    output_type="score",
    sizes={
        "stylegan1-discriminator-1024": Size(params=23_087_249, source="NVlabs/stylegan, the table that its code prints"),
        "stylegan1-discriminator-256": Size(image=256),
        "stylegan1-discriminator-mini": Size(image=32, dim=64, base=1024, grows=False),
        "stylegan1-discriminator-test": Size(num_classes=3, image=17, dim=4, base=48, channels=2, grows=False),
    },
    recipe={"optimizer": "adamw", "lr": 1e-3, "beta1": 0.0, "beta2": 0.99, "weight_decay": 0.0},
)

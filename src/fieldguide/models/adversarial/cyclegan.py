"""CycleGAN generator: translates images to another domain without pairs (Zhu et al. 2017, arXiv:1703.10593).

New here: two generators, one for each direction, are trained so that an image that is translated there and back is unchanged;
this replaces pairs. The network is the residual one of Johnson et al. (2016, arXiv:1603.08155): two halvings, nine blocks, two
doublings, with instance norm and reflected borders (appendix 7.2 of the paper).

Initialization: N(0, 0.02) for convolutions (appendix 7.1).
Shapes: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.adversarial.patchgan import init_weights
from fieldguide.models.layers.padding import extend_image
from fieldguide.models.mapping.key_rules import Dropped, Row


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    outputs: int = 3  # channels of the output
    dim: int = 64  # channels at full resolution
    depth: int = 9  # residual blocks
    halvings: int = 2


class Block(nn.Module):
    """Residual block: two convolutions with instance norm, ReLU in between."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(dim, dim, 3, padding=1, padding_mode="reflect") for _ in range(2))
        self.norm1, self.norm2 = nn.InstanceNorm2d(dim), nn.InstanceNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        return x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))


class CycleGAN(nn.Module):
    """Images -> images in -1 .. 1 of the same size. They are extended to sides that can be halved `halvings` times."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        widths = [c.dim << level for level in range(c.halvings + 1)]
        self.first = nn.Conv2d(c.channels, c.dim, 7, padding=3, padding_mode="reflect")
        self.down = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1) for i, o in pairwise(widths))
        self.blocks = nn.ModuleList(Block(widths[-1]) for _ in range(c.depth))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 3, 2, 1, output_padding=1) for i, o in zip(widths[:0:-1], widths[-2::-1])
        )
        self.last = nn.Conv2d(c.dim, c.outputs, 7, padding=3, padding_mode="reflect")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_weights(self)

    def forward(self, image: Tensor) -> Tensor:  # B C H W -> B outputs H W
        height, width = image.shape[2:]
        x = extend_image(image, 1 << self.config.halvings)
        for conv in (self.first, *self.down):
            x = F.relu(F.instance_norm(conv(x)))
        for block in self.blocks:
            x = block(x)
        for conv in self.up:
            x = F.relu(F.instance_norm(conv(x)))
        return self.last(x)[:, :, :height, :width].tanh()


def list_names(c: Config) -> dict[str, Row]:
    """Return the names of the authors' network, one sequence of layers."""
    names: dict[str, Row] = {"model.1.*": "first.*"}
    place = 4
    for level in range(c.halvings):
        names[f"model.{place}.*"] = f"down.{level}.*"
        place += 3
    for block in range(c.depth):
        names[f"model.{place}.conv_block.1.*"] = f"blocks.{block}.conv1.*"
        names[f"model.{place}.conv_block.5.*"] = f"blocks.{block}.conv2.*"
        place += 1
    for level in range(c.halvings):
        names[f"model.{place}.*"] = f"up.{level}.*"
        place += 3
    names[f"model.{place + 1}.*"] = "last.*"
    for name in ("running_mean", "running_var", "num_batches_tracked"):  # in files from before torch 0.4
        for pattern in ("model.{i}", "model.{i}.conv_block.{j}"):
            names[f"{pattern}.{name}"] = Dropped("instance norm uses the statistics of each image")
    return names


CARD = Card(
    name="cyclegan",
    model=CycleGAN,
    config=Config,
    paper="arXiv:1703.10593",
    year=2017,
    input_type="image",
    output_type="image",
    sizes={
        "cyclegan-9": Size(params=11_378_179, source="junyanz/pytorch-CycleGAN-and-pix2pix, resnet_9blocks"),
        "cyclegan-6": Size(depth=6, params=7_837_699, source="junyanz/pytorch-CycleGAN-and-pix2pix, resnet_6blocks"),
        "cyclegan-s": Size(dim=32, depth=4),
        "cyclegan-mini": Size(dim=16, depth=3, halvings=1),
        "cyclegan-test": Size(channels=2, outputs=2, dim=2, depth=2, halvings=1),
    },
    weights={"junyanz": list_names},
    recipe={"optimizer": "adamw", "lr": 2e-3, "beta1": 0.5, "weight_decay": 0.0, "grad_clip": 0.0, "warmup": 0.0},
    parts={"critic": "patchgan"},
)

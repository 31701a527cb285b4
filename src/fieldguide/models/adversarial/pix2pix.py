"""Pix2Pix: a U-Net that translates images, with a critic of patches (Isola et al. 2017, arXiv:1611.07004).

New here: the generator is conditioned on an image instead of noise, so one network and one loss serve any pairs of images. Skip
connections pass details of the input on (section 3.2.1), the critic `patchgan` scores patches (3.2.2), and the only noise is
dropout, also at test time (section 3.2). Batch norm uses the statistics of each image, as the paper's batches of one image do
(section 6.1), so that an image's output does not depend on its batch.

Initialization: N(0, 0.02) for convolutions, N(1, 0.02) for the scales of the norm (section 6.2).
Shapes: B batch, C channels, K output channels, H W height and width, D width of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.adversarial.patchgan import init_weights
from fieldguide.models.layers.padding import extend_image
from fieldguide.models.mapping.key_rules import Dropped, Row

DROPOUT_LEVELS = 3  # levels with dropout, from the second lowest up


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    outputs: int = 3  # K
    dim: int = 64  # D of the first level; each next one is twice as wide, up to 8 times
    depth: int = 8  # levels; each halves the sides
    dropout: float = 0.5


def make_norm(dim: int) -> nn.InstanceNorm2d:
    """Return batch norm that takes the statistics of each image: instance norm with scale and offset."""
    return nn.InstanceNorm2d(dim, affine=True)


class Pix2Pix(nn.Module):
    """U-Net with convolutions of stride 2 in both directions. Images are extended to sides that can be halved `depth` times."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        widths = self.widths = [c.dim * min(1 << level, 8) for level in range(c.depth)]
        inside = range(1, c.depth - 1)  # levels with a norm on the way down: neither the first nor the lowest
        self.down = nn.ModuleList(nn.Conv2d(i, o, 4, 2, 1, bias=False) for i, o in zip([c.channels, *widths[:-1]], widths))
        self.down_norms = nn.ModuleDict({str(level): make_norm(widths[level]) for level in inside})
        ins = [width * (1 if level == c.depth - 1 else 2) for level, width in enumerate(widths)]
        outs = [c.outputs, *widths[:-1]]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 4, 2, 1, bias=level == 0) for level, (i, o) in enumerate(zip(ins, outs))
        )
        self.up_norms = nn.ModuleDict({str(level): make_norm(outs[level]) for level in range(1, c.depth)})
        # In the published networks, levels with 8 * dim channels have dropout, except for the lowest: three of unet-256.
        self.dropped = tuple(range(c.depth - 2, max(3, c.depth - 2 - DROPOUT_LEVELS), -1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_weights(self)

    def dropout_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """Return the shape D H W of the map of each level with dropout, for images of this size."""
        sides = [-(-side >> self.config.depth) << self.config.depth for side in (height, width)]
        return [(self.widths[level - 1], sides[0] >> level, sides[1] >> level) for level in self.dropped]

    def forward(self, image: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:  # B C H W -> B K H W in -1 .. 1
        """Translate images.

        `noise` holds uniform numbers, B D H W for each of the `dropout_shapes`: values below `dropout` are dropped. By default,
        training draws them, and evaluation drops nothing.
        """
        height, width = image.shape[2:]
        x: Tensor = extend_image(image, 1 << self.config.depth)
        seen: list[Tensor] = []
        for level, conv in enumerate(self.down):
            x = conv(F.leaky_relu(x, 0.2) if level else x)
            x = self.down_norms[str(level)](x) if str(level) in self.down_norms else x
            seen.append(x)
        seen.pop()
        draws = dict(zip(self.dropped, noise)) if noise is not None else {}
        for level in range(self.config.depth - 1, 0, -1):
            x = self.up_norms[str(level)](self.up[level](F.relu(x)))
            if level in self.dropped:
                x = self.drop(x, draws.get(level))
            x = torch.cat([seen.pop(), x], 1)
        return self.up[0](F.relu(x))[:, :, :height, :width].tanh()

    def drop(self, x: Tensor, draw: Tensor | None) -> Tensor:
        """Apply dropout with given uniform numbers, or in training with new ones."""
        p = self.config.dropout
        return F.dropout(x, p, self.training) if draw is None else x * (draw >= p).to(x.dtype) / (1 - p)


def list_names(depth: int) -> dict[str, Row]:
    """Return the names of the authors' nested modules for a U-Net of some levels."""
    names: dict[str, Row] = {}
    for level in range(depth):
        place = "model.model." + "".join("1.model." if inner == 0 else "3.model." for inner in range(level))
        first, last = level == 0, level == depth - 1
        names[f"{place}{0 if first else 1}.weight"] = f"down.{level}.weight"
        names[f"{place}{3 if first or last else 5}.*"] = f"up.{level}.*"
        norms = {} if first else {4: "up_norms"} if last else {2: "down_norms", 6: "up_norms"}
        for index, ours in norms.items():
            names |= {f"{place}{index}.{name}": f"{ours}.{level}.{name}" for name in ("weight", "bias")}
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                names[f"{place}{index}.{name}"] = Dropped("statistics are those of each image")
    return names


CARD = Card(
    name="pix2pix",
    model=Pix2Pix,
    config=Config,
    paper="arXiv:1611.07004",
    year=2017,
    input_type="image",
    output_type="image",
    sizes={
        "pix2pix-256": Size(params=54_413_955, source="junyanz/pytorch-CycleGAN-and-pix2pix, unet_256"),
        "pix2pix-128": Size(depth=7, params=41_828_995, source="junyanz/pytorch-CycleGAN-and-pix2pix, unet_128"),
        "pix2pix-s": Size(dim=32, depth=5),
        "pix2pix-mini": Size(dim=16, depth=4),
        "pix2pix-test": Size(channels=2, outputs=1, dim=2, depth=3),
    },
    weights={"junyanz": lambda config: list_names(config.depth)},
    recipe={
        "optimizer": "adamw",
        "lr": 2e-3,
        "beta1": 0.5,
        "weight_decay": 0.0,
        "grad_clip": 0.0,
        "warmup": 0.0,
    },  # section 3.3 of the paper; the rate of 2e-4 is meant for hundreds of epochs
    parts={"critic": "patchgan"},
)

"""HOG: histograms of oriented gradients with a linear classifier (Dalal and Triggs 2005).

New here: features that are computed, not learned. Small cells count how strongly edges of each direction occur, normalized over
neighboring cells. Until 2012 this was the standard for recognizing objects; with few images it still is a strong baseline.
As in the paper, color images use the channel with the strongest gradient. A coarse copy of the pixels is added, since HOG does not
see colors.

Initialization: zeros, as fitting starts from there.
Shapes: B batch, C channels, H W pixels, G x G cells, O directions, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    cells: int = 8  # G
    directions: int = 9  # O, from 0 to 180 degrees
    pixels: int = 8  # side of the copy of the pixels
    num_classes: int = 10

    @property
    def width(self) -> int:
        blocks = self.cells - 1
        return 4 * self.directions * blocks**2 + self.channels * self.pixels**2


class HOGLinear(nn.Module):
    """Histograms of oriented gradients and coarse pixels -> class logits. Images may have any size of at least G x G."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.head = nn.Linear(config.width, config.num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def encode(self, image: Tensor) -> Tensor:  # B C H W -> B F
        coarse = F.adaptive_avg_pool2d(image, self.config.pixels).flatten(1)
        return torch.cat([self._compute_histograms(image), coarse], 1)

    def _compute_histograms(self, image: Tensor) -> Tensor:  # B C H W -> B (G-1)^2 * 4 * O
        c = self.config
        padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
        dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
        dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
        squared, strongest = (dx.square() + dy.square()).max(1, keepdim=True)
        dx, dy = dx.gather(1, strongest), dy.gather(1, strongest)  # B 1 H W
        place = torch.atan2(dy, dx).remainder(math.pi) * (c.directions / math.pi) - 0.5  # centers of the bins are integers
        low = place.floor()
        part = place - low  # a vote is shared by the two nearest bins
        size = squared.sqrt()
        bins = torch.arange(c.directions, device=image.device).view(1, -1, 1, 1)
        first, second = low.long().remainder(c.directions), (low.long() + 1).remainder(c.directions)
        votes = size * ((bins == first) * (1 - part) + (bins == second) * part)  # B O H W
        cells = F.adaptive_avg_pool2d(votes, c.cells)  # B O G G
        blocks = torch.cat([cells[..., i : i + c.cells - 1, j : j + c.cells - 1] for i in (0, 1) for j in (0, 1)], 1)
        blocks = blocks / (blocks.square().sum(1, keepdim=True) + 1e-4).sqrt()
        blocks = blocks.clamp(max=0.2)  # L2-Hys, section 6.4
        return (blocks / (blocks.square().sum(1, keepdim=True) + 1e-4).sqrt()).flatten(1)

    def forward(self, image: Tensor) -> Tensor:  # B C H W -> B classes
        return self.head(self.encode(image))


CARD = Card(
    name="hog-linear",
    model=HOGLinear,
    config=Config,
    paper="doi:10.1109/CVPR.2005.177",
    year=2005,
    input_type="image",
    output_type="label",
    solver="linear",
    sizes={
        "hog-linear": Size(params=19_570, source="10 classes of 1,764 histogram bins and 192 pixels, one bias per class"),
        "hog-linear-test": Size(cells=4, pixels=3, num_classes=3),
    },
)

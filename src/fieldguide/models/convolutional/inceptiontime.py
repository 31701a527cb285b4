"""InceptionTime: filters of several lengths that classify time series (Fawaz et al. 2019, arXiv:1909.04939).

New here: Inception for series. Each module reduces the channels to a few, applies long, middle and short filters side by side, with a
maximum filter as a fourth branch, and joins them, so that patterns of very different lengths are found at once. Every third module
is bridged by a residual connection. The authors average five networks; this is one of them.

Initialization: Glorot uniform, biases 0, as in the authors' code (Keras).
Shapes: B batch, T steps, C channels, D filters of a branch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 1  # C
    num_classes: int = 2
    dim: int = 32  # D, filters of each of four branches, and channels after the bottleneck
    lengths: tuple[int, ...] = (40, 20, 10)  # of the filters
    depth: int = 6


def build_norm(channels: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)  # as in Keras


class Module(nn.Module):
    """An Inception module."""

    def __init__(self, c: Config, channels: int):
        super().__init__()
        self.bottleneck = nn.Conv1d(channels, c.dim, 1, bias=False) if channels > 1 else nn.Identity()
        self.lengths = c.lengths
        inside = c.dim if channels > 1 else channels
        self.convs = nn.ModuleList(nn.Conv1d(inside, c.dim, length, bias=False) for length in c.lengths)
        self.pooled = nn.Conv1d(channels, c.dim, 1, bias=False)
        self.norm = build_norm((len(c.lengths) + 1) * c.dim)

    def forward(self, x: Tensor) -> Tensor:  # B C T -> B 4D T
        y = self.bottleneck(x)
        parts = [conv(F.pad(y, ((n - 1) // 2, n // 2))) for conv, n in zip(self.convs, self.lengths)]
        highest = F.max_pool2d(x[:, :, None], (1, 3), 1, (0, 1))[:, :, 0]  # max_pool1d would fix T in traced graphs
        parts.append(self.pooled(highest))
        return F.relu(self.norm(torch.cat(parts, 1)))


class InceptionTime(nn.Module):
    """Series of any length -> class logits."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        width = (len(c.lengths) + 1) * c.dim
        self.blocks = nn.ModuleList(Module(c, width if i else c.channels) for i in range(c.depth))
        inputs = [c.channels, *[width] * c.depth][: c.depth // 3]
        self.shortcuts = nn.ModuleList(nn.Sequential(nn.Conv1d(i, width, 1, bias=False), build_norm(width)) for i in inputs)
        self.head = nn.Linear(width, c.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, series: Tensor) -> Tensor:  # B T C -> B 4D
        x = start = series.mT
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i % 3 == 2:
                x = start = F.relu(x + self.shortcuts[i // 3](start))
        return x.mean(2)

    def forward(self, series: Tensor) -> Tensor:  # B T C -> B classes
        return self.head(self.features(series))


CARD = Card(
    name="inceptiontime",
    model=InceptionTime,
    config=Config,
    paper="arXiv:1909.04939",
    year=2019,
    input_type="series",
    output_type="label",
    endless=True,
    sizes={
        "inceptiontime": Size(params=420_450, source="the authors' code (Keras), by formula, one channel and 2 classes"),
        "inceptiontime-mini": Size(dim=12, depth=3),
        "inceptiontime-test": Size(channels=3, num_classes=3, dim=4, lengths=(6, 3), depth=3),
    },
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-4},
)

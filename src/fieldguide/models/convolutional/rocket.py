"""ROCKET: random convolutions and a linear classifier of time series (Dempster et al. 2019, arXiv:1910.13051).

New here: nothing but the last layer is learned. Thousands of random kernels of all lengths, dilations and biases give two numbers each:
the largest value, and the fraction of values above zero, which says how much of a series has a pattern. A linear classifier of
these was as accurate as the best ensembles of its time, after seconds instead of days. With several channels, each kernel reads a
few of them. The authors use 10,000 kernels and a ridge classifier; here it is a logistic regression, which gives probabilities.

The kernels follow from `seed` and the shape of the input, so they are not stored.

Initialization: kernels normal with mean 0, biases uniform in -1 .. 1; the classifier zeros, as fitting starts from there.
Shapes: B batch, T steps, C channels, K kernels, N values of a convolution.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError

LENGTHS = (7, 9, 11)


@dataclass(frozen=True, kw_only=True)
class Config:
    length: int = 128  # T
    channels: int = 1  # C
    kernels: int = 2000  # K
    seed: int = 0  # of the kernels
    num_classes: int = 2


@dataclass(frozen=True)
class Kernel:
    """A random kernel: its weights by channel, and how it is applied."""

    weights: dict[int, list[float]]
    bias: float
    length: int
    dilation: int
    padding: int


def draw_kernels(c: Config) -> Iterator[Kernel]:
    """Yield the kernels. Only `Random.random` is used, whose values are the same in all versions of Python."""
    rng, normal = random.Random(c.seed), NormalDist()
    for _ in range(c.kernels):
        length = LENGTHS[int(rng.random() * len(LENGTHS))]
        chosen = int(2 ** (rng.random() * math.log2(min(c.channels, length) + 1)))
        places = list(range(c.channels))
        weights = {}
        for _ in range(chosen):
            drawn = [normal.inv_cdf(max(rng.random(), 1e-12)) for _ in range(length)]
            weights[places.pop(int(rng.random() * len(places)))] = [w - sum(drawn) / length for w in drawn]
        widest = max((c.length - 1) / (length - 1), 1.0)
        dilation = int(2 ** (rng.random() * math.log2(widest)))
        reach = (length - 1) * dilation
        padded = rng.random() < 0.5 or reach >= c.length  # a series shorter than the kernel is always padded
        yield Kernel(
            weights, 2 * rng.random() - 1, length, dilation, max(reach // 2, math.ceil((reach - c.length + 1) / 2)) * padded
        )


class Rocket(nn.Module):
    """Series -> features of random kernels -> class logits. Raises `DataError` if the series have another length than `length`."""

    bias0: Tensor

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        groups: dict[tuple[int, int, int], list[Kernel]] = {}
        for kernel in draw_kernels(c):
            groups.setdefault((kernel.length, kernel.dilation, kernel.padding), []).append(kernel)
        self.groups = list(groups)  # (length, dilation, padding) of the kernels that are applied together
        self.order = [kernel for kernels in groups.values() for kernel in kernels]
        for i, kernels in enumerate(groups.values()):
            zeros = [0.0] * kernels[0].length
            weights = torch.tensor(
                [[kernel.weights.get(channel, zeros) for channel in range(c.channels)] for kernel in kernels]
            )
            self.register_buffer(f"weights{i}", weights, persistent=False)
            self.register_buffer(f"bias{i}", torch.tensor([kernel.bias for kernel in kernels]), persistent=False)
        self.head = nn.Linear(2 * c.kernels, c.num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def encode(self, series: Tensor) -> Tensor:  # B T C -> B 2K
        """Return the fraction of positive values of each kernel, then the largest values."""
        if series.shape[1:] != (self.config.length, self.config.channels):
            raise DataError(
                f"The series have {series.shape[1]} steps and {series.shape[2]} channels, but the model was created with "
                f"length={self.config.length}, channels={self.config.channels}."
            )
        positive, largest = [], []
        with torch.autocast(
            "cuda" if series.is_cuda else "cpu", enabled=False
        ):  # rounding would change which values are positive
            x = series.mT.to(self.bias0.dtype)
            for i, (_, dilation, padding) in enumerate(self.groups):
                y = F.conv1d(x, getattr(self, f"weights{i}"), getattr(self, f"bias{i}"), padding=padding, dilation=dilation)
                positive.append((y > 0).to(y.dtype).mean(2))
                largest.append(y.amax(2))
            return torch.cat([*positive, *largest], 1)

    def forward(self, series: Tensor) -> Tensor:  # B T C -> B classes
        return self.head(self.encode(series))


CARD = Card(
    name="rocket",
    model=Rocket,
    config=Config,
    paper="arXiv:1910.13051",
    year=2019,
    input_type="series",
    output_type="label",
    solver="linear",
    sizes={
        "rocket-2k": Size(params=8_002, source="2 classes of 2 features of 2,000 kernels, one bias per class"),
        "rocket-10k": Size(kernels=10_000, params=40_002, source="the paper's 10,000 kernels, 2 classes"),
        "rocket-test": Size(length=17, channels=3, kernels=24, num_classes=3),
    },
)

"""Standard normal noise that depends only on a seed and the number of each example, not on the rest of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fieldguide.data.loader import make_generator


class Noise:
    """Noise source: each call returns the next B x shape, with one row per entry of `numbers`.

    The noise is sampled on the CPU in float32, so that it is the same on every device and at every precision. The result
    has the device and dtype of `like`.
    """

    def __init__(self, seed: int, numbers: Iterable[int], shape: Sequence[int], like: Tensor):
        self.generators, self.shape, self.like = [make_generator(seed, number) for number in numbers], tuple(shape), like

    def __call__(self) -> Tensor:  # -> B ...
        noise = torch.empty(len(self.generators), *self.shape)
        for row, source in zip(noise, self.generators):
            row.normal_(generator=source)
        return noise.to(self.like)

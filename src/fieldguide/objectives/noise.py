"""Standard normal numbers that depend on a seed and on each example's number alone, not on who shares its batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fieldguide.data.loader import make_generator


class Noise:
    """Each call draws the next B x shape, B being how many `numbers` of examples there are.

    Drawn on the CPU in float32 whatever the device and precision, so that all of them begin at the same noise.
    """

    def __init__(self, seed: int, numbers: Iterable[int], shape: Sequence[int], like: Tensor):
        self.generators, self.shape, self.like = [make_generator(seed, number) for number in numbers], tuple(shape), like

    def __call__(self) -> Tensor:  # -> B ...
        drawn = torch.empty(len(self.generators), *self.shape)
        for row, source in zip(drawn, self.generators):
            row.normal_(generator=source)
        return drawn.to(self.like)

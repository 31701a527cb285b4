"""Exponential moving average of weights (Polyak & Juditsky 1992), which usually scores better than the last weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Moving average of the floating-point parameters and buffers of a module, with a warm-up of `decay`."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.live = decay, [t for t in module.state_dict(keep_vars=True).values() if t.is_floating_point()]
        self.mean = [t.detach().clone() for t in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages after optimizer step `step`."""
        torch._foreach_lerp_(self.mean, [t.detach() for t in self.live], 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Use the averages as the weights of the module inside the context."""
        self.swap_parameters()
        try:
            yield
        finally:
            self.swap_parameters()

    @torch.no_grad()
    def swap_parameters(self) -> None:
        """Exchange the weights of the module and the averages."""
        for live, mean in zip(self.live, self.mean):
            kept = live.detach().clone()
            live.copy_(mean)
            mean.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        return {str(i): t for i, t in enumerate(self.mean)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for i, mean in enumerate(self.mean):
            mean.copy_(state[str(i)])

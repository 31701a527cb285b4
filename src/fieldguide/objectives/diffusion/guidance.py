"""Guidance: outputs are moved away from those of a worse network, or from those without a condition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fieldguide.objectives.diffusion.noise_process import Level


@dataclass(frozen=True)
class Guidance:
    """Guidance by extrapolation: other + scale * (output - other).

    Args:
        scale: 1 is the network's own output, 0 the other one, more than 1 strengthens the difference.
        guide: the network that gives the other output, for the same label: a smaller one, or one that was trained for a shorter time
            (autoguidance; Karras et al. 2024, arXiv:2406.02070). By default, the other output is the network's own without
            a label (classifier-free guidance; Ho and Salimans 2022, arXiv:2207.12598, equation 6 with w = scale - 1).
        low, high: guide only while the ratio of noise to signal is in this interval (Kynkäänniemi et al. 2024, arXiv:2404.07724).
    """

    scale: float = 1.0
    guide: nn.Module | None = None
    low: float = 0.0
    high: float = math.inf

    def predict(self, model: nn.Module, x: Tensor, time: Tensor, label: Tensor, level: Level) -> Tensor:  # B ... -> B ...
        """Return the guided output at a noise level."""
        if not self.low <= level.sigma <= self.high:
            return model(x, time, label)
        if self.guide is None:
            return predict_with_guidance(model, x, time, label, self.scale)
        output = model(x, time, label)
        other = self.guide(x, time, label)
        return other + self.scale * (output - other)


def predict_with_guidance(
    model: nn.Module, x: Tensor, time: Tensor, label: Tensor, scale: float
) -> Tensor:  # B ..., B, B or B T -> B ...
    """Return the output with classifier-free guidance. Both outputs are computed in one batch."""
    if scale in (0.0, 1.0):
        return model(x, time, label * int(scale))
    both = model(torch.cat([x, x]), torch.cat([time, time]), torch.cat([label, torch.zeros_like(label)]))
    with_label, without = both.chunk(2)
    return without + scale * (with_label - without)

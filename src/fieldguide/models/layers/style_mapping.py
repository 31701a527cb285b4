"""Mapping network of StyleGAN: dense layers from noise to a style (Karras et al. 2018, arXiv:1812.04948, sections 2 and B).

It keeps a moving average of its styles, towards which styles can be moved ("truncation"). With classes, the class is embedded
and appended to the noise, both normalized (Karras et al. 2020, arXiv:2006.06676, appendix C).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.models.layers.equalized_lr import EqualizedLinear

RATE = 0.01  # learning rate of the mapping, relative to that of the other layers
AVERAGE_DECAY = 0.998  # of the moving average of styles
AVERAGE_SAMPLES = 10_000  # styles whose mean stands for the average if a file has none
EPSILON = 1e-8


def normalize(x: Tensor) -> Tensor:  # B D -> B D
    """Divide each row by the root of its mean square."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPSILON)


class StyleMapping(nn.Module):
    """Noise and a one-hot class -> a style.

    Args:
        noise: Z, the width of the noise without the class; 0 maps only classes, for a critic.
        num_classes: K.
        style: W, the width of a style.
        depth: number of dense layers.
    """

    average: Tensor

    def __init__(self, noise: int, num_classes: int, style: int, depth: int):
        super().__init__()
        self.noise = noise
        self.embed = EqualizedLinear(num_classes, style) if num_classes else None
        widths = [noise + (style if num_classes else 0), *[style] * (depth - 1)]
        self.layers = nn.ModuleList(EqualizedLinear(width, style, rate=RATE) for width in widths)
        if noise:
            self.register_buffer("average", torch.zeros(style))

    def forward(self, z: Tensor, truncation: float = 1.0) -> Tensor:  # B Z+K -> B W
        w = self.compute_style(z)
        if self.training and self.noise:
            with torch.no_grad():
                self.average.lerp_(w.detach().to(self.average.dtype).mean(0), 1 - AVERAGE_DECAY)
        return w if truncation == 1 else self.get_center().lerp(w, truncation)

    def compute_style(self, z: Tensor) -> Tensor:  # B Z+K -> B W
        z, label = z[:, : self.noise], z[:, self.noise :]
        parts = [normalize(z)] if self.noise else []
        if self.embed is not None:
            parts.append(normalize(self.embed(label)))
        x = torch.cat(parts, 1)
        for layer in self.layers:
            x = math.sqrt(2) * F.leaky_relu(layer(x), 0.2)
        return x

    @torch.no_grad()
    def get_center(self) -> Tensor:  # -> W
        """Return the average style; if it is unknown, as in files that have none, the mean over many noises."""
        if self.average.any():
            return self.average
        like, source = self.average, torch.Generator().manual_seed(0)
        z = torch.randn(AVERAGE_SAMPLES, self.noise, generator=source).to(like)
        if self.embed is not None:
            label = torch.arange(AVERAGE_SAMPLES, device=like.device) % self.embed.weight.shape[1]
            z = torch.cat([z, F.one_hot(label, self.embed.weight.shape[1]).to(like)], 1)
        return self.compute_style(z).mean(0)

"""MFCC: mel-frequency cepstral coefficients with a linear classifier (Davis and Mermelstein 1980).

New here: features that are computed, not learned. The cosine transform of a log-mel spectrum separates its envelope, which says what
is spoken, from its fine structure, and makes the coefficients nearly uncorrelated. Speech recognizers used these features
until about 2012. Here a recording of any length becomes one vector: mean and standard deviation of the coefficients and of their change
from frame to frame, and their means over equal parts of the time, which keep the order of sounds.

Initialization: zeros, as fitting starts from there.
Shapes: B batch, T frames, F mel bands, K coefficients, P parts, D = (4 + P) K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size


@dataclass(frozen=True, kw_only=True)
class Config:
    features: int = 40  # F, mel bands
    coefficients: int = 20  # K
    parts: int = 8  # P
    num_classes: int = 10

    @property
    def width(self) -> int:
        return (4 + self.parts) * self.coefficients


class MFCCLinear(nn.Module):
    """Log-mel features -> statistics of cepstral coefficients -> class logits. Frames after `lengths` have no influence."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.head = nn.Linear(c.width, c.num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def encode(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:  # B T F, B -> B D
        if lengths is None:
            lengths = torch.full((len(features),), features.shape[1], device=features.device)
        lengths = lengths.clamp(min=1)[:, None]  # B 1
        cepstra = features @ _build_cosines(self.config, features)  # B T K
        place = torch.arange(features.shape[1], device=features.device)
        # Frame t covers t to t + 1 of the time; a part gets the fraction of each frame that is within it.
        edges = (
            torch.arange(self.config.parts + 1, device=features.device) * lengths.to(features.dtype) / self.config.parts
        )  # B P+1
        low, high = edges[:, :-1, None], edges[:, 1:, None]
        shares = (torch.minimum(place + 1, high) - torch.maximum(place, low)).clamp(min=0)  # B P T
        means = shares / (high - low) @ cepstra  # B P K
        change = cepstra.diff(dim=1)  # B T-1 K
        real = place < lengths  # B T
        return torch.cat([*_describe(cepstra, real), *_describe(change, real[:, 1:]), means.flatten(1)], 1)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:  # B T F, B -> B classes
        return self.head(self.encode(features, lengths))


def _build_cosines(c: Config, like: Tensor) -> Tensor:  # -> F K
    """Return the basis of the orthonormal cosine transform (type II)."""
    place = (torch.arange(c.features, dtype=like.dtype, device=like.device) + 0.5) * math.pi / c.features
    cosines = (place[:, None] * torch.arange(c.coefficients, device=like.device)).cos() * math.sqrt(2 / c.features)
    return torch.cat([cosines[:, :1] / math.sqrt(2), cosines[:, 1:]], 1)


def _describe(values: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:  # B T K, B T bool -> B K, B K
    """Return mean and standard deviation over the real frames; zeros if there are none."""
    weight = real[..., None].to(values.dtype)
    count = weight.sum(1).clamp(min=1)
    mean = (values * weight).sum(1) / count
    variance = ((values - mean[:, None]).square() * weight).sum(1) / count
    return mean, (variance + 1e-12).sqrt()


CARD = Card(
    name="mfcc-linear",
    model=MFCCLinear,
    config=Config,
    paper="doi:10.1109/TASSP.1980.1163420",
    year=1980,
    input_type="speech",
    output_type="label",
    solver="linear",
    sizes={
        "mfcc-linear": Size(params=2_410, source="10 classes of 12 statistics of 20 coefficients, one bias per class"),
        "mfcc-linear-test": Size(features=6, coefficients=4, parts=3, num_classes=3),
    },
)

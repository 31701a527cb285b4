"""Baselines of image to image: functions of the color of each pixel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RIDGE = 1e-3  # added to the mean squares, so that constant channels have a solution
MIN_SPREAD = 1e-3  # of a channel, as a standard deviation


def fit_colors(inputs: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:  # N C S S, N K S S
    """Return the linear function of the channels of a pixel that has the least squared error (ridge regression)."""
    x, y = (part.movedim(1, -1).flatten(0, 2).double() for part in (inputs, targets))
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    squares = x.T @ x / len(x) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(squares, x.T @ y / len(x)).float()

    def apply(images: Tensor) -> Tensor:  # N C S S -> N K S S
        found = torch.einsum("nchw,ck->nkhw", images, weights[:-1]) + weights[-1].view(1, -1, 1, 1)
        return found.clamp(-1, 1)

    return apply


def match_colors(images: Tensor, own: Tensor, other: Tensor) -> Tensor:  # N C S S each
    """Shift and scale the channels of images, so that mean and standard deviation of their domain become those of the other."""
    (mean, spread), (goal, width) = (
        (part.mean((0, 2, 3), keepdim=True), part.std((0, 2, 3), keepdim=True).clamp(min=MIN_SPREAD)) for part in (own, other)
    )
    return ((images - mean) / spread * width + goal).clamp(-1, 1)

"""Gradient penalties of a critic: terms that bound how fast its score changes with its input.

Each needs the gradient of a gradient ("double backward"). The penalties assume that the score of an example depends on that
example alone, so that they do not suit critics with batch normalization.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]  # B ... -> B 1


class GradientPenalty:
    """Base class of the penalties.

    Args:
        weight: factor of the penalty; None means as published.
    """

    published_weight: ClassVar[float]

    def __init__(self, weight: float | None = None):
        self.weight = self.published_weight if weight is None else weight

    def __call__(self, score: Score, real: Tensor, fake: Tensor) -> Tensor:  # -> scalar
        """Return the penalty of a critic at real and generated examples, times its weight."""
        raise NotImplementedError


class InterpolatedPenalty(GradientPenalty):
    """WGAN-GP: the slope between real and generated examples should be 1 (Gulrajani et al. 2017, arXiv:1704.00028,
    equation 3): weight * mean (|gradient| - 1)^2 at random points of the lines between pairs of examples.
    """

    published_weight = 10.0

    def __call__(self, score: Score, real: Tensor, fake: Tensor) -> Tensor:
        mix = torch.rand(len(real), *[1] * (real.ndim - 1), dtype=real.dtype, device=real.device)
        gradient = input_gradient(score, mix * real + (1 - mix) * fake)
        return self.weight * (gradient.norm(dim=1) - 1).square().mean()


class R1(GradientPenalty):
    """R1: the slope at real examples should be 0: weight / 2 * mean |gradient|^2 (Mescheder et al. 2018, arXiv:1801.04406,
    equation 9).
    """

    published_weight = 10.0

    def __call__(self, score: Score, real: Tensor, fake: Tensor) -> Tensor:
        return self.weight / 2 * squared_slope(score, real)


class R1R2(GradientPenalty):
    """R1 and R2: the slope at real and at generated examples should be 0 (Mescheder et al. 2018, equations 9 and 10; both
    together as in R3GAN, Huang et al. 2024, arXiv:2501.05441). The weight depends on the data.
    """

    published_weight = 1.0

    def __call__(self, score: Score, real: Tensor, fake: Tensor) -> Tensor:
        return self.weight / 2 * (squared_slope(score, real) + squared_slope(score, fake))


PENALTIES: dict[str, type[GradientPenalty]] = {"gp": InterpolatedPenalty, "r1": R1, "r1r2": R1R2}


def input_gradient(score: Score, x: Tensor) -> Tensor:  # B ... -> B F
    """Return the gradient of each example's score with respect to the example, differentiable itself."""
    # In float32, whatever autocast chose for the losses: squares of small gradients vanish in half precision.
    with torch.autocast(x.device.type, enabled=False), torch.enable_grad():
        x = (x if x.dtype == torch.float64 else x.float()).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(score(x).sum(), x, create_graph=True)
    return gradient.flatten(1)


def squared_slope(score: Score, x: Tensor) -> Tensor:  # B ... -> scalar
    return input_gradient(score, x).square().sum(1).mean()

"""Spectral normalization: divide a weight by its largest singular value (Miyato et al. 2018, arXiv:1802.05957, algorithm 1).

The layer is then 1-Lipschitz: its output changes at most as much as its input. The singular value is estimated by power
iteration, one step per forward pass in training, which suffices because the weight changes slowly.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

Layer = TypeVar("Layer", bound=nn.Module)
FIRST_ITERATIONS = 15  # power iterations of a new layer, so that it is normalized before any training


class SpectralNorm(nn.Module):
    """Parametrization that divides a weight, as a matrix of one row per output, by its largest singular value.

    Buffers are named as by `torch.nn.utils.parametrizations.spectral_norm`, and the values are equal.

    Args:
        weight: the weight of a new layer.
        axis: axis of the outputs; 1 for transposed convolutions, else 0.
    """

    _u: Tensor  # left singular vector, one value per output
    _v: Tensor  # right singular vector

    def __init__(self, weight: Tensor, axis: int = 0, eps: float = 1e-12):
        super().__init__()
        self.axis, self.eps = axis, eps
        matrix = self.flatten(weight.detach())
        for name, length in zip(("_u", "_v"), matrix.shape):
            self.register_buffer(name, F.normalize(matrix.new_empty(length).normal_(), dim=0, eps=eps))
        for _ in range(FIRST_ITERATIONS):
            self.iterate(matrix)

    def flatten(self, weight: Tensor) -> Tensor:  # O ... -> O I
        return weight.movedim(self.axis, 0).flatten(1)

    @torch.no_grad()
    def iterate(self, matrix: Tensor) -> None:  # O I
        """Make one step of the power iteration."""
        self._u.copy_(F.normalize(matrix @ self._v, dim=0, eps=self.eps))
        self._v.copy_(F.normalize(matrix.T @ self._u, dim=0, eps=self.eps))

    def forward(self, weight: Tensor) -> Tensor:
        matrix = self.flatten(weight)
        if self.training:
            self.iterate(matrix)
        # Copies: the next forward pass changes the vectors while the gradient of this one may still be due.
        u, v = self._u.clone(), self._v.clone()
        return weight / (u @ matrix @ v)


def spectral_norm(layer: Layer) -> Layer:
    """Normalize the weight of a linear layer, a convolution or an embedding, and return the layer."""
    axis = 1 if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) else 0
    weight = layer.weight
    assert isinstance(weight, Tensor)
    parametrize.register_parametrization(layer, "weight", SpectralNorm(weight, axis))
    return layer


def has_spectral_norm(model: nn.Module) -> bool:
    """Return whether any weight of a model is normalized."""
    return any(isinstance(module, SpectralNorm) for module in model.modules())

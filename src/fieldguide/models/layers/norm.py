"""Normalisations that torch has not, or not for every precision."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016, arXiv:1607.06450) of the channels at each place of a map.

    The result lies in memory with channels last, as convolutions then keep it.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467) that stays fused where its input is of
    lower precision than its weight, as inside autocast."""

    def forward(self, x: Tensor) -> Tensor:  # ... D -> ... D
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)

"""Normalization layers that torch lacks, or lacks for some precisions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """Layer normalization (Ba et al. 2016, arXiv:1607.06450) over the channels of a feature map.

    The output is in channels-last memory format, which following convolutions keep.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalization (Zhang and Sennrich 2019, arXiv:1910.07467).

    It stays fused if the input has a lower precision than the weight, as under autocast.
    """

    def forward(self, x: Tensor) -> Tensor:  # ... D -> ... D
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)

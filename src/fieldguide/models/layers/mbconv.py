"""The inverted residual block (Sandler et al. 2018, arXiv:1801.04381, section 3.3).

With squeeze-and-excitation (Hu et al. 2017, arXiv:1709.01507) it is the MBConv of MnasNet and EfficientNet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.models.layers.conv import conv_norm
from fieldguide.models.layers.stochastic_depth import DropPath

Act = Callable[..., Tensor]


def make_divisible(width: float) -> int:
    """Return the width rounded to a multiple of 8 that is at least 90 % of the width."""
    nearest = max(8, int(width + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * width else nearest


class SqueezeExcitation(nn.Module):
    """Channel attention: a gate computed from the channel means by two 1x1 convolutions, D -> `hidden` -> D."""

    def __init__(self, dim: int, hidden: int, act: Act = F.relu, gate: Act = torch.sigmoid):
        super().__init__()
        self.down = nn.Conv2d(dim, hidden, 1)
        self.up = nn.Conv2d(hidden, dim, 1)
        self.act, self.gate = act, gate

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        return x * self.gate(self.up(self.act(self.down(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """An inverted residual: 1x1 expansion to `hidden` channels, depthwise convolution, squeeze-and-excitation, linear
    1x1 projection.

    The expansion is omitted if `hidden` equals `inputs`, squeeze-and-excitation if `squeeze` (its hidden width) is 0.
    The residual connection is used if input and output have the same shape. `act`, `squeeze_act` and `gate` take a
    tensor; `act` also takes `inplace`.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        *,
        squeeze: int = 0,
        act: Act = F.relu6,
        squeeze_act: Act = F.relu,
        gate: Act = torch.sigmoid,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        padding: str = "symmetric",
    ):
        super().__init__()
        self.expand = conv_norm(inputs, hidden, 1, eps=eps) if hidden != inputs else None
        self.depth = conv_norm(hidden, hidden, kernel, stride, hidden, eps=eps, padding=padding)
        self.squeeze = SqueezeExcitation(hidden, squeeze, squeeze_act, gate) if squeeze else None
        self.project = conv_norm(hidden, outputs, 1, eps=eps)
        self.drop_path = DropPath(drop_path)
        self.residual, self.act = stride == 1 and inputs == outputs, act

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H/stride W/stride
        y = x if self.expand is None else self.act(self.expand(x), inplace=True)
        y = self.act(self.depth(y), inplace=True)
        y = self.project(y if self.squeeze is None else self.squeeze(y))
        return self.drop_path(y).add_(x) if self.residual else y  # in place is safe: the normalization does not need its output

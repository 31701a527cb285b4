"""Convolution followed by batch normalization, with PyTorch or TensorFlow padding."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypedDict

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.errors import DataError

PADDINGS = ("symmetric", "same")


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding.

    The padding of a side of n pixels is kernel - stride + (-n % stride), and gives ceil(n / stride) outputs. If it is odd, the extra
    pixel is added at the bottom and right, so with stride 2 the output grid is shifted compared to PyTorch's symmetric padding of
    kernel // 2. Strides must not exceed the kernel.
    """

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' ceil(H/stride) ceil(W/stride)
        """Pad as much as any side needs, then cut n + kernel - 1 pixels, whatever the remainder of n: so traced sizes stay simple."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        least, most = (kernel - stride) // 2, (kernel - 1) // 2  # in front
        x = F.pad(x, (most, kernel - 1 - least) * 2)
        for dim in (2, 3):
            size = x.shape[dim] - most - (kernel - 1 - least)  # n
            before = (kernel - stride + -size % stride) // 2
            x = x.narrow(dim, most - before, size + kernel - 1)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


class ConvNormOptions(TypedDict):
    """Options that all convolutions of a model share."""

    eps: float  # of the normalization
    padding: str  # one of `PADDINGS`


def conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, *, eps: float = 1e-5, padding: str = "symmetric"
) -> nn.Sequential:
    """Return a convolution without bias followed by batch normalization. With stride 1 both paddings are the same."""
    conv: nn.Conv2d
    if padding == "same" and stride > 1:
        conv = SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    else:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs, eps)))


def check_min_side(x: Tensor, least: int, name: str) -> None:
    """Raise `DataError` for images (B C H W) with a side of less than `least` pixels."""
    if min(x.shape[2:]) < least:
        height, width = x.shape[2:]
        raise DataError(
            f"Images of {height} x {width} pixels are too small for {name}, which needs at least {least} pixels per side. "
            "Use larger images or a model for small images."
        )

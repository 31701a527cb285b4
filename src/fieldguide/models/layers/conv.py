"""Convolution and batch normalisation as one unit, with either library's padding."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.errors import DataError

PADDINGS = ("symmetric", "same")


def extra(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after a side, so that it shrinks to ceil(side / stride): TensorFlow's SAME."""
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: where the zeros are odd in number, the one more stands after the
    picture, so the grid of stride 2 lies elsewhere than with torch's padding of kernel // 2 on both sides.
    """

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' ceil(H/stride) ceil(W/stride)
        height, width = (extra(n, k, s) for n, k, s in zip(x.shape[2:], self.kernel_size, self.stride))
        if height[0] == height[1] and width[0] == width[1]:  # then the convolution adds them itself
            return F.conv2d(x, self.weight, self.bias, self.stride, (height[0], width[0]), 1, self.groups)
        return F.conv2d(F.pad(x, width + height), self.weight, self.bias, self.stride, 0, 1, self.groups)


def conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, *, eps: float = 1e-5, padding: str = "symmetric"
) -> nn.Sequential:
    """Convolution without bias, then batch normalisation. With a stride of 1 both paddings are the same."""
    if padding == "same" and stride > 1:
        conv = SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    else:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs, eps)))


def check_side(x: Tensor, least: int, name: str) -> None:
    """Raises `DataError` for pictures (B C H W) of which nothing would be left."""
    if min(x.shape[2:]) < least:
        height, width = x.shape[2:]
        raise DataError(
            f"pictures of {height} x {width} are too small: {name} shrinks them and needs at least {least} "
            "pixels a side. Give larger ones, or a network for small pictures."
        )

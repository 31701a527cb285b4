"""Layers with equalized learning rate (Karras et al. 2017, "Progressive Growing of GANs", arXiv:1710.10196, section 4.1).

Weights are stored with a standard deviation of 1 and scaled by 1 / sqrt(inputs) whenever they are used. An optimizer that
normalizes gradients then changes all weights at the same relative rate.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EqualizedLinear(nn.Module):
    """Linear layer with equalized learning rate.

    Args:
        rate: factor of the learning rate of weights and biases: the stored weights are larger by 1 / rate.
        gain: factor of the weights, such as sqrt(2) before a leaky ReLU.
        first_bias: initial value of the bias.
    """

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = True, rate: float = 1.0, gain: float = 1.0, first_bias: float = 0.0
    ):
        super().__init__()
        self.rate, self.scale = rate, gain * rate / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        nn.init.normal_(self.weight, 0.0, 1 / rate)
        self.bias = nn.Parameter(torch.full((outputs,), first_bias)) if bias else None

    def forward(self, x: Tensor) -> Tensor:  # B I -> B O
        return F.linear(x, self.weight * self.scale, None if self.bias is None else self.bias * self.rate)


class EqualizedConv2d(nn.Module):
    """Convolution with equalized learning rate. `padding` is the same on all sides, `gain` a factor of the weights."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        bias: bool = True,
        stride: int = 1,
        padding: int = 0,
        gain: float = 1.0,
    ):
        super().__init__()
        self.scale, self.stride, self.padding = gain / math.sqrt(inputs * kernel**2), stride, padding
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        nn.init.normal_(self.weight)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:  # B I H W -> B O H' W'
        return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, self.padding)

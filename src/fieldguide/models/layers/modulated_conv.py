"""Modulated convolution of StyleGAN 2 (Karras et al. 2019, arXiv:1912.04958, section 2.2).

Each example has its own kernel: its input channels are scaled by the example's style, and then each output channel is divided by
the norm of its kernel ("demodulation"), which keeps the expected size of the output. Here the image is scaled instead of the
kernel, which gives the same numbers with one convolution for all examples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fieldguide.models.layers.upfirdn import upfirdn

EPSILON = 1e-8  # added to the squared norm of a kernel


def modulated_conv(
    x: Tensor, weight: Tensor, style: Tensor, *, demodulate: bool = True, padding: int | None = None
) -> Tensor:  # B I H W, O I K K, B I -> B O H W
    """Convolve each image with the kernel of its style: equations 1 and 3. `padding` is (K - 1) / 2 by default."""
    y = F.conv2d(x * style[:, :, None, None], weight, padding=weight.shape[-1] // 2 if padding is None else padding)
    return y * compute_demodulation(weight, style)[:, :, None, None] if demodulate else y


def modulated_conv_up(x: Tensor, weight: Tensor, style: Tensor, taps: Tensor) -> Tensor:  # B I H W, ..., B I, T -> B O 2H 2W
    """Double the sides by a modulated, transposed convolution, and filter the result: section 2.2 and appendix B.

    The kernel is the one that is convolved with the zero-inserted image, not correlated. `taps` has an even length.
    """
    y = F.conv_transpose2d(x * style[:, :, None, None], weight.transpose(0, 1), stride=2)  # B O 2H+K-2 2W+K-2
    total = len(taps) + 1 - weight.shape[-1]  # pixels of padding that leave 2H
    y = upfirdn(y, taps, padding=((total + 1) // 2, total // 2), gain=4.0)
    return y * compute_demodulation(weight, style)[:, :, None, None]


def compute_demodulation(weight: Tensor, style: Tensor) -> Tensor:  # O I K K, B I -> B O
    """Return one over the norm of each example's kernel of each output channel."""
    return torch.rsqrt(style.square() @ weight.square().sum((2, 3)).T + EPSILON)

"""Resampling of images by a filter: insert zeros, pad, convolve, keep every n-th pixel.

Known as "upfirdn" in signal processing, and used for anti-aliased resampling by StyleGAN 2 (Karras et al. 2019,
arXiv:1912.04958). The zeros are never stored: a transposed convolution enlarges and a strided one reduces, with one filter per
channel.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

MAX_SQUARE_TAPS = 4  # longer separable filters are applied along one axis after the other


def upfirdn(
    x: Tensor, taps: Tensor, up: int = 1, down: int = 1, padding: tuple[int, int] = (0, 0), gain: float = 1.0
) -> Tensor:  # B C H W, T or T T -> B C H' W'
    """Resample images; H' = (H * up + sum(padding) - T) // down + 1.

    Args:
        taps: the filter; a vector is applied along both axes, a matrix as it is. As usual for filters, it is convolved, not
            correlated: the last tap meets the first pixel.
        up: factor of the sides; each pixel is followed by `up - 1` zeros.
        down: of the filtered pixels, every `down`-th along each axis is kept, from the first.
        padding: zeros before and after the enlarged image along each axis; a negative number cuts pixels off.
        gain: factor of the result. It should be `up ** 2` to keep the mean of an enlarged image.
    """
    taps = taps.to(x.dtype)
    if taps.ndim == 1 and len(taps) > MAX_SQUARE_TAPS:
        column, row = (taps * gain)[:, None], taps[None]
        return resample(resample(x, column, (up, 1), (down, 1), padding), row, (1, up), (1, down), padding)
    return resample(x, (taps[:, None] * taps if taps.ndim == 1 else taps) * gain, (up, up), (down, down), padding)


def resample(
    x: Tensor, kernel: Tensor, up: tuple[int, int], down: tuple[int, int], padding: tuple[int, int]
) -> Tensor:  # B C H W, I J -> B C H' W'
    """Resample images by a matrix; along an axis where it has one tap and `up` is 1, nothing is padded."""
    channels = x.shape[1]
    low = [padding[0] if kernel.shape[i] > 1 or up[i] > 1 else 0 for i in (0, 1)]
    high = [padding[1] if kernel.shape[i] > 1 or up[i] > 1 else 0 for i in (0, 1)]
    if up == (1, 1):
        if low == high and min(low) >= 0:
            flipped = kernel.flip(0, 1)[None, None].expand(channels, 1, -1, -1)
            return F.conv2d(x, flipped, stride=down, padding=low, groups=channels)
        x = F.pad(x, (low[1], high[1], low[0], high[0]))
        return F.conv2d(x, kernel.flip(0, 1)[None, None].expand(channels, 1, -1, -1), stride=down, groups=channels)
    # The transposed convolution gives all sums of the zero-padded image; `low` and `high` say which of them are kept.
    before = [kernel.shape[i] - 1 - low[i] for i in (0, 1)]
    after = [kernel.shape[i] - up[i] - high[i] for i in (0, 1)]
    cut = [max(0, min(a, b)) for a, b in zip(before, after)]
    weight = kernel[None, None].expand(channels, 1, -1, -1)
    y = F.conv_transpose2d(x, weight, stride=up, padding=cut, groups=channels)
    before, after = [a - c for a, c in zip(before, cut)], [a - c for a, c in zip(after, cut)]
    if any(before) or any(after):
        y = F.pad(y, (-before[1], -after[1], -before[0], -after[0]))
    return y[:, :, :: down[0], :: down[1]] if down != (1, 1) else y

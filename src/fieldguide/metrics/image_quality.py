"""Quality of images compared with their targets: mean absolute error, PSNR and SSIM. Images are in -1 .. 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5  # side in pixels and standard deviation of SSIM's Gaussian window
LUMINANCE, CONTRAST = 0.01, 0.03  # the constants K1 and K2 of SSIM
MAX_PSNR = 100.0  # dB, of equal images


def absolute_error(made: Tensor, real: Tensor) -> Tensor:  # N C H W -> N
    """Return the mean absolute error of each image as a fraction of the range of pixels."""
    return (made - real).abs().flatten(1).mean(1) / 2


def psnr(made: Tensor, real: Tensor) -> Tensor:  # N C H W -> N
    """Return the peak signal-to-noise ratio of each image in dB, at most `MAX_PSNR`."""
    error = ((made - real) ** 2).flatten(1).mean(1) / 4
    return (-10 * torch.log10(error)).clamp(max=MAX_PSNR)


def ssim(made: Tensor, real: Tensor) -> Tensor:  # N C H W -> N
    """Return the structural similarity of each image (Wang et al. 2004, doi:10.1109/TIP.2003.819861, equation 13).

    The mean over all windows that lie inside the image, and over channels. Images with sides below 11 pixels have smaller windows.
    """
    side = min(WINDOW, *(length - (length + 1) % 2 for length in made.shape[2:]))  # odd
    places = torch.arange(side, dtype=torch.float64) - side // 2
    weights = torch.exp(-(places**2) / (2 * SIGMA**2))
    weights = (weights / weights.sum()).to(made)
    channels = made.shape[1]

    def blur(x: Tensor) -> Tensor:
        rows, columns = weights.view(1, 1, side, 1), weights.view(1, 1, 1, side)
        for kernel in (rows, columns):
            x = F.conv2d(x, kernel.expand(channels, -1, -1, -1), groups=channels)
        return x

    a, b = (made + 1) / 2, (real + 1) / 2
    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b, covariance = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    found = ((2 * mean_a * mean_b + LUMINANCE**2) * (2 * covariance + CONTRAST**2)) / (
        (mean_a**2 + mean_b**2 + LUMINANCE**2) * (variance_a + variance_b + CONTRAST**2)
    )
    return found.flatten(1).mean(1)

"""Do resampling and modulated convolutions take less time than as they are written down?

    python benchmarks/stylegan_ops.py [--save] [--threads 1]

Forward and backward passes of the operations of StyleGAN 2 and 3, against the straightforward ones in the same run: insert zeros, pad
and convolve each map; one kernel for each image of a batch (a convolution in as many groups). Both must give the same numbers. The
best of several turns counts, which both take alternately.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import make_parser, parse_options, report
from torch import Tensor

from fieldguide.models.layers.lowpass import design_lowpass
from fieldguide.models.layers.modulated_conv import modulated_conv, modulated_conv_up
from fieldguide.models.layers.upfirdn import upfirdn

TURNS = 15
SMOOTH = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8


def plain_resample(x: Tensor, taps: Tensor, up: int, down: int, padding: tuple[int, int], gain: float) -> Tensor:
    batch, channels, height, width = x.shape
    x = F.pad(x[:, :, :, None, :, None], (0, up - 1, 0, 0, 0, up - 1)).reshape(batch, channels, height * up, width * up)
    kernel = (taps[:, None] * taps if taps.ndim == 1 else taps).flip(0, 1) * gain
    x = F.pad(x, (*padding, *padding))
    return F.conv2d(x, kernel.expand(channels, 1, -1, -1), groups=channels)[:, :, ::down, ::down]


def plain_modulated(x: Tensor, weight: Tensor, style: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    kernels = weight * style[:, None, :, None, None]  # B O I K K
    kernels = kernels * torch.rsqrt(kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    x = F.conv2d(x.reshape(1, batch * channels, height, width), kernels.flatten(0, 1), padding=1, groups=batch)
    return x.reshape(batch, -1, height, width)


def plain_modulated_up(x: Tensor, weight: Tensor, style: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    kernels = weight * style[:, None, :, None, None]
    kernels = kernels * torch.rsqrt(kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    large = F.pad(x[:, :, :, None, :, None], (0, 1, 0, 0, 0, 1)).reshape(1, batch * channels, height * 2, width * 2)
    large = F.pad(large, (2, 1, 2, 1))
    y = F.conv2d(large, kernels.flip(3, 4).flatten(0, 1), groups=batch)
    return plain_resample(y.reshape(batch, -1, 2 * height + 1, 2 * width + 1), SMOOTH, 1, 1, (1, 1), 4.0)


def build_lines() -> list[tuple[str, tuple[Tensor, ...], Callable[..., Tensor], Callable[..., Tensor]]]:
    """Return name, inputs, ours and the plain function of each operation."""
    torch.manual_seed(0)
    long = design_lowpass(12, 4.0, 8.0, 32.0).float()
    radial = design_lowpass(12, 4.0, 8.0, 32.0, radial=True).float()

    def resampled(taps: Tensor, up: int, down: int, padding: tuple[int, int], gain: float) -> tuple[Callable, Callable]:
        return (
            lambda x: upfirdn(x, taps, up, down, padding, gain),
            lambda x: plain_resample(x, taps, up, down, padding, gain),
        )

    maps, large = torch.randn(16, 64, 16, 16), torch.randn(4, 64, 36, 36)
    weight, style = torch.randn(64, 64, 3, 3), torch.randn(16, 64)
    return [
        ("twice the side, 4 taps", (maps,), *resampled(SMOOTH, 2, 1, (2, 1), 4.0)),
        ("half of the side, 4 taps", (maps,), *resampled(SMOOTH, 1, 2, (1, 1), 1.0)),
        ("smooth, 4 taps", (maps,), *resampled(SMOOTH, 1, 1, (2, 1), 1.0)),
        ("twice the side, 12 taps", (large,), *resampled(long, 2, 1, (6, 5), 4.0)),
        ("half of the side, 12 taps", (large,), *resampled(long, 1, 2, (5, 5), 1.0)),
        ("half of the side, 12 x 12 taps", (large,), *resampled(radial, 1, 2, (5, 5), 1.0)),
        ("modulated convolution", (maps, weight, style), modulated_conv, plain_modulated),
        (
            "modulated convolution, twice the side",
            (maps, weight, style),
            lambda x, w, s: modulated_conv_up(x, w, s, SMOOTH),
            plain_modulated_up,
        ),
    ]


def time_once(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    started = time.perf_counter()
    function(*inputs).sum().backward()
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    options = parse_options(make_parser(__doc__.splitlines()[0]))
    rows = []
    for name, inputs, ours, plain in build_lines():
        torch.testing.assert_close(ours(*inputs), plain(*inputs), rtol=1e-3, atol=1e-4)
        turns = [(time_once(ours, inputs), time_once(plain, inputs)) for _ in range(TURNS)]
        a, b = (min(turn[k] for turn in turns) for k in (0, 1))
        rows.append([name, f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}"])
    columns = ["operation, forward and backward", "ours, ms", "plain, ms", "plain / ours"]
    report(
        "Operations of StyleGAN 2 and 3",
        columns,
        rows,
        options.save,
        "16 x 64 maps of 16 x 16; with 12 taps 4 x 64 of 36 x 36.",
    )


if __name__ == "__main__":
    main()

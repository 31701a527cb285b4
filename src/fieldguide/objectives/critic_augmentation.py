"""Adaptive augmentation of what a critic sees, for GANs with little data (ADA; Karras et al. 2020, arXiv:2006.06676).

Real and generated images are augmented alike, each transformation with the same probability p. As long as p is well below 1, the
generator still learns the images as they are, because augmented images can be distinguished from the data (section 2.2). p rises while
the critic overfits: while the signs of its scores of training images have a mean above a target (section 3).

Everything is linear in the images and has second derivatives, so that gradient penalties work.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fieldguide.models.layers.upfirdn import upfirdn

# Low-pass filter of the symlet with six vanishing moments (Daubechies 1992, "Ten Lectures on Wavelets", section 8.1.1), with which
# images are enlarged before they are moved, and reduced afterwards: doing both without moving changes nothing.
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
MARGIN = 6  # pixels by which images are mirrored at their borders
FILTER_REACH = 3  # pixels on each side of one that the filters read
SHIFT = 0.125  # largest whole-pixel shift, and deviation of other shifts, as fractions of a side
SCALE_DEVIATION = 0.2 * math.log(2)  # of the logarithm of scales
BRIGHTNESS_DEVIATION = 0.2
CONTRAST_DEVIATION = 0.5 * math.log(2)  # of the logarithm
SATURATION_DEVIATION = math.log(2)  # of the logarithm


def augment(x: Tensor, p: float) -> Tensor:  # B C H W -> B C H W
    """Apply each transformation of pixels, geometry and color to each image with probability p (appendix B)."""
    if p <= 0:
        return x
    moved = resample(x, sample_motion(len(x), p, (x.shape[2], x.shape[3]), x.device).to(x.dtype))
    return change_colors(moved, sample_colors(len(x), p, x.device).to(x.dtype))


def choose(count: int, p: float, device: torch.device) -> Tensor:  # -> B bool
    return torch.rand(count, device=device) < p


def sample_motion(count: int, p: float, shape: tuple[int, int], device: torch.device) -> Tensor:  # -> B 3 3
    """Return matrices that map places of the new image to places of the old one, in pixels from the center (x, y, 1)."""
    one, zero = torch.ones(count, device=device), torch.zeros(count, device=device)

    def matrix(*rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return torch.stack([torch.stack(row, 1) for row in (*rows, (zero, zero, one))], 1)

    def scale(x: Tensor, y: Tensor) -> Tensor:
        return matrix((1 / x, zero, zero), (zero, 1 / y, zero))

    def rotate(angle: Tensor) -> Tensor:
        return matrix((angle.cos(), angle.sin(), zero), (-angle.sin(), angle.cos(), zero))

    def shift(x: Tensor, y: Tensor) -> Tensor:
        return matrix((one, zero, -x), (zero, one, -y))

    def uniform() -> Tensor:  # -1 .. 1
        return 2 * torch.rand(count, device=device) - 1

    def normal() -> Tensor:
        return torch.randn(count, device=device)

    def where(value: Tensor, otherwise: float, probability: float = p) -> Tensor:
        return torch.where(choose(count, probability, device), value, otherwise)

    sides = torch.tensor([shape[1], shape[0]], device=device, dtype=torch.float32)  # width and height
    # Pixels: mirror, quarter turns, whole shifts.
    motion = scale(where(torch.randint(2, (count,), device=device) * -2.0 + 1, 1.0), one)
    motion = motion @ rotate(where(torch.randint(4, (count,), device=device) * (math.pi / 2), 0.0))
    moves = choose(count, p, device)
    motion = motion @ shift(*(torch.where(moves, (SHIFT * uniform() * side).round(), 0.0) for side in sides))
    # Geometry. Before and after a stretch there are rotations, each with a probability that makes p for both.
    once = 1 - math.sqrt(max(0.0, 1 - p))
    factor = where(torch.exp(SCALE_DEVIATION * normal()), 1.0)
    motion = motion @ scale(factor, factor) @ rotate(where(math.pi * uniform(), 0.0, once))
    factor = where(torch.exp(SCALE_DEVIATION * normal()), 1.0)
    motion = motion @ scale(factor, 1 / factor) @ rotate(where(math.pi * uniform(), 0.0, once))
    moves = choose(count, p, device)
    return motion @ shift(*(torch.where(moves, SHIFT * normal() * side, 0.0) for side in sides))


def resample(x: Tensor, motion: Tensor) -> Tensor:  # B C H W, B 3 3 -> B C H W
    """Move images. What lies outside is mirrored at the border; places between pixels are computed from the enlarged image."""
    height, width = x.shape[2:]
    taps = torch.tensor(SYM6, dtype=x.dtype, device=x.device) / math.sqrt(2)
    margins = min(MARGIN, height - 1), min(MARGIN, width - 1)
    canvas = F.pad(x, (margins[1], margins[1], margins[0], margins[0]), mode="reflect")
    # Both paddings center the filter on its main taps, so that pixel i is at place 2 i of the enlarged image.
    large = upfirdn(canvas, taps, up=2, padding=(6, 5), gain=4.0)  # B C 2H' 2W'
    sizes = canvas.shape[2] * 2, canvas.shape[3] * 2
    rows, columns = (torch.arange(size, dtype=x.dtype, device=x.device) for size in sizes)
    down = (rows / 2 - margins[0] - (height - 1) / 2)[:, None].expand(sizes)  # from the image's center, in pixels
    right = (columns / 2 - margins[1] - (width - 1) / 2)[None].expand(sizes)
    target = torch.stack([right, down, torch.ones_like(right)], -1).reshape(-1, 3)  # N 3
    place = target @ motion[:, :2].transpose(1, 2)  # B N 2
    across = mirror(place[..., 0] + (width - 1) / 2, width - 1, margins[1] - FILTER_REACH)
    along = mirror(place[..., 1] + (height - 1) / 2, height - 1, margins[0] - FILTER_REACH)
    moved = interpolate(large, 2 * (along + margins[0]), 2 * (across + margins[1]))
    small = upfirdn(moved.unflatten(2, sizes), taps.flip(0), down=2, padding=(5, 6))
    return small[:, :, margins[0] : margins[0] + height, margins[1] : margins[1] + width]


def mirror(place: Tensor, last: int, margin: int) -> Tensor:
    """Mirror coordinates into 0 .. last, except those that are at most `margin` outside."""
    near = (place >= -margin) & (place <= last + margin)
    folded = place.abs().remainder(2 * last)
    return torch.where(near, place, torch.minimum(folded, 2 * last - folded))


def interpolate(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:  # B C H W, B N, B N -> B C N
    """Return bilinear interpolations at places within the images.

    `F.grid_sample` computes the same, but its gradient cannot be differentiated again.
    """
    height, width = x.shape[2:]
    top, left = rows.floor().clamp(0, height - 2), columns.floor().clamp(0, width - 2)
    down, right = rows - top, columns - left
    first = (top * width + left).long()
    flat, result = x.flatten(2), torch.zeros((), dtype=x.dtype, device=x.device)
    for step, weight in (
        (0, (1 - down) * (1 - right)),
        (1, (1 - down) * right),
        (width, down * (1 - right)),
        (width + 1, down * right),
    ):
        index = (first + step)[:, None].expand(-1, x.shape[1], -1)
        result = result + flat.gather(2, index) * weight[:, None]
    return result


def sample_colors(count: int, p: float, device: torch.device) -> Tensor:  # -> B 4 4
    """Return matrices for (red, green, blue, 1): brightness, contrast, inverted luma, hue and saturation."""
    identity = torch.eye(4, device=device).expand(count, -1, -1)
    gray = torch.tensor([1.0, 1.0, 1.0, 0.0], device=device) / math.sqrt(3)
    luma = torch.outer(gray, gray)  # projects on the axis of gray colors

    def when(matrix: Tensor) -> Tensor:
        return torch.where(choose(count, p, device)[:, None, None], matrix, identity)

    def normal() -> Tensor:
        return torch.randn(count, device=device)[:, None, None]

    colors = torch.eye(4, device=device)
    colors[3, 3] = 0  # the three colors without the constant
    constant = torch.zeros(4, 4, device=device)
    constant[:3, 3] = 1
    last = torch.eye(4, device=device) - colors
    matrix = when(identity + BRIGHTNESS_DEVIATION * normal() * constant)
    matrix = when(colors * torch.exp(CONTRAST_DEVIATION * normal()) + last) @ matrix
    matrix = when(identity - 2 * luma * torch.randint(2, (count, 1, 1), device=device)) @ matrix
    angle = math.pi * (2 * torch.rand(count, 1, 1, device=device) - 1)
    turn = torch.zeros(4, 4, device=device)  # cross product with the gray axis
    turn[0, 1], turn[0, 2], turn[1, 2] = -gray[2], gray[1], -gray[0]
    turn = turn - turn.T
    matrix = when(luma + last + (colors - luma) * angle.cos() + turn * angle.sin()) @ matrix
    return when(luma + last + (colors - luma) * torch.exp(SATURATION_DEVIATION * normal())) @ matrix


def change_colors(x: Tensor, matrix: Tensor) -> Tensor:  # B C H W, B 4 4 -> B C H W
    """Apply matrices to colors. Images without three channels change as gray ones do: by the mean of the rows."""
    if x.shape[1] == 3:
        return torch.einsum("bij,bjhw->bihw", matrix[:, :3, :3], x) + matrix[:, :3, 3, None, None]
    mean = matrix[:, :3].mean(1)
    return x * mean[:, :3].sum(1)[:, None, None, None] + mean[:, 3][:, None, None, None]


class AdaptiveProbability:
    """The probability p of augmentations, adapted to the critic's scores of training images.

    Args:
        target: mean sign of the scores above which p rises, and below which it falls.
        images: training images after which p can have risen from 0 to 1.
    """

    INTERVAL = 4  # steps of the critic between two changes of p

    def __init__(self, target: float = 0.6, images: int = 500_000):
        self.target, self.images, self.value = target, images, 0.0

    def update(self, mean_sign: float, seen: float) -> None:
        """Change p after `seen` images, the signs of whose scores have this mean."""
        direction = (mean_sign > self.target) - (mean_sign < self.target)
        self.value = min(1.0, max(0.0, self.value + direction * seen / self.images))

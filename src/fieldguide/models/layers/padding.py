"""Helpers for padded batches of sequences, and for images whose sides a network must halve."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ensure_nonempty(mask: Tensor) -> Tensor:  # B T bool -> B T bool
    """Return the mask with the first position of empty rows set to True, which avoids division by zero."""
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    return mask | (first & ~mask.any(1, keepdim=True))


def lengths(mask: Tensor) -> Tensor:  # B T bool -> B int64
    """Return the number of positions up to and including the last real token; at least 1."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * places).amax(1).clamp(min=1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:  # B T D, B T bool -> B D
    """Return the mean over the real positions."""
    weight = mask[..., None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1)


def select_position(x: Tensor, place: Tensor) -> Tensor:  # B T D, B int64 -> B D
    """Select one position per row."""
    return x.gather(1, place[:, None, None].expand(-1, 1, x.shape[-1])).squeeze(1)


def reverse(x: Tensor, length: Tensor) -> Tensor:  # B T D, B int64 -> B T D
    """Reverse the first `length` positions of each row; the rest is unchanged. Applying it twice restores the input."""
    place = torch.arange(x.shape[1], device=x.device)
    place = torch.where(place < length[:, None], length[:, None] - 1 - place, place)
    return x.gather(1, place[..., None].expand(-1, -1, x.shape[-1]))


def pad_map(x: Tensor, height: int, width: int) -> Tensor:  # B H W D -> B height width D
    """Append rows and columns of zeros to a map, up to a height and width. Sides that a traced graph leaves open are always padded."""
    down, right = height - x.shape[1], width - x.shape[2]
    is_known = isinstance(down, int) and isinstance(right, int)
    return x if is_known and not down and not right else F.pad(x, (0, 0, 0, right, 0, down))


def shift_cyclic(x: Tensor, steps: int, dim: int) -> Tensor:
    """Return `x.roll(-steps, dim)` for 0 to n steps, as a concatenation, which graphs have for any number of steps."""
    return torch.cat([x.narrow(dim, steps, x.shape[dim] - steps), x.narrow(dim, 0, steps)], dim)


def extend_image(image: Tensor, multiple: int) -> Tensor:  # B C H W -> B C H' W'
    """Repeat the last row and column of images until the sides are multiples of `multiple`."""
    high, wide = (-side % multiple for side in image.shape[2:])
    return F.pad(image, (0, wide, 0, high), mode="replicate") if high or wide else image

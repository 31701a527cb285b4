"""Rows of different length in one tensor: what is real and what only fills up."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_one(mask: Tensor) -> Tensor:  # B T bool -> B T bool
    """The mask with the first place of an empty row made real, so that nothing is divided by zero."""
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    return mask | (first & ~mask.any(1, keepdim=True))


def lengths(mask: Tensor) -> Tensor:  # B T bool -> B int64
    """Tokens up to and with the last real one; at least 1."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * places).amax(1).clamp(min=1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:  # B T D, B T bool -> B D
    """Mean over the real places."""
    weight = mask[..., None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1)


def pick(x: Tensor, place: Tensor) -> Tensor:  # B T D, B int64 -> B D
    """One place a row."""
    return x.gather(1, place[:, None, None].expand(-1, 1, x.shape[-1])).squeeze(1)


def reverse(x: Tensor, length: Tensor) -> Tensor:  # B T D, B int64 -> B T D
    """The first `length` places of each row in reverse order; what follows stays. Its own inverse."""
    place = torch.arange(x.shape[1], device=x.device)
    place = torch.where(place < length[:, None], length[:, None] - 1 - place, place)
    return x.gather(1, place[..., None].expand(-1, -1, x.shape[-1]))

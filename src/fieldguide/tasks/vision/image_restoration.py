"""Restoration as image to image: inputs that are made from images, in gray or with fewer pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DEGRADATIONS = ("", "gray", "2x", "3x", "4x", "8x")  # "" for data that has targets
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601), as in Pillow


def degrade(real: Tensor, how: str, channels: int) -> Tensor:  # N K S S uint8 -> N channels S S uint8
    """Return the inputs that are made from images: gray, or smaller by a factor and enlarged again.

    Images are enlarged as files are when they are read for a prediction (bilinear).
    """
    x = convert_channels(real.float(), channels)
    if how.endswith("x"):
        side = max(1, x.shape[-1] // int(how[:-1]))
        small = F.interpolate(x, (side, side), mode="area").round()
        x = F.interpolate(small, x.shape[2:], mode="bilinear", align_corners=False)
    return x.round().clamp(0, 255).to(torch.uint8)


def convert_channels(x: Tensor, channels: int) -> Tensor:  # N C S S -> N channels S S
    """Return images with 1 or 3 channels."""
    if x.shape[1] == channels:
        return x
    if channels == 1:
        return (x * torch.tensor(LUMA, dtype=x.dtype).view(3, 1, 1)).sum(1, keepdim=True)
    return x.expand(-1, channels, -1, -1)

"""Causal layers of video autoencoders: convolutions that see no later frames, so that a video can be computed in parts."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.errors import DataError

Cache = dict[nn.Module, Tensor]  # layer -> its last frames of the part before


class CausalConv(nn.Conv3d):
    """Convolution of 3 frames, the last of which is the one that it computes, and `side` x `side` positions.

    Before the first frame there are zeros, or copies of it.
    """

    def __init__(self, inputs: int, dim: int, side: int = 3, repeats_first: bool = False):
        super().__init__(inputs, dim, (3, side, side), padding=(0, side // 2, side // 2))
        self.repeats_first = repeats_first

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # B D F H W -> B D' F H W
        past = None if cache is None else cache.get(self)
        if past is None:
            first = x[:, :, :1]
            past = (first if self.repeats_first else torch.zeros_like(first)).expand(-1, -1, 2, -1, -1)
        x = torch.cat([past, x], 2)
        if cache is not None:
            cache[self] = x[:, :, -2:]
        return super().forward(x)


def map_frames(layer: nn.Module, x: Tensor) -> Tensor:  # B D F H W -> B D' F H' W'
    """Return a function of images, computed for each frame."""
    return layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, x.shape[2])).transpose(1, 2)


def check_video(video: Tensor, stride: int, frame_stride: int) -> None:  # B F C H W
    """Raise `DataError` if sides are not multiples of `stride`, or frames not one more than a multiple of `frame_stride`."""
    frames, _, *sides = video.shape[1:]
    if any(side % stride for side in sides) or (frames - 1) % frame_stride:
        raise DataError(
            f"a video of {frames} frames of {sides[1]} x {sides[0]} pixels cannot be encoded: its sides must be multiples of "
            f"{stride}, its frames one more than a multiple of {frame_stride}. Crop or resize it."
        )


def pad_video(video: Tensor, stride: int, frame_stride: int) -> Tensor:  # B F C H W -> B F' C H' W'
    """Return a video with its last row, column and frame repeated up to a size that `check_video` accepts."""
    frames, _, height, width = video.shape[1:]
    extra = (0, -width % stride, 0, -height % stride, 0, (1 - frames) % frame_stride)
    return F.pad(video.transpose(1, 2), extra, mode="replicate").transpose(1, 2)


class VideoAutoencoder(nn.Module):
    """Base of autoencoders of videos whose latents are divided by one standard deviation.

    `encode` takes videos whose sides are multiples of `stride` and that have one frame more than a multiple of `frame_multiple`, which
    is usually `frame_stride`, the number of frames of a latent. `part` is the number of latents that are decoded at once by default.
    """

    part: ClassVar[int]
    stride: int
    frame_stride: int
    frame_multiple: int
    config: Any

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:  # B F C H W -> B f L h w, B f L h w
        """Return the means of the latents and the logarithms of their variances."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:  # B f L h w -> B F C H W
        """Return the videos of latents as the encoder gives them."""
        raise NotImplementedError

    def normalize(self, z: Tensor) -> Tensor:  # B f L h w -> B f L h w
        """Return latents as diffusion works on them, with a standard deviation of about 1."""
        return z * self.config.scaling

    def denormalize(self, z: Tensor) -> Tensor:  # B f L h w -> B f L h w
        """Return latents as `decode` expects them."""
        return z / self.config.scaling

    def forward(self, video: Tensor) -> Tensor:  # B F C H W -> B F C H W
        frames, _, height, width = video.shape[1:]
        padded = pad_video(video, self.stride, self.frame_multiple)
        return self.decode(self.encode(padded)[0])[:, :frames, :, :height, :width]

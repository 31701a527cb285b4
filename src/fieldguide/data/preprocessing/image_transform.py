"""Pictures: one side, one number of channels, and pixel values with mean 0 and standard deviation 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from fieldguide.core.errors import SettingsError
from fieldguide.data.media import images

if TYPE_CHECKING:
    import torch

SIDES = (8, 16, 24, 28, 32, 48, 64, 96, 128, 160, 192, 224)
ENOUGH = 5000  # pictures that mean and deviation are learnt on; more change the third digit


def suggest_side(widths: Sequence[int] | np.ndarray, heights: Sequence[int] | np.ndarray) -> int:
    """The largest usual side that at least half of the pictures fill: 8 to 224 pixels."""
    median = float(np.median(np.minimum(np.asarray(widths), np.asarray(heights))))
    return max((s for s in SIDES if s <= median), default=SIDES[0])


@dataclass(frozen=True)
class Pictures:
    """How pictures become tensors: S pixels a side, 1 or 3 channels, `mean` and `std` of each (0 to 1)."""

    side: int
    channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    fit: images.Fit = "crop"

    @classmethod
    def from_pixels(cls, pixels: torch.Tensor, fit: images.Fit = "crop") -> Pictures:
        """From training pixels as `images.load` gives them: uint8, N C S S."""
        some = pixels[:: max(1, len(pixels) // ENOUGH)].double() / 255  # evenly spread
        mean, std = some.mean((0, 2, 3)), some.std((0, 2, 3), correction=0)
        return cls(pixels.shape[-1], pixels.shape[1], tuple(mean.tolist()), tuple(max(s, 1e-3) for s in std.tolist()), fit)

    def scaled(self, text: str) -> Pictures:
        """With mean and deviation of each channel as "mean,mean,mean/std,std,std" says. Raises `SettingsError` where it
        does not say so many."""
        try:
            mean, std = (tuple(float(number) for number in part.split(",")) for part in text.split("/"))
        except ValueError:
            mean, std = (), ()
        if not len(mean) == len(std) == self.channels or min(std) <= 0:
            raise SettingsError(
                f"task.pixels={text!r} is no mean and deviation of {self.channels} "
                f"channel{'s' if self.channels > 1 else ''}, such as "
                f"{'/'.join(','.join([each] * self.channels) for each in ('0.5', '0.25'))}."
            )
        return replace(self, mean=mean, std=std)

    def resized(self, text: str) -> Resized:
        """With a way to their size such as "crop 0.875 bicubic" (see `Resized`). Raises `SettingsError` for another."""
        even = text.endswith(" even")
        try:
            fit, *share, name = text.removesuffix(" even").split()
            part, name = float(*share) if share else 1.0, Image.Resampling[name.upper()]
        except (ValueError, KeyError, TypeError):
            fit, part, name = "", 1.0, Image.Resampling.BICUBIC
        if fit not in ("crop", "pad", "stretch") or not 0 < part <= 1 or (part < 1 and fit == "pad"):
            raise SettingsError(
                f"task.resize={text!r} is no way to resize pictures, such as: crop bicubic (the middle of it), "
                "crop 0.875 bicubic (so much of the middle), pad bilinear, stretch bicubic."
            )
        return Resized(self.side, self.channels, self.mean, self.std, fit, round(self.side / part), name, even)

    def load(self, paths: Sequence[str | Path]) -> torch.Tensor:
        """Files as uint8, N C S S. Raises DataError naming those that cannot be read."""
        return images.load(paths, self.side, self.channels, fit=self.fit)

    def apply(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 ... C S S -> float32 with mean 0 and deviation 1, on the device of `pixels`."""
        import torch

        mean = torch.tensor(self.mean, device=pixels.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(-1, 1, 1)
        return (pixels.float() / 255 - mean) / std

    def remade(self, x: torch.Tensor, other: Pictures) -> torch.Tensor:
        """Pictures as `apply` gives them, B C S S, as `other` would have given them but for the filter of another size."""
        import torch
        import torch.nn.functional as F

        if self == other:
            return x
        numbers = lambda values: torch.tensor(values, device=x.device, dtype=x.dtype).view(-1, 1, 1)
        x = x * numbers(self.std) + numbers(self.mean)
        if self.channels == 3 and other.channels == 1:
            x = (x * numbers((0.299, 0.587, 0.114))).sum(1, keepdim=True)  # ITU-R BT.601, as the reader makes grey
        elif self.channels != other.channels:
            x = x.expand(-1, other.channels, -1, -1)
        if self.side != other.side:
            x = F.interpolate(x, (other.side, other.side), mode="bilinear", antialias=True)
        return (x - numbers(other.mean)) / numbers(other.std)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Pictures:
        values = (saved["side"], saved["channels"], tuple(saved["mean"]), tuple(saved["std"]), saved["fit"])
        return (
            Resized(*values, saved["edge"], Image.Resampling(saved["filter"]), saved.get("even", False))
            if "edge" in saved
            else cls(*values)
        )


@dataclass(frozen=True)
class Resized(Pictures):
    """Pictures as published networks were shown them, by a filter of Pillow's: "crop" scales the shorter side to `edge`,
    "stretch" both, and the middle is cut out of that; "pad" scales the longer side and fills up with white."""

    edge: int = 224  # pixels of the shorter side, or of both, before the cut
    filter: int = Image.Resampling.BICUBIC
    even: bool = False  # a middle between two pixels is the even one, as torchvision's, not the lower

    @property
    def way(self) -> str:
        """What `resized` reads."""
        share = f" {self.side / self.edge}" if self.edge != self.side else ""
        return f"{self.fit}{share} {Image.Resampling(self.filter).name.lower()}{' even' if self.even else ''}"

    def load(self, paths: Sequence[str | Path]) -> torch.Tensor:
        """Files as uint8, N C S S. Raises DataError naming those that cannot be read."""
        return images.load(paths, self.side, self.channels, resize=self.cut)

    def cut(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.fit == "pad":
            return ImageOps.pad(image, (self.side, self.side), self.filter, color="white")
        short, long = sorted(image.size)
        longer = self.edge if self.fit == "stretch" else int(self.edge * long / short)
        image = image.resize((self.edge, longer) if width <= height else (longer, self.edge), self.filter)
        middle = (lambda room: round(room / 2)) if self.even else (lambda room: room // 2)
        left, top = (middle(length - self.side) for length in image.size)
        return image.crop((left, top, left + self.side, top + self.side))

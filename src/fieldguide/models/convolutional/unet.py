"""U-Net: encoder-decoder with skip connections for segmentation (Ronneberger et al. 2015, arXiv:1505.04597).

New here: every level of the decoder is concatenated with the encoder's maps of the same level, cropped to its size, so
that predictions use both context and detail. It can be trained on a few dozen images. As published, convolutions are not
padded and the output is smaller than the input (572 pixels give 388); with `padding="same"`, as it is mostly used
today, it has the same size. There is no normalization.

Initialization: He normal by fan-in (section 3), zero biases.
Shapes: B batch, C channels, H W height and width, D width of a level.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 2
    channels: int = 1  # C
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)  # of the levels
    padding: str = "valid"  # or "same"
    dropout: float = 0.5  # at the end of the encoder


class Level(nn.Module):
    """Two 3x3 convolutions."""

    def __init__(self, inputs: int, width: int, padding: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=padding)
        self.conv2 = nn.Conv2d(width, width, 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H-4 W-4, or H W
        return F.relu(self.conv2(F.relu(self.conv1(x))))


def center_crop(x: Tensor, height: int, width: int) -> Tensor:
    """Crop the center of a map."""
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


class UNet(nn.Module):
    """U-Net: an image -> class logits of its pixels, or only of its center with `padding="valid"`.

    Raises `DataError` for an image that is too small, `SettingsError` for an unknown padding.
    """

    def __init__(self, config: Config):
        super().__init__()
        if config.padding not in ("valid", "same"):
            raise SettingsError(f"unknown padding={config.padding!r}: choose valid or same")
        self.config = config
        pairs = list(pairwise(config.widths))
        self.down = nn.ModuleList(
            Level(inputs, width, config.padding) for inputs, width in pairwise((config.channels, *config.widths))
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(deep, width, 2, 2) for width, deep in reversed(pairs))
        self.merge = nn.ModuleList(Level(2 * width, width, config.padding) for width, _ in reversed(pairs))
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Conv2d(config.widths[0], config.num_classes, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                # An output pixel of a 2x2 transposed convolution with stride 2 has one input pixel per channel.
                inputs = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.in_channels
                nn.init.normal_(module.weight, std=(2 / inputs) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _fits(self, height: int, width: int) -> bool:
        """Return whether an image is large enough for every level."""
        side, cut = min(height, width), 4 if self.config.padding == "valid" else 0
        for _ in self.up:
            side = (side - cut) // 2
        side -= cut
        for _ in self.up:
            if side < 1:
                return False
            side = 2 * side - cut
        return side >= 1

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B classes H W, or less of it
        if not self._fits(*x.shape[2:]):
            raise DataError(
                f"an image of {x.shape[3]} x {x.shape[2]} pixels is too small for {len(self.up)} halvings "
                f"with padding={self.config.padding!r}. Use larger images or fewer widths."
            )
        seen: list[Tensor] = []
        for level in self.down:
            x = level(F.max_pool2d(x, 2) if seen else x)
            seen.append(x)
        x = self.dropout(seen.pop())
        for up, merge in zip(self.up, self.merge):
            x, skip = up(x), seen.pop()
            if self.config.padding == "same":  # restore the last row and column of levels of odd size with zeros
                x = F.pad(x, (0, skip.shape[3] - x.shape[3], 0, skip.shape[2] - x.shape[2]))
            x = merge(torch.cat([center_crop(skip, *x.shape[2:]), x], 1))
        return self.head(x)


CARD = Card(
    name="unet",
    model=UNet,
    config=Config,
    paper="arXiv:1505.04597",
    year=2015,
    input_type="image",
    output_type="mask",
    sizes={
        "unet-2015": Size(params=31_030_658, source="the paper's figure 1, counted"),
        "unet-same": Size(padding="same", params=31_030_658, source="the paper's figure 1, counted"),
        "unet-small": Size(padding="same", widths=(32, 64, 128, 256), dropout=0.1),
        "unet-mini": Size(padding="same", widths=(16, 32, 64, 128), dropout=0.0),
        "unet-test": Size(widths=(4, 6), num_classes=3, channels=2, dropout=0.0),
    },
    recipe={"optimizer": "adamw", "lr": 3e-4, "weight_decay": 0.01, "grad_clip": 1.0, "warmup": 0.05},
)

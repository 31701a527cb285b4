"""Palette: denoises the target of an image, which it also sees (Saharia et al. 2021, arXiv:2111.05826).

New here: the input is appended to the noisy target as further channels, and one training objective, without a critic, serves
colorization, restoration and any other pairs. Where several targets are plausible, samples differ instead of being blurred. The
network is that of `ddpm-unet`; the paper's is larger, with attention at more resolutions.

Initialization: as `ddpm-unet`.
Shapes: B batch, C channels of the input, K channels of the target, H W height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fieldguide.core.card import Card, Size
from fieldguide.models.diffusion.ddpm_unet import DIFFUSERS, DIFFUSERS_2022, DDPMUNet
from fieldguide.models.diffusion.ddpm_unet import Config as DDPMConfig


@dataclass(frozen=True, kw_only=True)
class Config(DDPMConfig):
    condition: int = 3  # C; `channels` is K


class Palette(DDPMUNet):
    """A noisy target, its time and the input -> the prediction for the target. Without an input, it is zeros: no condition."""

    config: Config

    def __init__(self, config: Config):
        super().__init__(config, extra=config.condition)

    def forward(  # type: ignore[override]
        self, target: Tensor, time: Tensor, image: Tensor | None = None
    ) -> Tensor:  # B K H W, B, B C H W -> B K H W
        if image is None:
            image = target.new_zeros(len(target), self.config.condition, *target.shape[2:])
        return super().forward(torch.cat([target, image.to(target.dtype)], 1), time)


CARD = Card(
    name="palette",
    model=Palette,
    config=Config,
    paper="arXiv:2111.05826",
    year=2021,
    input_type="noisy-target",
    output_type="image",
    names={"channels": "condition", "outputs": "channels"},
    sizes={
        "palette-s": Size(image=64, dim=64, growth=(1, 2, 2), attend=(16,), groups=8, dropout=0.0),
        "palette-mini": Size(image=32, patch=2, dim=32, growth=(1, 2), depth=1, attend=(8,), groups=8, dropout=0.0),
        "palette-test": Size(
            image=8, channels=2, condition=1, dim=8, growth=(1, 2), depth=1, attend=(4,), groups=4, dropout=0.0
        ),
    },
    weights={"diffusers": DIFFUSERS, "diffusers-2022": DIFFUSERS_2022},
    recipe={"optimizer": "muon", "lr": 1e-2, "momentum": 0.95, "weight_decay": 0.0, "grad_clip": 1.0, "ema": 0.999},
)

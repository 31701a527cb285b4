"""WGAN: the generator of DCGAN for a critic with clipped weights (Arjovsky et al. 2017, arXiv:1701.07875).

New here: the critic, `wgan-discriminator`, estimates the Wasserstein distance between real and generated images, whose gradient does
not vanish when it tells them apart, and whose value says how good the images are. It takes five steps per step of the generator
(algorithm 1). The optimizer, RMSprop, is AdamW with beta1=0, but for its first steps.

Initialization: N(0, 0.02) for convolutions, N(1, 0.02) for the scales of batch norm, as in the authors' code.
Shapes: B batch, Z noise, C channels, S side of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fieldguide.core.card import Card, Size
from fieldguide.models.adversarial import dcgan
from fieldguide.models.adversarial.dcgan_discriminator import count_halvings
from fieldguide.models.adversarial.wgan_discriminator import Discriminator

__all__ = ["CARD", "Config", "Discriminator", "Generator"]


@dataclass(frozen=True, kw_only=True)
class Config(dcgan.Config):
    dim: int = 64  # channels at the highest resolution


class Generator(dcgan.Generator):
    """WGAN generator: noise -> images in -1 .. 1. Raises `SettingsError` for a side that doubling cannot reach."""


def authors(config: Config) -> dict[str, Any]:
    """Return the names of the authors' files (`netG`, DCGAN_G)."""
    count = count_halvings(config.image)[0]
    dim, place = config.dim << (count - 1), 0
    table: dict[str, Any] = {f"main.initial:{config.noise}-{dim}:convt.weight": "main.0.weight"}
    table[f"main.initial:{dim}:batchnorm.*"] = "main.1.*"
    for _ in range(count - 1):
        place += 3
        table[f"main.pyramid:{dim}-{dim // 2}:convt.weight"] = f"main.{place}.weight"
        table[f"main.pyramid:{dim // 2}:batchnorm.*"] = f"main.{place + 1}.*"
        dim //= 2
    return table | {f"main.final:{dim}-{config.channels}:convt.weight": f"main.{place + 3}.weight"}


RECIPE: Mapping[str, Any] = {
    "loss": "wasserstein",
    "weight_clip": 0.01,
    "critic_steps": 5,
    "optimizer": "adamw",
    "lr": 5e-5,
    "beta1": 0.0,
    "beta2": 0.99,
    "weight_decay": 0.0,
    "grad_clip": 0.0,
    "warmup": 0.0,
    "schedule": "constant",
    "ema": 0.999,
}  # algorithm 1 of the paper, and an average of the generator

CARD = Card(
    name="wgan",
    model=Generator,
    config=Config,
    paper="arXiv:1701.07875",
    year=2017,
    input_type="noise",
    output_type="image",
    sizes={
        "wgan-64": Size(params=3_576_704, source="martinarjovsky/WassersteinGAN, DCGAN_G"),
        "wgan-32": Size(image=32),
        "wgan-test": Size(noise=6, image=20, dim=4, channels=2),
    },
    weights={"authors": authors},
    recipe=RECIPE,
    adapt=lambda need: {"noise": Config.noise + need["num_classes"]} if need.get("num_classes") else {},  # plus a one-hot class
    parts={"critic": "wgan-discriminator"},
)

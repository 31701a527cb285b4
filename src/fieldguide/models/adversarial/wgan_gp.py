"""WGAN-GP: a residual generator for a critic with a gradient penalty (Gulrajani et al. 2017, arXiv:1704.00028).

New here: the slope of the critic, `wgan-gp-discriminator`, is held near 1 by a penalty of its gradient between real and
generated images, where WGAN clipped its weights. Training is then stable for many architectures, among them the residual
networks of this file, which SNGAN adopted: its generator and this one have the same layers.

Initialization: Glorot uniform, with a gain of sqrt(2) for the 3x3 convolutions of the blocks; biases zero.
Shapes: B batch, Z noise, K classes, C channels, S side of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

from fieldguide.core.card import Card, Size
from fieldguide.models.adversarial import sngan
from fieldguide.models.adversarial.wgan_gp_discriminator import Discriminator

__all__ = ["CARD", "Config", "Discriminator", "Generator"]


@dataclass(frozen=True, kw_only=True)
class Config(sngan.Config):
    dim: int = 128  # channels of all maps


class Generator(sngan.Generator):
    """WGAN-GP generator: noise -> images in -1 .. 1, by blocks of equal widths."""


CARD = Card(
    name="wgan-gp",
    model=Generator,
    config=Config,
    paper="arXiv:1704.00028",
    year=2017,
    input_type="noise",
    output_type="image",
    sizes={
        "wgan-gp-32": Size(params=1_204_483, source="the authors' code for CIFAR-10, counted"),
        "wgan-gp-32-wide": Size(dim=256, params=4_276_739, source="torch-mimicry"),
        "wgan-gp-test": Size(noise=5, image=20, dim=3, channels=2),
    },
    recipe={
        "loss": "wasserstein",
        "penalty": "gp",
        "critic_steps": 5,
        "optimizer": "adamw",
        "lr": 2e-4,
        "beta1": 0.0,
        "beta2": 0.9,
        "weight_decay": 0.0,
        "grad_clip": 0.0,
        "warmup": 0.0,
        "schedule": "linear",
        "ema": 0.999,
    },  # appendix F of the paper, and an average of the generator
    adapt=lambda need: {"noise": Config.noise + need["num_classes"]} if need.get("num_classes") else {},  # plus a one-hot class
    parts={"critic": "wgan-gp-discriminator"},
)

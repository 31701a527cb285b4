"""WGAN MLP: a generator of dense layers for a Wasserstein critic (Arjovsky et al. 2017, arXiv:1701.07875).

New here: with the Wasserstein distance even a generator without convolutions or norms can be trained (section 4.3), where the
original GAN collapses. Values are not limited to -1 .. 1. The critic is `wgan-mlp-discriminator`.

Initialization: torch's default for linear layers, as in the authors' code.
Shapes: B batch, Z noise, C channels, S side of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.adversarial.wgan import RECIPE
from fieldguide.models.adversarial.wgan_mlp_discriminator import Discriminator

__all__ = ["CARD", "Config", "Discriminator", "Generator"]


@dataclass(frozen=True, kw_only=True)
class Config:
    noise: int = 100  # Z
    channels: int = 3  # C
    image: int = 64  # S
    hidden: int = 512  # width of the three inner layers


class Generator(nn.Module):
    """MLP_G of the WGAN paper: noise -> images, about -1 .. 1."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, hidden = config, config.hidden
        layers: list[nn.Module] = [nn.Linear(config.noise, hidden), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Linear(hidden, hidden), nn.ReLU()]
        self.main = nn.Sequential(*layers, nn.Linear(hidden, config.channels * config.image**2))

    def forward(self, z: Tensor) -> Tensor:  # B Z -> B C S S
        return self.main(z).unflatten(1, (self.config.channels, self.config.image, self.config.image))


CARD = Card(
    name="wgan-mlp",
    model=Generator,
    config=Config,
    paper="arXiv:1701.07875",
    year=2017,
    input_type="noise",
    output_type="image",
    sizes={
        "wgan-mlp-64": Size(params=6_880_768, source="martinarjovsky/WassersteinGAN, MLP_G"),
        "wgan-mlp-test": Size(noise=6, image=5, hidden=12, channels=2),
    },
    recipe=RECIPE,
    adapt=lambda need: {"noise": Config.noise + need["num_classes"]} if need.get("num_classes") else {},  # plus a one-hot class
    parts={"critic": "wgan-mlp-discriminator"},
)

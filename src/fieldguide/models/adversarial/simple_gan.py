"""SimpleGAN: the generator of the guide's GAN (Goodfellow et al. 2014, arXiv:1406.2661).

New here: a generator is trained to fool a second network, the discriminator, which is trained to distinguish generated
from real data. No likelihood is computed.

Initialization: torch's default for linear layers, as in the guide's code.
Shapes: B batch, Z noise, F values of a flat image in -1 .. 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.adversarial.simple_gan_discriminator import Discriminator

__all__ = ["CARD", "Config", "Discriminator", "Generator"]


@dataclass(frozen=True, kw_only=True)
class Config:
    z_dim: int = 100  # Z
    img_dim: int = 784  # F


class Generator(nn.Module):
    """The guide's `Generator(z_dim, img_dim)`."""

    def __init__(self, z_dim: int = 100, img_dim: int = 784):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(z_dim, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 512),
            nn.LeakyReLU(0.2),
            nn.Linear(512, img_dim),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:  # B Z -> B F
        return self.net(z)


CARD = Card(
    name="simple-gan",
    model=Generator,
    config=Config,
    build=lambda config: Generator(**asdict(config)),
    paper="arXiv:1406.2661",
    year=2014,
    input_type="noise",
    output_type="vector",
    names={"features": "img_dim", "noise": "z_dim"},
    sizes={
        "simple-gan": Size(params=559_632, source="the guide's code"),
        "simple-gan-test": Size(z_dim=5, img_dim=6),
    },
    recipe={"optimizer": "adamw", "lr": 2e-4, "weight_decay": 0.0},
)

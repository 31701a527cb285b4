"""SimpleGAN discriminator: the probability that an image is real (Goodfellow et al. 2014, arXiv:1406.2661).

New here: a classifier that serves as the loss of the generator. It returns probabilities, as in the guide's code;
`net[:-1]` returns logits, with which the loss is numerically more stable.

Initialization: torch's default for linear layers, as in the guide's code.
Shapes: B batch, F values of a flat image.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor, nn

from fieldguide.core.card import Card, Size


@dataclass(frozen=True, kw_only=True)
class Config:
    img_dim: int = 784  # F


class Discriminator(nn.Module):
    """The guide's `Discriminator(img_dim)`."""

    def __init__(self, img_dim: int = 784):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(img_dim, 512),
            nn.LeakyReLU(0.2),
            nn.Linear(512, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:  # B F -> B 1
        return self.net(x)

    def forward_logits(self, x: Tensor) -> Tensor:  # B F -> B 1
        """Return the scores whose sigmoid is the probability that an image is real."""
        return self.net[:-1](x)


CARD = Card(
    name="simple-gan-discriminator",
    model=Discriminator,
    config=Config,
    build=lambda config: Discriminator(**asdict(config)),
    paper="arXiv:1406.2661",
    year=2014,
    input_type="vector",
    output_type="score",
    names={"features": "img_dim"},
    sizes={
        "simple-gan-discriminator": Size(params=533_505, source="the guide's code"),
        "simple-gan-discriminator-test": Size(img_dim=6),
    },
    recipe={"optimizer": "adamw", "lr": 2e-4, "weight_decay": 0.0},
)

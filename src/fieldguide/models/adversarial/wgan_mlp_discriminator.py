"""WGAN MLP discriminator: a critic of dense layers (Arjovsky et al. 2017, arXiv:1701.07875).

New here: the critic of the paper's experiments without convolutions (section 4.3). It returns an unbounded score for each image,
where the authors' code returns the mean over a batch.

Initialization: torch's default for linear layers, as in the authors' code.
Shapes: B batch, C channels, S side of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    image: int = 64  # S
    hidden: int = 512  # width of the three inner layers


class Discriminator(nn.Module):
    """MLP_D of the WGAN paper: an image -> a score, high for real images. Raises `DataError` for images of another side."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, hidden = config, config.hidden
        layers: list[nn.Module] = [nn.Linear(config.channels * config.image**2, hidden), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Linear(hidden, hidden), nn.ReLU()]
        self.main = nn.Sequential(*layers, nn.Linear(hidden, 1))

    def forward(self, x: Tensor) -> Tensor:  # B C S S -> B 1
        if x.shape[2:] != (self.config.image, self.config.image):
            raise DataError(
                f"the images have {x.shape[3]} x {x.shape[2]} pixels, but the network was created for image={self.config.image}"
            )
        return self.main(x.flatten(1))


CARD = Card(
    name="wgan-mlp-discriminator",
    model=Discriminator,
    config=Config,
    paper="arXiv:1701.07875",
    year=2017,
    input_type="image",
    output_type="score",
    sizes={
        "wgan-mlp-discriminator-64": Size(params=6_817_793, source="martinarjovsky/WassersteinGAN, MLP_D"),
        "wgan-mlp-discriminator-test": Size(image=5, hidden=6, channels=2),
    },
    recipe={"optimizer": "adamw", "lr": 5e-5, "beta1": 0.0, "beta2": 0.99, "weight_decay": 0.0},
    adapt=lambda need: {"channels": need["channels"] + need.get("num_classes", 0)},  # plus one channel per class
)

"""WGAN discriminator: the critic of DCGAN without a sigmoid (Arjovsky et al. 2017, arXiv:1701.07875).

New here: the score is no probability but estimates a distance between two distributions, if its slope is bounded. For that, all
weights are kept within a small interval. The authors return the mean score of a batch; here each image has its own.

Initialization: N(0, 0.02) for convolutions, N(1, 0.02) for the scales of batch norm, as in the authors' code.
Shapes: B batch, C channels, S side of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.adversarial import dcgan_discriminator
from fieldguide.models.adversarial.dcgan_discriminator import count_halvings


@dataclass(frozen=True, kw_only=True)
class Config(dcgan_discriminator.Config):
    dim: int = 64  # channels at the highest resolution


class Discriminator(dcgan_discriminator.Discriminator):
    """WGAN critic: an image -> an unbounded score, high for real images. Errors are those of DCGAN's discriminator."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.main = nn.Sequential(*list(self.main)[:-1])  # no sigmoid

    def forward(self, x: Tensor) -> Tensor:  # B C S S -> B 1
        return self.forward_logits(x)

    def forward_logits(self, x: Tensor) -> Tensor:  # B C S S -> B 1
        """Return the same as `forward`."""
        self.check_side(x)
        return self.main(x).flatten(1)


def authors(config: Config) -> dict[str, Any]:
    """Return the names of the authors' files (`netD`, DCGAN_D)."""
    dim, place = config.dim, 2
    table: dict[str, Any] = {f"main.initial:{config.channels}-{dim}:conv.weight": "main.0.weight"}
    for _ in range(count_halvings(config.image)[0] - 1):
        table[f"main.pyramid:{dim}-{2 * dim}:conv.weight"] = f"main.{place}.weight"
        table[f"main.pyramid:{2 * dim}:batchnorm.*"] = f"main.{place + 1}.*"
        dim, place = 2 * dim, place + 3
    return table | {f"main.final:{dim}-1:conv.weight": f"main.{place}.weight"}


CARD = Card(
    name="wgan-discriminator",
    model=Discriminator,
    config=Config,
    paper="arXiv:1701.07875",
    year=2017,
    input_type="image",
    output_type="score",
    sizes={
        "wgan-discriminator-64": Size(params=2_765_568, source="martinarjovsky/WassersteinGAN, DCGAN_D"),
        "wgan-discriminator-32": Size(image=32),
        "wgan-discriminator-test": Size(image=17, dim=4, channels=2),
    },
    weights={"authors": authors},
    recipe={"optimizer": "adamw", "lr": 5e-5, "beta1": 0.0, "beta2": 0.99, "weight_decay": 0.0},
    adapt=lambda need: {"channels": need["channels"] + need.get("num_classes", 0)},  # plus one channel per class
)

"""DCGAN discriminator: an all-convolutional critic (Radford et al. 2015, arXiv:1511.06434).

New here: strides instead of pooling, batch norm everywhere except in the first and last layer, and no hidden dense
layers, with which the training of convolutional GANs is stable. Widths and parameter names are those of torch's example.

Initialization: N(0, 0.02) for convolutions, N(1, 0.02) for the scales of batch norm (section 4 and the example).
Shapes: B batch, C channels, S side of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    image: int = 64  # S
    dim: int = 64  # channels at the highest resolution


def count_halvings(side: int) -> tuple[int, int]:
    """Return how often a side can be halved (rounding down) until it is below 8, and the resulting side."""
    count = 0
    while side >= 8:
        side, count = side // 2, count + 1
    return count, side


def init_weights(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)


class Discriminator(nn.Module):
    """DCGAN discriminator: an image -> the probability that it is real.

    Raises `SettingsError` if `image` is below 8, and `DataError` for images of another side.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        count, last = count_halvings(config.image)
        if not count:
            raise SettingsError(f"image={config.image} is too small: images need at least 8 pixels per side")
        dim = config.dim
        layers: list[nn.Module] = [nn.Conv2d(config.channels, dim, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        for _ in range(count - 1):
            layers += [nn.Conv2d(dim, 2 * dim, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * dim), nn.LeakyReLU(0.2)]
            dim *= 2
        self.main = nn.Sequential(*layers, nn.Conv2d(dim, 1, last, bias=False), nn.Sigmoid())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:  # B C S S -> B 1
        return self.forward_logits(x).sigmoid()

    def forward_logits(self, x: Tensor) -> Tensor:  # B C S S -> B 1
        """Return the scores whose sigmoid is the probability that an image is real."""
        self.check_side(x)
        return self.main[:-1](x).flatten(1)

    def check_side(self, x: Tensor) -> None:  # B C S S
        """Raise `DataError` for images of another side."""
        if x.shape[2:] != (self.config.image, self.config.image):
            raise DataError(
                f"the images have {x.shape[3]} x {x.shape[2]} pixels, but the network was created for image={self.config.image}"
            )


CARD = Card(
    name="dcgan-discriminator",
    model=Discriminator,
    config=Config,
    paper="arXiv:1511.06434",
    year=2015,
    input_type="image",
    output_type="score",
    sizes={
        "dcgan-discriminator-64": Size(params=2_765_568, source="pytorch/examples, dcgan"),
        "dcgan-discriminator-32": Size(image=32),
        "dcgan-discriminator-test": Size(image=17, dim=4, channels=2),
    },
    recipe={"optimizer": "adamw", "lr": 2e-4, "beta1": 0.5, "weight_decay": 0.0},
    adapt=lambda need: {"channels": need["channels"] + need.get("num_classes", 0)},  # plus one channel per class
)

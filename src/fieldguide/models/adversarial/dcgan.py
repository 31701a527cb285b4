"""DCGAN: an image generator of transposed convolutions (Radford et al. 2015, arXiv:1511.06434).

New here: the noise is a map of one pixel, and each layer doubles the side and halves the number of channels, with batch
norm and ReLU in between and tanh at the end. Interpolation in the noise gives semantic interpolation. The critic is
`dcgan-discriminator`.

Initialization: N(0, 0.02) for convolutions, N(1, 0.02) for the scales of batch norm (section 4 and torch's example).
Shapes: B batch, Z noise, C channels, S side of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.adversarial.dcgan_discriminator import Discriminator, count_halvings, init_weights

__all__ = ["CARD", "Config", "Discriminator", "Generator"]


@dataclass(frozen=True, kw_only=True)
class Config:
    noise: int = 100  # Z
    channels: int = 3  # C
    image: int = 64  # S: 4, 5, 6 or 7 times a power of 2
    dim: int = 64  # channels at the highest resolution


class Generator(nn.Module):
    """DCGAN generator: noise -> images in -1 .. 1. Raises `SettingsError` for a side that doubling cannot reach."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        count, first = count_halvings(config.image)
        if not count or first << count != config.image:
            raise SettingsError(
                f"image={config.image} must be 4, 5, 6 or 7 times a power of 2: choose "
                f"{max(first << count, 8)} or {max(first + 1 << count, 8)}"
            )
        dim = config.dim << (count - 1)
        layers: list[nn.Module] = [nn.ConvTranspose2d(config.noise, dim, first, bias=False), nn.BatchNorm2d(dim), nn.ReLU()]
        for _ in range(count - 1):
            layers += [nn.ConvTranspose2d(dim, dim // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(dim // 2), nn.ReLU()]
            dim //= 2
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(dim, config.channels, 4, 2, 1, bias=False), nn.Tanh())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_weights(self)

    def forward(self, z: Tensor) -> Tensor:  # B Z -> B C S S
        return self.main(z[:, :, None, None])


CARD = Card(
    name="dcgan",
    model=Generator,
    config=Config,
    paper="arXiv:1511.06434",
    year=2015,
    input_type="noise",
    output_type="image",
    sizes={
        "dcgan-64": Size(params=3_576_704, source="pytorch/examples, dcgan"),
        # The widths of the paper's figure 1. Ports with a bias in the last layer have 3 more parameters.
        "dcgan-64-wide": Size(dim=128, params=12_658_432, source="the paper's figure 1, counted"),
        "dcgan-32": Size(image=32),
        "dcgan-test": Size(noise=6, image=20, dim=4, channels=2),
    },
    recipe={
        "optimizer": "adamw",
        "lr": 2e-4,
        "beta1": 0.5,
        "weight_decay": 0.0,
        "grad_clip": 0.0,
        "warmup": 0.0,
        "schedule": "constant",
        "ema": 0.999,
    },  # section 4 of the paper, and an average of the generator
    adapt=lambda need: {"noise": Config.noise + need["num_classes"]} if need.get("num_classes") else {},  # plus a one-hot class
    parts={"critic": "dcgan-discriminator"},
)

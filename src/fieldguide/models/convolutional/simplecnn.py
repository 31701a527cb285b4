"""SimpleCNN: the small convolutional network of the guide, after LeNet (LeCun et al. 1998).

New here: nothing; a simple network for small images. Two blocks of convolution, batch normalization and pooling,
then a classifier with dropout.

Initialization: torch's defaults, as in the guide's code.
Shapes: B batch, C channels, S side.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 10
    channels: int = 3  # C
    image: int = 32  # S, pixels per side


class Levels(nn.Sequential):
    """Layers that return the output of each pooling. Parameters have the names of the guide's code."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # B C S S -> {"c1": B 32 S/2 S/2, "c2": B 64 S/4 S/4}
        levels: dict[str, Tensor] = {}
        for layer in self:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                levels[f"c{len(levels) + 1}"] = x
        return levels


class SimpleCNN(nn.Module):
    """The guide's `SimpleCNN(num_classes)`, with configurable `channels` and `image` (3 x 32 x 32 in the guide).

    `features` returns both pooled maps. Raises `SettingsError` for images below 4 pixels per side.
    """

    def __init__(self, num_classes: int = 10, *, channels: int = 3, image: int = 32):
        super().__init__()
        if image < 4:
            raise SettingsError(f"image={image} is too small: SimpleCNN needs at least 4 pixels per side")
        self.features = Levels(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * (image // 4) ** 2, 256),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(256, num_classes),
        )

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Return the width D and the stride in pixels of each map of `features`."""
        return {"c1": (32, 2), "c2": (64, 4)}

    def forward(self, x: Tensor) -> Tensor:  # B C S S -> B classes
        return self.classifier(self.features(x)["c2"])


def build(config: Config) -> SimpleCNN:
    return SimpleCNN(config.num_classes, channels=config.channels, image=config.image)


CARD = Card(
    name="simplecnn",
    model=SimpleCNN,
    config=Config,
    build=build,
    paper="doi:10.1109/5.726791",
    year=1998,
    input_type="image",
    output_type="label",
    names={"num_classes": "num_classes"},
    sizes={
        "simplecnn": Size(params=1_070_986, source="the guide's code"),
        "simplecnn-test": Size(num_classes=3, channels=1, image=8),
    },
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-2},
)

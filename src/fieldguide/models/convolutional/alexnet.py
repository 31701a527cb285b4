"""AlexNet of torchvision: five convolutions and three dense layers (Krizhevsky 2014, arXiv:1404.5997).

New here: compared to AlexNet of 2012 (`alexnet-2012`), a single-device network with fewer channels, one group and no
response normalization. The last map is average-pooled to 6 x 6 before the dense layers, so images may have any size.

Initialization: He normal weights (arXiv:1502.01852), those of the head normal with standard deviation 0.01, zero biases.
Shapes: B batch, C channels, H W height and width, D width of a level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.conv import check_min_side


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 1000
    channels: int = 3  # C
    stem: str = "11x11"  # stride 4, or "3x3", stride 1, for images up to 64 pixels
    widths: tuple[int, ...] = (64, 192, 384, 256, 256)  # channels of each convolution
    hidden: int = 4096  # width of the dense layers
    side: int = 6  # side of the map that the dense layers take
    dropout: float = 0.5  # before each dense layer except the last


STEMS = {"11x11": (11, 4, 2), "3x3": (3, 1, 1)}  # kernel, stride, padding
MIN_IMAGE_PIXELS = {"11x11": 63, "3x3": 15}  # minimum image side in pixels


class AlexNet(nn.Module):
    """AlexNet classifier for images of any size. `features` returns a map of each stride.

    Raises `SettingsError` for an unknown stem, `DataError` for images that are too small for the poolings.
    """

    def __init__(self, config: Config):
        super().__init__()
        if config.stem not in STEMS:
            raise SettingsError(f"unknown stem={config.stem!r}: choose one of {', '.join(STEMS)}")
        self.config = config
        one, two, three, four, five = config.widths
        self.conv1 = nn.Conv2d(config.channels, one, *STEMS[config.stem])
        self.conv2 = nn.Conv2d(one, two, 5, padding=2)
        self.conv3 = nn.Conv2d(two, three, 3, padding=1)
        self.conv4 = nn.Conv2d(three, four, 3, padding=1)
        self.conv5 = nn.Conv2d(four, five, 3, padding=1)
        self.fc1 = nn.Linear(five * config.side**2, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.hidden)
        self.head = nn.Linear(config.hidden, config.num_classes)
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.children():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, 0, 0.01)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Return the width D and the stride in pixels of each map of `features`."""
        one, two, _, _, five = self.config.widths
        stride = STEMS[self.config.stem][1]
        return {"c2": (one, stride), "c3": (one, 2 * stride), "c4": (two, 4 * stride), "c5": (five, 8 * stride)}

    def features(self, x: Tensor) -> dict[str, Tensor]:  # B C H W -> {"c2": B D H/4 W/4, "c3": ...}
        check_min_side(x, MIN_IMAGE_PIXELS[self.config.stem], "AlexNet")
        levels = {}
        levels["c2"] = x = F.relu(self.conv1(x), inplace=True)
        levels["c3"] = x = F.max_pool2d(x, 3, 2)
        levels["c4"] = x = F.max_pool2d(F.relu(self.conv2(x), inplace=True), 3, 2)
        x = F.relu(self.conv4(F.relu(self.conv3(x), inplace=True)), inplace=True)
        levels["c5"] = F.max_pool2d(F.relu(self.conv5(x), inplace=True), 3, 2)
        return levels

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B classes
        x = F.adaptive_avg_pool2d(self.features(x)["c5"], self.config.side).flatten(1)
        x = F.relu(self.fc1(self.dropout(x)), inplace=True)
        return self.head(F.relu(self.fc2(self.dropout(x)), inplace=True))


TORCHVISION = {
    "features.0.*": "conv1.*",
    "features.3.*": "conv2.*",
    "features.6.*": "conv3.*",
    "features.8.*": "conv4.*",
    "features.10.*": "conv5.*",
    "classifier.1.*": "fc1.*",
    "classifier.4.*": "fc2.*",
    "classifier.6.*": "head.*",
}


def adapt_to_image_size(side: int) -> dict[str, object]:
    """Return a stem without stride for small images, whose last map then has 1 to 4 pixels per side."""
    if side < MIN_IMAGE_PIXELS["3x3"]:
        raise SettingsError(f"images of {side} pixels per side are too small: AlexNet needs at least {MIN_IMAGE_PIXELS['3x3']}")
    return {"stem": "3x3", "side": max(1, side // 16)} if side <= 64 else {}


CARD = Card(
    name="alexnet",
    model=AlexNet,
    config=Config,
    paper="arXiv:1404.5997",
    year=2014,
    input_type="image",
    output_type="label",
    adapt=lambda need: adapt_to_image_size(need["image"]),
    sizes={
        "alexnet": Size(params=61_100_840, source="torchvision"),
        "alexnet-test": Size(stem="3x3", widths=(8, 12, 16, 12, 8), hidden=16, side=2, dropout=0.0, num_classes=5),
    },
    weights={"torchvision": TORCHVISION},
    # At half of these widths, the loss on CIFAR-10 starts to fall within 40 steps at this rate, within 150 at a third of it.
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.1, "label_smoothing": 0.1},
)

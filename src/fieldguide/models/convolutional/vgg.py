"""VGG: deep stacks of 3x3 convolutions (Simonyan and Zisserman 2014, arXiv:1409.1556).

New here: two or three 3x3 convolutions have the receptive field of one of 5x5 or 7x7, with fewer parameters and more
nonlinearities. The width doubles as pooling halves the map. Most parameters belong to the first dense layer.

Initialization: He normal (arXiv:1502.01852), by fan-out for convolutions and by fan-in for dense layers, the last
one normal with standard deviation 0.01; zero biases. (With 0.01 everywhere the paper's deep networks did not train.)
Shapes: B batch, C channels, H W height and width, D width of a level; level c1 is at H/2, c5 at H/32.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.conv import check_min_side
from fieldguide.models.mapping.key_rules import Reshaped, Row


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 1000
    channels: int = 3  # C
    depths: tuple[int, ...] = (2, 2, 3, 3, 3)  # convolutions per level
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)  # channels per level
    norm: bool = False  # batch norm after each convolution
    pools: int = 5  # number of levels that end in a pooling, from the first
    hidden: int = 4096  # width of the dense layers
    side: int = 7  # side of the map that the dense layers take
    dropout: float = 0.5  # after each hidden dense layer


def conv_layer(inputs: int, outputs: int, norm: bool) -> nn.Sequential:
    """Return a 3x3 convolution with optional batch norm; ReLU is applied by the caller."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=nn.Conv2d(inputs, outputs, 3, padding=1))
    if norm:
        layers["norm"] = nn.BatchNorm2d(outputs)
    return nn.Sequential(layers)


class VGG(nn.Module):
    """VGG classifier for images of at least 2 ** `pools` pixels per side. `features` returns the map of each level.

    Raises `SettingsError` if the numbers of levels differ, `DataError` for smaller images.
    """

    def __init__(self, config: Config):
        super().__init__()
        if len(config.depths) != len(config.widths) or config.pools > len(config.depths):
            raise SettingsError(
                f"depths={config.depths} and widths={config.widths} must have the same length, at least pools={config.pools}"
            )
        self.config = config
        self.stages = nn.ModuleList()
        dim = config.channels
        for depth, width in zip(config.depths, config.widths):
            stage = nn.Sequential()
            for _ in range(depth):
                stage.append(conv_layer(dim, width, config.norm))
                dim = width
            self.stages.append(stage)
        self.fc1 = nn.Linear(dim * config.side**2, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.hidden)
        self.head = nn.Linear(config.hidden, config.num_classes)
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, 0, 0.01)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Return the width D and the stride in pixels of each map of `features`."""
        return {f"c{i + 1}": (width, 2 ** min(i + 1, self.config.pools)) for i, width in enumerate(self.config.widths)}

    def features(self, x: Tensor) -> dict[str, Tensor]:  # B C H W -> {"c1": B D H/2 W/2, "c2": ...}
        check_min_side(x, 2**self.config.pools, "VGG")
        levels = {}
        for i, stage in enumerate(self.stages):
            for layer in stage.children():
                x = F.relu(layer(x), inplace=True)
            levels[f"c{i + 1}"] = x = F.max_pool2d(x, 2) if i < self.config.pools else x
        return levels

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B classes
        *_, x = self.features(x).values()
        x = F.adaptive_avg_pool2d(x, self.config.side).flatten(1)
        x = self.dropout(F.relu(self.fc1(x), inplace=True))
        return self.head(self.dropout(F.relu(self.fc2(x), inplace=True)))


def conv_keys(config: Config) -> dict[str, Row]:
    """Return the key table of the convolutions: both libraries number all layers, including ReLU and pooling."""
    table: dict[str, Row] = {}
    n = 0
    for s, depth in enumerate(config.depths):
        for b in range(depth):
            table[f"features.{n}.*"] = f"stages.{s}.{b}.conv.*"
            if config.norm:
                table[f"features.{n + 1}.*"] = f"stages.{s}.{b}.norm.*"
            n += 2 + config.norm
        n += s < config.pools
    return table


def torchvision(config: Config) -> dict[str, Row]:
    return conv_keys(config) | {"classifier.0.*": "fc1.*", "classifier.3.*": "fc2.*", "classifier.6.*": "head.*"}


def timm(config: Config) -> dict[str, Row]:  # dense layers are stored as convolutions
    side, hidden = config.side, config.hidden
    return conv_keys(config) | {
        "pre_logits.fc1.weight": Reshaped("fc1.weight", (hidden, -1), (hidden, -1, side, side)),
        "pre_logits.fc2.weight": Reshaped("fc2.weight", (hidden, -1), (hidden, -1, 1, 1)),
        "pre_logits.fc1.bias": "fc1.bias",
        "pre_logits.fc2.bias": "fc2.bias",
        "head.fc.*": "head.*",
    }


def adapt_to_image_size(side: int) -> dict[str, int]:
    """Return fewer poolings for small images, whose last map then has 2 to 3 pixels per side and is averaged."""
    return {"side": 1, "pools": min(5, max(side.bit_length() - 2, 0))} if side <= 64 else {}


A, B, D, E = (1, 1, 2, 2, 2), (2, 2, 2, 2, 2), (2, 2, 3, 3, 3), (2, 2, 4, 4, 4)  # columns of table 1

CARD = Card(
    name="vgg",
    model=VGG,
    config=Config,
    paper="arXiv:1409.1556",
    year=2014,
    input_type="image",
    output_type="label",
    adapt=lambda need: adapt_to_image_size(need["image"]),
    sizes={
        "vgg16": Size(depths=D, params=138_357_544, source="torchvision"),
        "vgg16-bn": Size(depths=D, norm=True, params=138_365_992, source="torchvision"),
        "vgg11": Size(depths=A, params=132_863_336, source="torchvision"),
        "vgg11-bn": Size(depths=A, norm=True, params=132_868_840, source="torchvision"),
        "vgg13": Size(depths=B, params=133_047_848, source="torchvision"),
        "vgg13-bn": Size(depths=B, norm=True, params=133_053_736, source="torchvision"),
        "vgg19": Size(depths=E, params=143_667_240, source="torchvision"),
        "vgg19-bn": Size(depths=E, norm=True, params=143_678_248, source="torchvision"),
        "vgg-test": Size(
            depths=(1, 2, 1), widths=(6, 8, 12), norm=True, pools=3, hidden=16, side=2, dropout=0.0, num_classes=5
        ),
    },
    aliases={"timm": {f"vgg{n}{norm}": f"vgg{n}{norm.replace('_', '-')}" for n in (11, 13, 16, 19) for norm in ("", "_bn")}},
    weights={"torchvision": torchvision, "timm": timm},
    # Half the best rate of the sizes with batch norm: the others diverge above it, even with a long warm-up.
    recipe={"optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.05, "warmup": 0.1, "label_smoothing": 0.1},
)

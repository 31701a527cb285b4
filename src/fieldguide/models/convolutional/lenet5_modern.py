"""LeNet-5, modern variant: ReLU, max pooling and a linear head (after LeCun et al. 1998).

New here: only simplifications: the second convolution is fully connected to the first, pooling has no weights, and
the head returns logits. Images of 28 x 28 are padded by 2 to 32 x 32.

Initialization: He uniform matrices (arXiv:1502.01852), zero biases.
Shapes: B batch, C channels, S side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 10
    channels: int = 1  # C
    image: int = 28  # S, pixels per side


class LeNet5(nn.Module):
    """LeNet-5 classifier for images of `image` pixels per side. `features` returns both pooled maps.

    Raises `SettingsError` if `image` is below 12.
    """

    def __init__(self, config: Config):
        super().__init__()
        side = (config.image // 2 - 4) // 2
        if side < 1:
            raise SettingsError(f"image={config.image} is too small: LeNet-5 needs at least 12 pixels per side")
        self.config = config
        self.conv1 = nn.Conv2d(config.channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * side**2, 120)
        self.fc2 = nn.Linear(120, 84)
        self.head = nn.Linear(84, config.num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in self.children():
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Return the width D and the stride in pixels of each map of `features`."""
        return {"s2": (6, 2), "s4": (16, 4)}

    def features(self, x: Tensor) -> dict[str, Tensor]:  # B C S S -> {"s2": B 6 14 14, "s4": B 16 5 5}
        s2 = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return {"s2": s2, "s4": F.max_pool2d(F.relu(self.conv2(s2)), 2)}

    def forward(self, x: Tensor) -> Tensor:  # B C S S -> B classes
        x = self.features(x)["s4"].flatten(1)
        return self.head(F.relu(self.fc2(F.relu(self.fc1(x)))))


CARD = Card(
    name="lenet5-modern",
    model=LeNet5,
    config=Config,
    paper="doi:10.1109/5.726791",
    year=1998,
    input_type="image",
    output_type="label",
    sizes={
        "lenet5-modern": Size(params=61_706, source="counted by hand"),
        "lenet5-modern-test": Size(num_classes=3, image=12),
    },
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-2},
)

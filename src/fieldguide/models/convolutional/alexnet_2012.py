"""AlexNet: the original deep convolutional network for ImageNet (Krizhevsky et al. 2012, NeurIPS).

New here: ReLU instead of tanh, dropout, overlapping pooling, local response normalization, and two groups of channels,
originally on two GPUs, that are connected only in the third convolution.

Initialization: biases as in section 5: one in the second, fourth and fifth convolution and the hidden dense layers,
zero elsewhere; head weights normal with standard deviation 0.01. The other weights are He normal (arXiv:1502.01852),
because the paper's 0.01 suits only its own widths.
Shapes: B batch, C channels, S side, D width of a level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError

NUM_NEIGHBORS, BIAS, ALPHA, BETA = 5, 2.0, 1e-4, 0.75  # n, k, alpha, beta of section 3.3


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 1000
    channels: int = 3  # C
    image: int = 224  # S, pixels per side
    stem: str = "11x11"  # stride 4, or "3x3", stride 1, for images up to 64 pixels
    widths: tuple[int, ...] = (96, 256, 384, 384, 256)  # channels of each convolution, both groups together
    hidden: int = 4096  # width of the dense layers
    dropout: float = 0.5  # after each hidden dense layer


STEMS = {"11x11": (11, 4, 2), "3x3": (3, 1, 1)}  # kernel, stride, padding, with which 224 x 224 gives 55 x 55


def response_norm(x: Tensor) -> Tensor:  # B D H W -> B D H W
    """Divide each value by (k + alpha * sum of squares over `NUM_NEIGHBORS` adjacent channels) ^ beta.

    `torch.nn.LocalResponseNorm` divides alpha by the number of channels, so the paper's 1e-4 is `alpha=5e-4` there; it
    also takes three times as long as this sum over neighbors by a 1x1 convolution.
    """
    place = torch.arange(x.shape[1], device=x.device)
    near = (place[:, None] - place).abs() <= NUM_NEIGHBORS // 2
    total = F.conv2d(x.square(), ALPHA * near[..., None, None].to(x.dtype), x.new_full((x.shape[1],), BIAS))
    return x * total.pow(-BETA)


class AlexNet2012(nn.Module):
    """AlexNet classifier for images of `image` pixels per side.

    Raises `SettingsError` for an unknown stem or if `image` is too small for the poolings, `DataError` for images of
    another size.
    """

    def __init__(self, config: Config):
        super().__init__()
        if config.stem not in STEMS:
            raise SettingsError(f"unknown stem={config.stem!r}: choose one of {', '.join(STEMS)}")
        kernel, stride, padding = STEMS[config.stem]
        side = (config.image + 2 * padding - kernel) // stride + 1
        for _ in range(3):
            side = (side - 3) // 2 + 1
        if side < 1:
            raise SettingsError(
                f"image={config.image} is too small: AlexNet needs at least "
                f"{15 if stride == 1 else 63} pixels per side with this stem"
            )
        self.config = config
        one, two, three, four, five = config.widths
        self.conv1 = nn.Conv2d(config.channels, one, kernel, stride, padding)
        self.conv2 = nn.Conv2d(one, two, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(two, three, 3, padding=1)
        self.conv4 = nn.Conv2d(three, four, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(four, five, 3, padding=1, groups=2)
        self.fc1 = nn.Linear(five * side**2, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.hidden)
        self.head = nn.Linear(config.hidden, config.num_classes)
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, module in self.named_children():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.constant_(module.bias, float(name in ("conv2", "conv4", "conv5", "fc1", "fc2")))
        nn.init.normal_(self.head.weight, 0, 0.01)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Return the width D and the stride in pixels of each map of `features`."""
        one, two, _, _, five = self.config.widths
        stride = STEMS[self.config.stem][1]
        return {"c2": (one, stride), "c3": (one, 2 * stride), "c4": (two, 4 * stride), "c5": (five, 8 * stride)}

    def features(self, x: Tensor) -> dict[str, Tensor]:  # B C S S -> {"c2": B D S/4 S/4, "c3": ...}
        levels = {}
        levels["c2"] = x = response_norm(F.relu(self.conv1(x)))
        levels["c3"] = x = F.max_pool2d(x, 3, 2)
        levels["c4"] = x = F.max_pool2d(response_norm(F.relu(self.conv2(x))), 3, 2)
        x = F.relu(self.conv4(F.relu(self.conv3(x), inplace=True)), inplace=True)
        levels["c5"] = F.max_pool2d(F.relu(self.conv5(x), inplace=True), 3, 2)
        return levels

    def forward(self, x: Tensor) -> Tensor:  # B C S S -> B classes
        if tuple(x.shape[2:]) != (self.config.image,) * 2:
            raise DataError(
                f"the images have {x.shape[2]} x {x.shape[3]} pixels, but this AlexNet was created for "
                f"{self.config.image} x {self.config.image}, on which its dense layers depend"
            )
        x = self.features(x)["c5"].flatten(1)
        x = self.dropout(F.relu(self.fc1(x), inplace=True))
        return self.head(self.dropout(F.relu(self.fc2(x), inplace=True)))


CARD = Card(
    name="alexnet-2012",
    model=AlexNet2012,
    config=Config,
    paper="https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks",
    year=2012,
    input_type="image",
    output_type="label",
    adapt=lambda need: {"stem": "3x3"} if need["image"] <= 64 else {},
    sizes={
        "alexnet-2012": Size(params=60_965_224, source="counted by hand from section 3"),
        "alexnet-2012-test": Size(image=20, stem="3x3", widths=(8, 12, 16, 12, 8), hidden=16, dropout=0.0, num_classes=5),
    },
    # At a third of these widths, the loss on CIFAR-10 starts to fall within 60 steps at this rate, within 120 at half of it.
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.1, "label_smoothing": 0.1},
)

"""LeNet-5: the convolutional network as published (LeCun et al. 1998, doi:10.1109/5.726791).

New here: convolutions with small receptive fields and shared weights alternate with subsampling, and the features
are trained together with the classifier. All parts of section II.B are implemented: subsampling with a trainable
coefficient and bias per map (S2, S4), a third layer with partial connections (C3, table I), the scaled tanh
1.7159 tanh(2a/3), and an RBF output layer, which measures the squared distance from a fixed bitmap of each class
(7 x 12 pixels, +1 and -1). The negative distances are returned as logits, so that cross-entropy is the paper's
discriminative criterion (equation 9) without its rubbish class.

Initialization: uniform in +-2.4 / fan-in (appendix A). The bitmaps of the ten digits were drawn for this project;
for other numbers of classes they are fixed random codes of +1 and -1.
Shapes: B batch, C channels, S side.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 10
    channels: int = 1  # C
    image: int = 32  # S, pixels per side; padded to at least 32 and a multiple of 4


# Table I: the maps of S2 that each of the sixteen maps of C3 is connected to.
C3_CONNECTIONS = (
    (0, 1, 2),
    (1, 2, 3),
    (2, 3, 4),
    (3, 4, 5),
    (0, 4, 5),
    (0, 1, 5),
    (0, 1, 2, 3),
    (1, 2, 3, 4),
    (2, 3, 4, 5),
    (0, 3, 4, 5),
    (0, 1, 4, 5),
    (0, 1, 2, 5),
    (0, 1, 3, 4),
    (1, 2, 4, 5),
    (0, 2, 3, 5),
    (0, 1, 2, 3, 4, 5),
)
# Bitmaps of the ten digits, 7 wide and 12 high, five per row.
DIGITS = """
. . . . . . .   . . . . . . .   . . . . . . .   . . . . . . .   . . . . . . .
. . # # # . .   . . . # . . .   . # # # # . .   # # # # # # .   . . . . # # .
. # # . # # .   . . # # . . .   # # . . # # .   . . . . # # .   . . . # # # .
# # . . . # #   . # # # . . .   . . . . . # #   . . . # # . .   . . # # # # .
# # . . . # #   . . # # . . .   . . . . . # #   . . # # . . .   . # # . # # .
# # . . . # #   . . # # . . .   . . . . # # .   . . . # # # .   # # . . # # .
# # . . . # #   . . # # . . .   . . . # # . .   . . . . . # #   # # # # # # #
# # . . . # #   . . # # . . .   . . # # . . .   . . . . . # #   . . . . # # .
. # # . # # .   . . # # . . .   . # # . . . .   # # . . # # .   . . . . # # .
. . # # # . .   . # # # # . .   # # # # # # #   . # # # # . .   . . . . # # .
. . . . . . .   . . . . . . .   . . . . . . .   . . . . . . .   . . . . . . .
. . . . . . .   . . . . . . .   . . . . . . .   . . . . . . .   . . . . . . .

. . . . . . .   . . . . . . .   . . . . . . .   . . . . . . .   . . . . . . .
# # # # # # .   . . # # # # .   # # # # # # #   . # # # # # .   . # # # # . .
# # . . . . .   . # # . . . .   . . . . . # #   # # . . . # #   # # . . # # .
# # . . . . .   # # . . . . .   . . . . # # .   # # . . . # #   # # . . . # #
# # # # # . .   # # # # # . .   . . . . # # .   . # # # # # .   # # . . . # #
. . . . # # .   # # . . # # .   . . . # # . .   # # . . . # #   . # # # # # #
. . . . . # #   # # . . . # #   . . . # # . .   # # . . . # #   . . . . . # #
. . . . . # #   # # . . . # #   . . # # . . .   # # . . . # #   . . . . . # #
# # . . # # .   . # # . # # .   . . # # . . .   # # . . . # #   . . . . # # .
. # # # # . .   . . # # # . .   . # # . . . .   . # # # # # .   . # # # # . .
. . . . . . .   . . . . . . .   . . . . . . .   . . . . . . .   . . . . . . .
. . . . . . .   . . . . . . .   . . . . . . .   . . . . . . .   . . . . . . .
"""


def class_codes(classes: int) -> Tensor:  # -> classes 84
    """Return the code of each class: the bitmaps for ten classes, else fixed random signs."""
    if classes == 10:
        rows = [
            [line.replace(" ", "")[7 * i : 7 * i + 7] for line in half.splitlines()]
            for half in DIGITS.strip().split("\n\n")
            for i in range(5)
        ]
        return torch.tensor([[1.0 if pixel == "#" else -1.0 for pixel in "".join(digit)] for digit in rows])
    signs = random.Random(1998)
    return torch.tensor([[signs.choice((-1.0, 1.0)) for _ in range(84)] for _ in range(classes)])


def scaled_tanh(x: Tensor) -> Tensor:
    """Return 1.7159 tanh(2x/3), the activation of the paper."""
    return 1.7159 * torch.tanh(x * (2 / 3))


class Subsample(nn.Module):
    """Subsampling: the sum of each 2 x 2 field times a coefficient plus a bias, both per map."""

    def __init__(self, maps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(maps))
        self.bias = nn.Parameter(torch.empty(maps))

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H/2 W/2
        return 4 * F.avg_pool2d(x, 2) * self.weight[:, None, None] + self.bias[:, None, None]


class Partial(nn.Module):
    """A 5x5 convolution with kernels only for the connections of table I."""

    place: Tensor  # index of each kernel among 16 * 6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sum(map(len, C3_CONNECTIONS)), 5, 5))
        self.bias = nn.Parameter(torch.empty(len(C3_CONNECTIONS)))
        place = torch.tensor([6 * out + into for out, seen in enumerate(C3_CONNECTIONS) for into in seen])
        self.register_buffer("place", place, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # B 6 H W -> B 16 H-4 W-4
        full = self.weight.new_zeros(len(C3_CONNECTIONS) * 6, 5, 5).index_copy(0, self.place, self.weight)
        return F.conv2d(x, full.unflatten(0, (len(C3_CONNECTIONS), 6)), self.bias)


class LeNet5(nn.Module):
    """LeNet-5: an image -> negative squared distances from the class codes. `features` returns both subsampled maps."""

    codes: Tensor  # classes 84

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        side = max(config.image + -config.image % 4, 32)
        short = side - config.image
        self.padding = (short // 2, short - short // 2) * 2
        self.c1 = nn.Conv2d(config.channels, 6, 5)
        self.s2 = Subsample(6)
        self.c3 = Partial()
        self.s4 = Subsample(16)
        self.c5 = nn.Conv2d(16, 120, ((side - 4) // 2 - 4) // 2)  # the kernel covers the whole map
        self.f6 = nn.Linear(120, 84)
        self.register_buffer("codes", class_codes(config.num_classes))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        fans = {self.c1: self.c1.weight[0].numel(), self.s2: 4, self.s4: 4, self.c5: self.c5.weight[0].numel(), self.f6: 120}
        for layer, fan in fans.items():
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -2.4 / fan, 2.4 / fan)
        fans_in = torch.tensor([25.0 * len(seen) for seen in C3_CONNECTIONS], device=self.c3.bias.device)
        nn.init.uniform_(self.c3.bias, -2.4, 2.4).div_(fans_in)
        fans_in = torch.tensor([25.0 * len(seen) for seen in C3_CONNECTIONS for _ in seen], device=self.c3.bias.device)
        nn.init.uniform_(self.c3.weight, -2.4, 2.4).div_(fans_in[:, None, None])

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Return the width D and the stride in pixels of each map of `features`."""
        return {"s2": (6, 2), "s4": (16, 4)}

    def features(self, x: Tensor) -> dict[str, Tensor]:  # B C S S -> {"s2": B 6 14 14, "s4": B 16 5 5}
        x = F.pad(x, self.padding, mode="replicate")
        s2 = scaled_tanh(self.s2(scaled_tanh(self.c1(x))))
        return {"s2": s2, "s4": scaled_tanh(self.s4(scaled_tanh(self.c3(s2))))}

    def forward(self, x: Tensor) -> Tensor:  # B C S S -> B classes
        x = self.features(x)["s4"]
        x = scaled_tanh(self.f6(scaled_tanh(self.c5(x)).flatten(1)))  # B 84
        return -(x[:, None] - self.codes).square().sum(-1)


CARD = Card(
    name="lenet5-1998",
    model=LeNet5,
    config=Config,
    paper="doi:10.1109/5.726791",
    year=1998,
    input_type="image",
    output_type="label",
    sizes={
        "lenet5-1998": Size(params=60_000, source="the paper, section II.B"),
        "lenet5-1998-test": Size(num_classes=3),
    },
    # The squared distances cause large gradients in the first steps.
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "grad_clip": 1.0},
)

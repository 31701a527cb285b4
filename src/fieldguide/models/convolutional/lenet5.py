"""LeNet-5: convolutions learnt end to end, as published (LeCun et al. 1998, doi:10.1109/5.726791).

New here: small receptive fields, whose weights are shared over the picture, alternate with subsampling; the
features are learnt with the classifier. All parts of section II.B are kept: subsampling with a trainable
coefficient and bias a map (S2, S4), a third layer whose maps see chosen maps only (C3, table I), the scaled
tanh 1.7159 tanh(2a/3), and an output that measures the squared distance from a fixed drawing of each class
(7 x 12 pixels, +1 and -1). The distances are penalties; their negatives are given as logits, so that
cross-entropy is the paper's discriminative criterion (equation 9) without its rubbish class.

Initialisation: uniform in +-2.4 / fan-in (appendix A). The drawings of the ten digits are this project's own;
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
    image: int = 32  # S, pixels a side; its border pads it to at least 32, a multiple of 4


# Table I: which of the six maps of S2 each of the sixteen maps of C3 sees.
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
# The ten digits, 7 wide and 12 high, side by side.
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
    """The target of each class: its drawing for ten digits, else fixed random signs."""
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
    return 1.7159 * torch.tanh(x * (2 / 3))


class Subsample(nn.Module):
    """The sum of each 2 x 2 field times one coefficient plus one bias a map."""

    def __init__(self, maps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(maps))
        self.bias = nn.Parameter(torch.empty(maps))

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H/2 W/2
        return 4 * F.avg_pool2d(x, 2) * self.weight[:, None, None] + self.bias[:, None, None]


class Partial(nn.Module):
    """A 5x5 convolution that holds kernels only for the connections of table I."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sum(map(len, C3_CONNECTIONS)), 5, 5))
        self.bias = nn.Parameter(torch.empty(len(C3_CONNECTIONS)))
        place = torch.tensor([6 * out + into for out, seen in enumerate(C3_CONNECTIONS) for into in seen])
        self.register_buffer("place", place, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # B 6 H W -> B 16 H-4 W-4
        full = self.weight.new_zeros(len(C3_CONNECTIONS) * 6, 5, 5).index_copy(0, self.place, self.weight)
        return F.conv2d(x, full.unflatten(0, (len(C3_CONNECTIONS), 6)), self.bias)


class LeNet5(nn.Module):
    """A picture -> negative squared distances from the drawings of the classes; `features` gives both subsampled maps."""

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
        self.c5 = nn.Conv2d(16, 120, ((side - 4) // 2 - 4) // 2)  # as wide as what is left
        self.f6 = nn.Linear(120, 84)
        self.register_buffer("codes", class_codes(config.num_classes))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        fans = {self.c1: self.c1.weight[0].numel(), self.s2: 4, self.s4: 4, self.c5: self.c5.weight[0].numel(), self.f6: 120}
        for layer, fan in fans.items():
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -2.4 / fan, 2.4 / fan)
        fan = torch.tensor([25.0 * len(seen) for seen in C3_CONNECTIONS], device=self.c3.bias.device)
        nn.init.uniform_(self.c3.bias, -2.4, 2.4).div_(fan)
        fan = torch.tensor([25.0 * len(seen) for seen in C3_CONNECTIONS for _ in seen], device=self.c3.bias.device)
        nn.init.uniform_(self.c3.weight, -2.4, 2.4).div_(fan[:, None, None])

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Name of each map of `features` -> (D, stride in pixels)."""
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
    # The squared distances make gradients of the first steps large.
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "grad_clip": 1.0},
)

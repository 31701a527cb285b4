"""FNN: the guide's feedforward network (Rumelhart et al. 1986).

New here: hidden layers between input and output, trained by backpropagation.

Initialization: torch's default for linear layers, uniform by fan-in, as in the guide's code.
Shapes: B batch (any leading axes), F features.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor, nn

from fieldguide.core.card import Card, Size


@dataclass(frozen=True, kw_only=True)
class Config:
    in_dim: int = 784  # F
    hidden: int = 256
    out_dim: int = 10  # classes


class FNN(nn.Module):
    """The guide's `FNN(in_dim, hidden, out_dim)`: two hidden layers with ReLU."""

    def __init__(self, in_dim: int, hidden: int, out_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(in_dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, out_dim),
        )

    def forward(self, x: Tensor) -> Tensor:  # B ... F -> B ... classes
        return self.net(x)


CARD = Card(
    name="fnn",
    model=FNN,
    config=Config,
    build=lambda config: FNN(**asdict(config)),
    paper="doi:10.1038/323533a0",
    year=1986,
    input_type="vector",
    output_type="label",
    names={"features": "in_dim", "num_classes": "out_dim"},
    sizes={
        "fnn": Size(params=269_322, source="the guide's code"),
        "fnn-test": Size(in_dim=6, hidden=8, out_dim=3),
    },
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-2},
)

"""DCN-v2: cross layers with full or low-rank matrices, and an MLP (Wang et al. 2020, arXiv:2008.13535).

New here: a cross layer multiplies the input elementwise by a linear map of the layer before, x0 * (W x + b) + x, so that L
layers hold the products of up to L + 1 features. W is a matrix, or a mixture of experts of low rank, U tanh(C tanh(V x)),
weighted by a softmax. The MLP follows the cross layers (stacked) or stands next to them (parallel). Common ports share one gate
between all layers; here each layer has its own, as in equation 4.

Initialization: embeddings as in `models.layers.table.CategoryEmbedding`, matrices Glorot uniform, zero biases.
Shapes: B batch, N number columns, K category columns, D width of an embedding, F = N + K D features, E experts, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.table import CategoryEmbedding


@dataclass(frozen=True, kw_only=True)
class Config:
    numbers: int = 13  # N
    categories: tuple[int, ...] = (100,) * 26  # values of each category column, including 0 (unseen)
    num_classes: int = 2
    dim: int = 16  # D
    depth: int = 3  # cross layers
    rank: int = 0  # R of the experts; 0: full matrices
    experts: int = 4  # E, if the rank is not 0
    hidden: tuple[int, ...] = (512, 256)  # widths of the MLP
    structure: str = "stacked"  # stacked: the MLP reads the cross layers; parallel: the input
    dropout: float = 0.0


class Cross(nn.Module):
    """A cross layer with a full matrix (equation 1)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, first: Tensor, x: Tensor) -> Tensor:  # B F, B F -> B F
        return first * self.linear(x) + x


class LowRankCross(nn.Module):
    """A cross layer with a mixture of experts of low rank (equations 3 and 4); the bias is that of the layer."""

    def __init__(self, width: int, rank: int, experts: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(experts, rank, width))  # V
        self.middle = nn.Parameter(torch.empty(experts, rank, rank))  # C
        self.up = nn.Parameter(torch.empty(experts, width, rank))  # U
        self.bias = nn.Parameter(torch.zeros(width))
        self.gate = nn.Linear(width, experts, bias=False)

    def forward(self, first: Tensor, x: Tensor) -> Tensor:  # B F, B F -> B F
        low = torch.einsum("erf,bf->ber", self.down, x).tanh()
        low = torch.einsum("esr,ber->bes", self.middle, low).tanh()
        # The weights sum to 1, so that the bias of the layer can be added to the mixture.
        mixed = torch.einsum("efr,ber,be->bf", self.up, low, self.gate(x).softmax(-1))
        return first * (mixed + self.bias) + x


class DCNv2(nn.Module):
    """A classifier or regressor of tables. Raises `SettingsError` for a table without columns and an unknown structure."""

    def __init__(self, config: Config):
        super().__init__()
        c = config
        width = c.numbers + len(c.categories) * c.dim
        if not width:
            raise SettingsError("DCN-v2 needs at least one numeric or categorical column")
        if c.structure not in ("stacked", "parallel"):
            raise SettingsError(f"structure={c.structure!r} is not supported. Choose stacked or parallel.")
        self.config = config
        self.embed = CategoryEmbedding(c.categories, c.dim) if c.categories else None
        self.cross = nn.ModuleList(LowRankCross(width, c.rank, c.experts) if c.rank else Cross(width) for _ in range(c.depth))
        layers: list[nn.Module] = []
        inputs = width
        for hidden in c.hidden:
            layers += [nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(c.dropout)]
            inputs = hidden
        self.deep = nn.Sequential(*layers)
        self.head = nn.Linear(inputs + width * (c.structure == "parallel"), c.num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, LowRankCross):
                for part in (module.down, module.middle, module.up):
                    bound = (6 / (part.shape[1] + part.shape[2])) ** 0.5
                    nn.init.uniform_(part, -bound, bound)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:  # B N, B K -> B classes
        x = first = numbers if self.embed is None else torch.cat([numbers, self.embed(categories).flatten(1)], 1)
        for layer in self.cross:
            x = layer(first, x)
        if self.config.structure == "stacked":
            return self.head(self.deep(x))
        return self.head(torch.cat([x, self.deep(first)], 1))


CARD = Card(
    name="dcn-v2",
    model=DCNv2,
    config=Config,
    paper="arXiv:2008.13535",
    year=2020,
    input_type="table",
    output_type="label",
    sizes={
        "dcn-v2": Size(),
        "dcn-v2-mix": Size(rank=64),
        "dcn-v2-s": Size(depth=2, hidden=(128, 64)),
        "dcn-v2-test": Size(
            numbers=3, categories=(4, 5, 3), dim=4, depth=2, rank=2, experts=3, hidden=(8,), structure="parallel"
        ),
    },
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-4, "grad_clip": 10.0},
)

"""MLP: fully connected layers over the columns of a table (Gorishniy et al. 2021, arXiv:2106.11959).

New here: numbers are used as they are, categories as learned embeddings. A well-tuned MLP is a strong baseline for
tabular data.

Initialization: He uniform matrices and zero biases; embeddings as in `models.layers.table.CategoryEmbedding`.
Shapes: B batch, N number columns, K category columns, E width of a category embedding, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.table import CategoryEmbedding


@dataclass(frozen=True, kw_only=True)
class Config:
    numbers: int = 8  # N
    categories: tuple[int, ...] = ()  # values of each category column, including 0 (unseen)
    num_classes: int = 2
    embedding: int = 16  # E
    dim: int = 256  # D
    depth: int = 3  # hidden layers
    dropout: float = 0.2


class MLP(nn.Module):
    """MLP for tables: numbers and categories -> class logits. Raises `SettingsError` for a table without columns."""

    def __init__(self, config: Config):
        super().__init__()
        if not config.numbers and not config.categories:
            raise SettingsError("the table has no columns: numbers=0 and categories=()")
        self.config = config
        self.embed = CategoryEmbedding(config.categories, config.embedding) if config.categories else None
        width = config.numbers + len(config.categories) * config.embedding
        self.layers = nn.ModuleList(nn.Linear(config.dim if i else width, config.dim) for i in range(config.depth))
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.dim if config.depth else width, config.num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:  # B N, B K -> B classes
        x = numbers
        if self.embed is not None:
            x = torch.cat([x, self.embed(categories).flatten(1)], 1)
        for layer in self.layers:
            x = self.dropout(F.relu(layer(x)))
        return self.head(x)


CARD = Card(
    name="mlp",
    model=MLP,
    config=Config,
    paper="arXiv:2106.11959",
    year=2021,
    input_type="table",
    output_type="label",
    sizes={
        "mlp-s": Size(),
        "mlp-m": Size(dim=512, depth=4),
        "mlp-test": Size(numbers=3, categories=(3, 5), num_classes=3, embedding=4, dim=16, depth=2, dropout=0.0),
    },
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-2, "grad_clip": 1.0},
)

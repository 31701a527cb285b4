"""DeepFM: a factorization machine and an MLP on shared embeddings (Guo et al. 2017, arXiv:1703.04247).

New here: a factorization machine models pairwise interactions (dot products of embeddings), an MLP interactions of higher
order, and both share the embeddings, so that no feature engineering is needed. The embedding of a number is multiplied by
the number, as in equation 2.

Initialization: embeddings of categories uniform by their width, of unseen values zero, of numbers N(0, 0.01);
first-order weights zero; the MLP as torch's linear layers.
Shapes: B batch, N number columns, K category columns, F = N + K fields, D width of an embedding.
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
    num_classes: int = 2  # 2: binary classification; 1: regression
    dim: int = 10  # D
    hidden: tuple[int, ...] = (400, 400, 400)
    dropout: float = 0.5


class DeepFM(nn.Module):
    """DeepFM: numbers and categories -> two logits, the first always 0 (`num_classes=2`), or one value (`num_classes=1`).

    Raises `SettingsError` for other numbers of classes and for a table without columns.
    """

    def __init__(self, config: Config):
        super().__init__()
        fields = config.numbers + len(config.categories)
        if config.num_classes not in (1, 2):
            raise SettingsError(
                f"num_classes={config.num_classes} is not supported: DeepFM has num_classes=2 (binary) or 1 (regression)"
            )
        if not fields:
            raise SettingsError("DeepFM needs at least one numeric or categorical column")
        self.config = config
        self.bias = nn.Parameter(torch.zeros(1))
        self.first_numbers = nn.Parameter(torch.zeros(config.numbers))
        self.number_vectors = nn.Parameter(torch.empty(config.numbers, config.dim))
        self.first, self.vectors = None, None
        if config.categories:
            self.first = CategoryEmbedding(config.categories, 1)
            self.vectors = CategoryEmbedding(config.categories, config.dim)
        layers: list[nn.Module] = []
        width = fields * config.dim
        for hidden in config.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(config.dropout)]
            width = hidden
        self.deep = nn.Sequential(*layers, nn.Linear(width, 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.number_vectors, std=0.01)
        if self.first is not None:
            self.first.weight.zero_()

    def embed_fields(self, numbers: Tensor, categories: Tensor) -> tuple[Tensor, Tensor]:  # -> B F D, B
        """Return the embedding of each field times its value, and the sum of the first-order terms."""
        vectors, linear = numbers[..., None] * self.number_vectors, numbers @ self.first_numbers
        if self.vectors is not None and self.first is not None:
            vectors = torch.cat([vectors, self.vectors(categories)], 1)
            linear = linear + self.first(categories).sum((1, 2))
        return vectors, linear

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:  # B N, B K -> B classes
        vectors, linear = self.embed_fields(numbers, categories)
        # Equation 2: the sum over pairs of products is half of (square of the sum - sum of the squares).
        pairs = (vectors.sum(1).square() - vectors.square().sum(1)).sum(-1) / 2
        y = self.bias + linear + pairs + self.deep(vectors.flatten(1))[:, 0]
        return y[:, None] if self.config.num_classes == 1 else torch.stack([torch.zeros_like(y), y], 1)


CARD = Card(
    name="deepfm",
    model=DeepFM,
    config=Config,
    paper="arXiv:1703.04247",
    year=2017,
    input_type="table",
    output_type="label",
    sizes={
        "deepfm": Size(),  # the paper's network for Criteo: width 10, 400-400-400
        "deepfm-s": Size(dim=16, hidden=(128, 64), dropout=0.3),
        "deepfm-test": Size(numbers=3, categories=(4, 5, 3), dim=4, hidden=(8, 6), dropout=0.0),
    },
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-4},
)

"""Linear model: one weight per feature and class (Cox 1958 for classes, Hoerl and Kennard 1970 for values).

New here: nothing is hidden. It is the model that a network must beat: `fieldguide.training.solvers` fits it as a logistic or
ridge regression, with the strength of the penalty that is best on the validation rows.

Initialization: zeros, as fitting starts from there.
Shapes: B batch, N number columns, K category columns, F features: the numbers and one position per category.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError

MAX_DENSE_FEATURES = 1000  # wider features, as of users and items, are returned as sparse ones


@dataclass(frozen=True, kw_only=True)
class Config:
    numbers: int = 8  # N
    categories: tuple[int, ...] = ()  # values of each category column, including 0 (unseen)
    num_classes: int = 2  # 1 for regression

    @property
    def width(self) -> int:
        return self.numbers + sum(self.categories)


class Linear(nn.Module):
    """A linear map of numbers and one-hot categories to class logits, or to the value.

    Raises `SettingsError` for a table without columns.
    """

    offsets: Tensor  # K: feature of value 0 of each category column

    def __init__(self, config: Config):
        super().__init__()
        if not config.width:
            raise SettingsError("the table has no columns: numbers=0 and categories=()")
        self.config = config
        starts = torch.tensor([config.numbers, *config.categories], dtype=torch.int64).cumsum(0)[: len(config.categories)]
        self.register_buffer("offsets", starts, persistent=False)
        self.head = nn.Linear(config.width, config.num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def encode(self, numbers: Tensor, categories: Tensor) -> Tensor:  # B N, B K -> B F, sparse if wide
        rows, place = numbers.shape[0], categories + self.offsets
        if self.config.width <= MAX_DENSE_FEATURES:
            dense = numbers.new_zeros(rows, self.config.width)
            dense[:, : self.config.numbers] = numbers
            return dense.scatter(1, place, 1.0)
        own = torch.arange(self.config.numbers, device=numbers.device).expand(rows, -1)
        columns = torch.cat([own, place], 1)
        row = torch.arange(rows, device=numbers.device)[:, None].expand_as(columns)
        values = torch.cat([numbers, torch.ones_like(place, dtype=numbers.dtype)], 1)
        index = torch.stack([row.flatten(), columns.flatten()])
        return torch.sparse_coo_tensor(index, values.flatten(), (rows, self.config.width), check_invariants=False)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:  # B N, B K -> B classes
        logits = F.linear(numbers, self.head.weight[:, : self.config.numbers], self.head.bias)
        if self.config.categories:
            logits = logits + F.embedding(categories + self.offsets, self.head.weight.t()).sum(1)
        return logits


CARD = Card(
    name="linear",
    model=Linear,
    config=Config,
    paper="doi:10.1111/j.2517-6161.1958.tb00292.x",
    year=1958,
    input_type="table",
    output_type="label",
    solver="linear",
    sizes={
        "linear": Size(params=18, source="two classes of 8 numbers, one bias per class"),
        "linear-test": Size(numbers=3, categories=(3, 5), num_classes=3),
    },
)

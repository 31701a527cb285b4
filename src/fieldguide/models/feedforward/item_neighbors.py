"""Item neighbors: items that the same users interact with (Sarwar et al. 2001, doi:10.1145/371920.372071).

Each item has a list of the items that are most similar to it (section 3.1), by the cosine of the columns of the matrix of users and
items (Deshpande and Karypis 2004, doi:10.1145/963770.963776, section 4.1). The score of an item is the sum of its similarities to the
items of the user's history (section 3.2.1). New here: the sum decays with the distance from the latest item, by a factor that is
chosen on validation rows; 1 counts all items alike. Nothing is trained by gradients: neighbors are counted.

Initialization: the following items are neighbors, with random similarities, until `set_neighbors` stores counted ones.
Shapes: B batch, T items of a history, V items, K neighbors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size


@dataclass(frozen=True, kw_only=True)
class Config:
    items: int = 3417  # V: number of items including 0, which means no item
    neighbors: int = 200  # K
    decay: float = 1.0  # factor of older items for each newer one


class ItemNeighbors(nn.Module):
    """A list of weighted neighbors for each item; returns the scores of the next item at each position.

    Item 0 means no item: it adds nothing.
    """

    index: Tensor  # V K int64

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width = min(config.neighbors, config.items)
        self.weight = nn.Parameter(torch.empty(config.items, width))
        self.register_buffer("index", torch.zeros(config.items, width, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give each item the following ones as neighbors, with random weights."""
        rows, width = self.weight.shape
        nn.init.uniform_(self.weight)
        self.index.copy_((torch.arange(rows)[:, None] + torch.arange(1, width + 1)) % rows)

    @torch.no_grad()
    def set_neighbors(self, index: Any, weight: Any) -> None:
        """Store the neighbors of each item, V K, and their similarities; unused places have weight 0."""
        self.index.copy_(torch.as_tensor(index))
        self.weight.copy_(torch.as_tensor(weight))

    def forward(self, items: Tensor, mask: Tensor | None = None) -> Tensor:  # B T -> B T V
        real, place = self.count_items(items, mask)
        alone = self.weight.new_zeros(1, 1, 1).expand(*items.shape, self.config.items)
        alone = alone.scatter_add(2, self.index[items], self.weight[items])  # the scores of each item by itself
        away = place[:, :, None] - place[:, None]  # B T T
        return torch.where((away >= 0) & real[:, None], self.weigh(away.clamp(min=0)), 0.0) @ alone

    def score_next(self, items: Tensor, mask: Tensor | None = None) -> Tensor:  # B T -> B V
        """Return the scores after the latest item of each history."""
        real, place = self.count_items(items, mask)
        share = torch.where(real, self.weigh(place[:, -1:] - place), 0.0)
        scores = self.weight.new_zeros(1, 1).expand(items.shape[0], self.config.items)
        return scores.scatter_add(1, self.index[items].flatten(1), (self.weight[items] * share[..., None]).flatten(1))

    def weigh(self, away: Tensor) -> Tensor:
        """Return the factors of items that are so many items away from the latest."""
        return self.config.decay ** away.to(self.weight.dtype)

    def count_items(self, items: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:  # B T -> B T bool, B T int64
        """Return which places have an item, and how many items there are up to each place."""
        real = (items > 0) if mask is None else mask & (items > 0)
        return real, real.long().cumsum(1)


CARD = Card(
    name="item-neighbors",
    model=ItemNeighbors,
    config=Config,
    paper="doi:10.1145/371920.372071",
    year=2001,
    input_type="items",
    output_type="items",
    solver="neighbors",
    endless=True,
    sizes={
        "item-neighbors": Size(params=683_400, source="a similarity for each of 3,417 items and 200 neighbors"),
        "item-neighbors-test": Size(items=30, neighbors=6, decay=0.7),
    },
)

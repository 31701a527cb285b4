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

    def add_item(self, scores: Tensor, item: Tensor, real: Tensor) -> Tensor:  # B V, B, B bool -> B V
        """Return the scores after one more item of each history."""
        weight = self.weight[item] * real[:, None].to(self.weight.dtype)
        return torch.where(real[:, None], self.config.decay * scores, scores).scatter_add(1, self.index[item], weight)

    def forward(self, items: Tensor, mask: Tensor | None = None) -> Tensor:  # B T -> B T V
        real = (items > 0) if mask is None else mask & (items > 0)
        scores, found = self.weight.new_zeros(items.shape[0], self.config.items), []
        for step in range(items.shape[1]):
            scores = self.add_item(scores, items[:, step], real[:, step])
            found.append(scores)
        return torch.stack(found, 1)

    def score_next(self, items: Tensor, mask: Tensor | None = None) -> Tensor:  # B T -> B V
        """Return the scores after the latest item of each history."""
        real = (items > 0) if mask is None else mask & (items > 0)
        scores = self.weight.new_zeros(items.shape[0], self.config.items)
        for step in range(items.shape[1]):
            scores = self.add_item(scores, items[:, step], real[:, step])
        return scores


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

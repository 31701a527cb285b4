"""Two-tower retrieval: users and items as vectors of one space (Yi et al. 2019, doi:10.1145/3298689.3346996).

New here: a tower of layers for the user and one for the item, whose vectors of length 1 are compared by their product over a
temperature, so that the best items are found by comparing one vector with a table. Training compares each user with the items of the
batch, corrected by how often an item is one of them (`objectives.in_batch`). Ids and features of both sides are read; a user is
also the mean of the items met so far.

Initialization: embeddings N(0, 1 / D), those of unseen values zero; layers as torch's linear layers.
Shapes: B batch, T items of a history, V items, D width of an embedding, E width of the vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.table import CategoryEmbedding

EPS = 1e-6  # least length of a vector


@dataclass(frozen=True, kw_only=True)
class Config:
    items: int = 3417  # V: number of items including 0, which means no item
    user_categories: tuple[int, ...] = (1,)  # values of each category of users, including 0 (unseen); the first is the user
    user_numbers: int = 0  # number columns of users
    item_categories: tuple[int, ...] = ()  # values of each category of items, including 0 (unseen)
    item_numbers: int = 0  # number columns of items
    dim: int = 64  # D
    hidden: tuple[int, ...] = (128,)  # hidden widths of both towers
    out: int = 64  # E
    dropout: float = 0.2
    temperature: float = 0.1  # by which products are divided


class Tower(nn.Module):
    """Embeddings and numbers -> a vector of length 1."""

    def __init__(self, width: int, config: Config):
        super().__init__()
        layers: list[nn.Module] = []
        for hidden in config.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(config.dropout)]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, config.out))

    def forward(self, x: Tensor) -> Tensor:  # ... F -> ... E
        y = self.layers(x)
        return y / y.norm(dim=-1, keepdim=True).clamp(min=EPS)


class TwoTower(nn.Module):
    """Two towers that return the logits of the next item at each position: the product of the vectors of user and item over
    the temperature.

    The features of items are stored with the weights (`set_item_features`). Without a `profile`, the user is unknown and is
    only the mean of the history. The logit of item 0 means nothing and should be excluded from rankings.
    """

    item_codes: Tensor  # V Ki int64
    item_values: Tensor  # V Ni

    def __init__(self, config: Config):
        super().__init__()
        c = config
        if not c.temperature > 0:
            raise SettingsError(f"temperature={c.temperature} must be above 0.")
        self.config = config
        self.embed = nn.Embedding(c.items, c.dim)
        self.user_embed = CategoryEmbedding(c.user_categories, c.dim) if c.user_categories else None
        self.item_embed = CategoryEmbedding(c.item_categories, c.dim) if c.item_categories else None
        self.user = Tower(c.dim * (1 + len(c.user_categories)) + c.user_numbers, c)
        self.item = Tower(c.dim * (1 + len(c.item_categories)) + c.item_numbers, c)
        self.register_buffer("item_codes", torch.zeros(c.items, len(c.item_categories), dtype=torch.int64))
        self.register_buffer("item_values", torch.zeros(c.items, c.item_numbers))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        std = self.config.dim**-0.5
        nn.init.normal_(self.embed.weight, std=std)
        for table in (self.user_embed, self.item_embed):
            if table is not None:
                nn.init.normal_(table.weight, std=std)
                table.weight[table.offsets] = 0.0

    @torch.no_grad()
    def set_item_features(self, codes: Any, values: Any) -> None:
        """Store the categories, V Ki, and numbers, V Ni, of all items; those of item 0 come first."""
        self.item_codes.copy_(torch.as_tensor(codes))
        self.item_values.copy_(torch.as_tensor(values))

    def encode_items(self, items: Tensor) -> Tensor:  # N -> N E
        """Return the vectors of items."""
        parts = [F.embedding(items, self.embed.weight)]
        if self.item_embed is not None:
            parts.append(self.item_embed(self.item_codes[items]).flatten(1))
        return self.item(torch.cat([*parts, self.item_values[items]], 1))

    def table(self) -> Tensor:  # V E
        """Return the vectors of all items."""
        return self.encode_items(torch.arange(self.config.items, device=self.embed.weight.device))

    def score_next(self, items: Tensor, mask: Tensor | None = None, *profile: Tensor | None) -> Tensor:  # B T -> B V
        """Return the logits of the item after the latest one of each history."""
        return F.linear(self.features(items, mask, *profile)[:, -1], self.table())

    def features(
        self,
        items: Tensor,
        mask: Tensor | None = None,
        profile: Tensor | None = None,
        profile_numbers: Tensor | None = None,
    ) -> Tensor:  # B T, B T, B Ku, B Nu -> B T E
        """Return the vectors of the users after each item, of length 1 / temperature. Categories are 0 and numbers are 0 if not given."""
        (rows, steps), c = items.shape, self.config
        real = (items > 0) if mask is None else mask & (items > 0)
        real = real[..., None].to(self.embed.weight.dtype)
        history = (self.embed(items) * real).cumsum(1) / real.cumsum(1).clamp(min=1)
        parts = []
        if self.user_embed is not None:
            codes = items.new_zeros(rows, len(c.user_categories)) if profile is None else profile
            parts.append(self.user_embed(codes).flatten(1))
        numbers = real.new_zeros(rows, c.user_numbers) if profile_numbers is None else profile_numbers.to(real.dtype)
        fixed = torch.cat([*parts, numbers], 1)[:, None].expand(-1, steps, -1)
        return self.user(torch.cat([history, fixed], -1)) / c.temperature

    def forward(self, items: Tensor, mask: Tensor | None = None, *profile: Tensor | None) -> Tensor:  # B T -> B T V
        return F.linear(self.features(items, mask, *profile), self.table())


CARD = Card(
    name="two-tower",
    model=TwoTower,
    config=Config,
    paper="doi:10.1145/3298689.3346996",
    year=2019,
    input_type="items",
    optional_inputs=("profile", "profile_numbers"),
    output_type="towers",
    endless=True,
    sizes={
        "two-tower": Size(),
        "two-tower-test": Size(
            items=30,
            user_categories=(5, 3),
            user_numbers=2,
            item_categories=(4,),
            item_numbers=1,
            dim=4,
            hidden=(8,),
            out=6,
            dropout=0.0,
            temperature=0.1,
        ),
    },
    recipe={"optimizer": "adamw", "lr": 3e-3, "weight_decay": 1e-4},
)

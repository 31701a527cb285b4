"""BERT4Rec: sequential recommendation by a bidirectional Transformer (Sun et al. 2019, arXiv:1904.06690).

New here: items of a history are hidden and predicted from the items before and after them, so that each position is
learned from both sides. The next item is predicted by a hidden place after the last item. As in the authors' code, the
input is normalized, the head has one more layer with a normalization, and every item has a bias of its own. Two of their
parts are left out because nothing depends on them: the second token type, and the rows of the vocabulary that never occur.

Initialization: normal, truncated at two standard deviations, and zero biases, as in the authors' code; the standard deviation is .02
at the width of 768 and larger by sqrt(768 / D) for smaller D, as for BERT here, where the authors have .02 at any width.
Shapes: B batch, T items of a history, D width, V items.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.padding import ensure_nonempty
from fieldguide.models.transformer._shared.text_encoder import PostNormBlock

EPS = 1e-12  # epsilon of the normalization layers


@dataclass(frozen=True, kw_only=True)
class Config:
    items: int = 3417  # V: number of items including 0, which stands for a hidden item
    length: int = 200  # maximum history length, including the place of the next item
    dim: int = 64  # D
    depth: int = 2
    heads: int = 2
    hidden: int = 256  # hidden width of the MLPs
    dropout: float = 0.2
    hidden_share: float = 0.2  # share of the items that are hidden in training; the authors use .6 for short histories


class Bert4Rec(nn.Module):
    """An encoder of histories that returns the logits of the item at each position. Raises `DataError` for histories
    longer than `length`.

    Item 0 is a hidden item, or an item that is not known; padding is what `mask` excludes. Positions count from the
    first item.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.items, c.dim)
        self.pos = nn.Embedding(c.length, c.dim)
        self.norm, self.dropout = nn.LayerNorm(c.dim, EPS), nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            PostNormBlock(Attention(c.dim, c.heads, c.dropout), c.dim, c.hidden, c.dropout, EPS) for _ in range(c.depth)
        )
        self.dense, self.last_norm = nn.Linear(c.dim, c.dim), nn.LayerNorm(c.dim, EPS)
        self.bias = nn.Parameter(torch.zeros(c.items))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = 0.02 * max(1.0, 768 / self.config.dim) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.bias)

    def table(self) -> Tensor:  # items D+1
        """Return the item embeddings, used for input and scoring, and the bias of each item as one more column."""
        return torch.cat([self.embed.weight, self.bias[:, None]], 1)

    def score_next(self, items: Tensor, mask: Tensor | None = None) -> Tensor:  # B T -> B V
        """Return the logits of a hidden item after the latest one of each history; of full histories the first item is
        left out.
        """
        real = torch.ones_like(items, dtype=torch.bool) if mask is None else mask
        items, real = F.pad(items, (0, 1)), F.pad(real, (0, 1), value=True)
        first = max(0, items.shape[1] - self.config.length)
        return F.linear(self.features(items[:, first:], real[:, first:])[:, -1], self.table())

    def features(self, items: Tensor, mask: Tensor | None = None) -> Tensor:  # B T -> B T D+1
        """Return the hidden states, followed by 1; the product with a row of `table` is the logit of that item."""
        steps, length = items.shape[1], self.config.length
        if steps > length:
            raise DataError(
                f"A history of {steps} items exceeds the model's length={length}. "
                f"Pass the latest {length} items or create the model with a larger length."
            )
        if mask is None:
            place = torch.arange(steps, device=items.device)
        else:
            place = (mask.cumsum(1) - 1).clamp(min=0)
            mask = ensure_nonempty(mask)
        x = self.dropout(self.norm(self.embed(items) + self.pos(place)))
        for block in self.blocks:
            x = block(x, mask)
        return F.pad(self.last_norm(F.gelu(self.dense(x))), (0, 1), value=1.0)

    def forward(self, items: Tensor, mask: Tensor | None = None) -> Tensor:  # B T, B T -> B T items
        return F.linear(self.features(items, mask), self.table())


CARD = Card(
    name="bert4rec",
    model=Bert4Rec,
    config=Config,
    paper="arXiv:1904.06690",
    year=2019,
    input_type="items",
    output_type="masked-items",
    sizes={
        # The authors' configurations for MovieLens-1M (3,416 items). Theirs count three more rows of the vocabulary, whose
        # biases and embeddings are never used, and two token types, of which one is.
        "bert4rec-ml1m": Size(params=339_289, source="FeiSun/BERT4Rec, bert_config_ml-1m_64.json"),
        "bert4rec-ml1m-256": Size(
            dim=256, heads=8, hidden=512, dropout=0.5, params=2_050_393, source="FeiSun/BERT4Rec, bert_config_ml-1m_256.json"
        ),
        "bert4rec-beauty": Size(
            items=54_543,
            length=50,
            dropout=0.5,
            hidden_share=0.6,
            params=3_652_879,
            source="FeiSun/BERT4Rec, bert_config_beauty_64.json",
        ),
        "bert4rec-test": Size(items=30, length=12, dim=8, heads=2, hidden=20, dropout=0.0),
    },
    # The authors' rate is 1e-4 for 400,000 steps of 256 histories.
    recipe={"optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.01, "grad_clip": 5.0, "warmup": 0.1},
)

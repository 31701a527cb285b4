"""TabM: a parameter-efficient ensemble of MLPs for tables (Gorishniy et al. 2024, arXiv:2410.24210).

New here: the members share all weight matrices and differ only in vectors that scale their inputs and outputs
(BatchEnsemble, Wen et al. 2020, arXiv:2002.06715) and in their heads. Each member has its own loss, and the mean of
their predictions is used, so that the ensemble needs little more memory than one network. Numbers are encoded by
piecewise-linear embeddings (arXiv:2203.05556).

Initialization: as in section 3.3 of the paper: matrices uniform by fan-in, equal biases for all members; the first
input scale is normal, one value per column and member; all other scales are 1, so that members initially differ only
in their weighting of the columns; the heads are independent.
Shapes: B batch, N number columns, K category columns, M members, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.table import CategoryEmbedding, OneHot, PiecewiseLinear


@dataclass(frozen=True, kw_only=True)
class Config:
    numbers: int = 8  # N
    categories: tuple[int, ...] = ()  # values of each category column, including 0 (unseen)
    num_classes: int = 2
    members: int = 32  # M
    bins: int = 48  # bins per number column; the paper tunes 2 to 128
    embedding: int = 16  # width of the embeddings of numbers and of categories with many values
    one_hot: int = 64  # categories with more values than this are embedded instead
    dim: int = 512  # D
    depth: int = 2
    dropout: float = 0.1


def uniform_(tensor: Tensor, fan_in: int) -> Tensor:
    return nn.init.uniform_(tensor, -(fan_in**-0.5), fan_in**-0.5)


class BatchEnsembleLinear(nn.Module):
    """Linear layer with a shared matrix; `r` and `s` scale the inputs and outputs of each member."""

    def __init__(self, inputs: int, outputs: int, members: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.r = nn.Parameter(torch.ones(members, inputs))
        self.s = nn.Parameter(torch.ones(members, outputs))
        self.bias = nn.Parameter(torch.empty(members, outputs))

    def forward(self, x: Tensor) -> Tensor:  # B M D -> B M D'
        return torch.addcmul(self.bias, F.linear(x * self.r, self.weight), self.s)


class MemberHeads(nn.Module):
    """Independent linear layers, one per member."""

    def __init__(self, inputs: int, outputs: int, members: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(members, outputs))

    def forward(self, x: Tensor) -> Tensor:  # B M D -> B M classes
        return torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1) + self.bias


class TabM(nn.Module):
    """TabM: numbers and categories -> class logits of every member.

    Raises `SettingsError` for a table without columns.
    """

    few: Tensor  # indices of the one-hot columns
    many: Tensor  # indices of the embedded columns

    def __init__(self, config: Config):
        super().__init__()
        if not config.numbers and not config.categories:
            raise SettingsError("the table has no columns: numbers=0 and categories=()")
        self.config = config
        few = [i for i, size in enumerate(config.categories) if size <= config.one_hot]
        many = [i for i, size in enumerate(config.categories) if size > config.one_hot]
        self.register_buffer("few", torch.tensor(few, dtype=torch.int64), persistent=False)
        self.register_buffer("many", torch.tensor(many, dtype=torch.int64), persistent=False)
        self.numbers = PiecewiseLinear(config.numbers, config.bins, config.embedding) if config.numbers else None
        self.one_hot = OneHot([config.categories[i] for i in few]) if few else None
        self.embed = CategoryEmbedding([config.categories[i] for i in many], config.embedding) if many else None
        # Widths of the columns in the concatenated features.
        self.widths = (
            [config.embedding] * config.numbers + [config.categories[i] - 1 for i in few] + [config.embedding] * len(many)
        )
        self.layers = nn.ModuleList(
            BatchEnsembleLinear(config.dim if i else sum(self.widths), config.dim, config.members) for i in range(config.depth)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = MemberHeads(config.dim, config.num_classes, config.members)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        layers = [module for module in self.layers if isinstance(module, BatchEnsembleLinear)]
        for layer in layers:
            uniform_(layer.weight, layer.weight.shape[1])
            layer.bias.copy_(uniform_(torch.empty_like(layer.bias[0]), layer.weight.shape[1]))
            nn.init.ones_(layer.r)
            nn.init.ones_(layer.s)
        first = layers[0].r
        scale = torch.randn(first.shape[0], len(self.widths), device=first.device, dtype=first.dtype)
        widths = torch.tensor(self.widths, device=first.device)
        first.copy_(scale.repeat_interleave(widths, 1, output_size=first.shape[1]))
        uniform_(self.head.weight, self.config.dim)
        uniform_(self.head.bias, self.config.dim)

    def features(self, numbers: Tensor, categories: Tensor) -> Tensor:  # B N, B K -> B F
        parts = []
        if self.numbers is not None:
            parts.append(self.numbers(numbers).flatten(1))
        if self.one_hot is not None:
            parts.append(self.one_hot(categories[:, self.few], self.head.weight.dtype))
        if self.embed is not None:
            parts.append(self.embed(categories[:, self.many]).flatten(1))
        return torch.cat(parts, 1)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:  # B N, B K -> B M classes
        x = self.features(numbers, categories)[:, None]  # B 1 F: shared by all members
        for layer in self.layers:
            x = self.dropout(F.relu(layer(x)))
        return self.head(x)


CARD = Card(
    name="tabm",
    model=TabM,
    config=Config,
    paper="arXiv:2410.24210",
    year=2024,
    input_type="table",
    output_type="label",
    sizes={
        # First, and therefore the default: it trains on small tables in seconds on a CPU.
        "tabm-s": Size(dim=192, members=16, bins=24),
        "tabm-m": Size(),  # the paper's default
        "tabm-test": Size(numbers=3, categories=(3, 5), num_classes=3, members=4, bins=5, embedding=4, dim=16, dropout=0.0),
    },
    # Learning rate and weight decay are in the middle of the ranges that the paper tunes.
    # 40 epochs are enough for the small tables of benchmarks/tables.py.
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 3e-4, "grad_clip": 1.0, "epochs": 40},
)

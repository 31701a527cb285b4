"""FT-Transformer: attention between the columns of a table (Gorishniy et al. 2021, arXiv:2106.11959).

New here: the feature tokenizer turns every column into a token: a number times a vector plus a bias, or the embedding of a category
plus a bias. A pre-norm Transformer with ReGLU lets the tokens of a row attend to each other, and the class token predicts. The norm
before the first attention is left out, which the authors found to matter.

Initialization: tokens uniform by their width; the embedding of a category not seen in training is 0, so that its token is the bias
of the column; linear layers as in torch, biases of the attention 0.
Shapes: B batch, N number columns, K category columns, T = 1 + N + K tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.table import CategoryEmbedding


@dataclass(frozen=True, kw_only=True)
class Config:
    numbers: int = 100  # N
    categories: tuple[int, ...] = ()  # values of each category column, including 0 (unseen)
    num_classes: int = 1
    dim: int = 192  # D
    depth: int = 3
    heads: int = 8
    hidden: int = 256  # width between the layers of the MLP: 4/3 of D
    attention_dropout: float = 0.2
    dropout: float = 0.1  # in the MLP


class FeatureTokenizer(nn.Module):
    """A class token, and a token for each column."""

    def __init__(self, numbers: int, categories: tuple[int, ...], dim: int):
        super().__init__()
        self.cls = nn.Parameter(torch.empty(dim))
        self.weight = nn.Parameter(torch.empty(numbers, dim))
        self.bias = nn.Parameter(torch.empty(numbers + len(categories), dim))
        self.embed = CategoryEmbedding(categories, dim) if categories else None
        for parameter in (self.cls, self.weight, self.bias):
            nn.init.uniform_(parameter, -(dim**-0.5), dim**-0.5)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:  # B N, B K -> B T D
        tokens = numbers[..., None] * self.weight  # B N D
        if self.embed is not None:
            tokens = torch.cat([tokens, self.embed(categories)], 1)
        return torch.cat([self.cls.expand(numbers.shape[0], 1, -1), tokens + self.bias], 1)


class Block(nn.Module):
    """Attention and a ReGLU MLP, each on a residual branch."""

    def __init__(self, c: Config, is_first: bool):
        super().__init__()
        self.norm1 = nn.Identity() if is_first else nn.LayerNorm(c.dim)
        self.attn = Attention(c.dim, c.heads, c.attention_dropout)
        self.norm2 = nn.LayerNorm(c.dim)
        self.up = nn.Linear(c.dim, 2 * c.hidden)
        self.down = nn.Linear(c.hidden, c.dim)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:  # B T D -> B T D, or the first tokens
        x = x[:, :num_queries] + self.attn(self.norm1(x), num_queries=num_queries)
        value, gate = self.up(self.norm2(x)).chunk(2, -1)  # B T hidden, each
        return x + self.down(self.dropout(value * F.relu(gate)))


class FTTransformer(nn.Module):
    """FT-Transformer: numbers and categories -> class logits. Raises `SettingsError` for a table without columns."""

    def __init__(self, config: Config):
        super().__init__()
        if not config.numbers and not config.categories:
            raise SettingsError("the table has no columns: numbers=0 and categories=()")
        self.config = config
        self.tokenizer = FeatureTokenizer(config.numbers, config.categories, config.dim)
        self.blocks = nn.ModuleList(Block(config, is_first=not i) for i in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.num_classes)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.attn.qkv.bias)
            nn.init.zeros_(block.attn.proj.bias)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:  # B N, B K -> B classes
        x = self.tokenizer(numbers, categories)
        for i, block in enumerate(self.blocks):
            x = block(x, 1 if i == len(self.blocks) - 1 else None)  # the last block computes the class token only
        return self.head(F.relu(self.norm(x[:, 0])))


SOURCE = "the authors' package rtdl_revisiting_models, for 100 numbers and one output"
CARD = Card(
    name="ft-transformer",
    model=FTTransformer,
    config=Config,
    paper="arXiv:2106.11959",
    year=2021,
    input_type="table",
    output_type="label",
    sizes={
        # The authors' default for each number of blocks from 1 to 6; three blocks are those of the paper.
        "ft-transformer": Size(params=930_241, source=SOURCE),
        "ft-transformer-1": Size(dim=96, depth=1, hidden=128, attention_dropout=0.1, dropout=0.0, params=94_241, source=SOURCE),
        "ft-transformer-2": Size(
            dim=128, depth=2, hidden=170, attention_dropout=0.15, dropout=0.05, params=290_473, source=SOURCE
        ),
        "ft-transformer-4": Size(
            dim=256, depth=4, hidden=341, attention_dropout=0.25, dropout=0.15, params=2_159_785, source=SOURCE
        ),
        "ft-transformer-5": Size(
            dim=320, depth=5, hidden=426, attention_dropout=0.3, dropout=0.2, params=4_176_101, source=SOURCE
        ),
        "ft-transformer-6": Size(
            dim=384, depth=6, hidden=512, attention_dropout=0.35, dropout=0.25, params=7_182_337, source=SOURCE
        ),
        "ft-transformer-test": Size(
            numbers=3, categories=(3, 5), num_classes=3, dim=16, depth=2, heads=4, hidden=12, attention_dropout=0.0, dropout=0.0
        ),
    },
    # The authors train with a rate of 1e-4 for many epochs of early stopping; see docs/log.md for the rate in short runs.
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-5, "grad_clip": 1.0, "epochs": 120},
)

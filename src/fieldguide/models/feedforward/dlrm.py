"""DLRM: the products of all pairs of embeddings, and an MLP for numbers (Naumov et al. 2019, arXiv:1906.00091).

New here: numbers become one more vector of the width of the embeddings, and only the products of different vectors enter the
last MLP, next to the vector of the numbers. Pairs are in the order of the authors' code: the rows of the lower triangle
without its diagonal, the vector of the numbers first. The sigmoid of the last layer belongs to the loss here.

Initialization: as in the authors' code: tables uniform by their number of rows, matrices N(0, 2 / (inputs + outputs)), biases
N(0, 1 / outputs).
Shapes: B batch, N number columns, K category columns, D width of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.table import LookupTable
from fieldguide.models.mapping.key_rules import Row

# Rows of the tables of Criteo's 26 categories, in DLRM's preparation: of Kaggle's challenge, and of the terabyte of logs with at most
# 10 and 40 million rows per table.
# fmt: off
KAGGLE = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652, 2173, 4,
    7046547, 18, 15, 286181, 105, 142572,
)
TERABYTE = (
    9980333, 36084, 17217, 7378, 20134, 3, 7112, 1442, 61, 9758201, 1333352, 313829, 10, 2208, 11156, 122, 4, 970, 14, 9994222,
    7267859, 9946608, 415421, 12420, 101, 36,
)
MLPERF = (
    39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10, 2208, 11938, 155, 4, 976, 14, 39979771,
    25641295, 39664984, 585935, 12972, 108, 36,
)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Config:
    numbers: int = 13  # N
    categories: tuple[int, ...] = KAGGLE  # values of each category column, including 0 (unseen)
    num_classes: int = 2  # 2: binary classification; 1: regression
    dim: int = 16  # D
    bottom: tuple[int, ...] = (512, 256, 64)  # hidden widths of the MLP of the numbers
    top: tuple[int, ...] = (512, 256)  # hidden widths of the last MLP


class DLRM(nn.Module):
    """DLRM: numbers and categories -> two logits, the first always 0 (`num_classes=2`), or one value (`num_classes=1`).

    Without number columns there is no vector of numbers. Raises `SettingsError` for other numbers of classes, and for a table
    with a single category column and nothing else.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = config
        if c.num_classes not in (1, 2):
            raise SettingsError(
                f"num_classes={c.num_classes} is not supported: DLRM has num_classes=2 (binary) or 1 (regression)"
            )
        vectors = len(c.categories) + (c.numbers > 0)
        width = vectors * (vectors - 1) // 2 + c.dim * (c.numbers > 0)
        if not width:
            raise SettingsError("DLRM needs a numeric column or two categorical columns")
        self.config = config
        self.tables = nn.ModuleList(LookupTable(rows, c.dim) for rows in c.categories)
        self.bottom = make_mlp([c.numbers, *c.bottom, c.dim], last=True) if c.numbers else None
        self.top = make_mlp([width, *c.top, 1], last=False)
        # Not stored: rows of the lower triangle, and its columns.
        self.register_buffer("pairs", torch.tril_indices(vectors, vectors, -1), persistent=False)
        self.reset_parameters()

    pairs: Tensor  # 2 pairs

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                outputs, inputs = module.weight.shape
                nn.init.normal_(module.weight, std=(2 / (inputs + outputs)) ** 0.5)
                nn.init.normal_(module.bias, std=outputs**-0.5)
            if isinstance(module, LookupTable):
                bound = len(module.weight) ** -0.5
                nn.init.uniform_(module.weight, -bound, bound)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:  # B N, B K -> B classes
        vectors = [table(column) for table, column in zip(self.tables, categories.unbind(1))]
        first = [] if self.bottom is None else [self.bottom(numbers)]
        stacked = torch.stack([*first, *vectors], 1)  # B vectors D
        products = (stacked @ stacked.mT)[:, self.pairs[0], self.pairs[1]]
        y = self.top(torch.cat([*first, products], 1))
        return y if self.config.num_classes == 1 else torch.cat([torch.zeros_like(y), y], 1)


def make_mlp(widths: list[int], last: bool) -> nn.Sequential:
    """Return linear layers, each followed by ReLU; the last one only if `last`."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*(layers if last else layers[:-1]))


# Files of the authors' code hold a dictionary whose `state_dict` has these names.
AUTHORS: dict[str, Row] = {"emb_l.{i}.weight": "tables.{i}.weight", "bot_l.{i}.*": "bottom.{i}.*", "top_l.{i}.*": "top.{i}.*"}

CARD = Card(
    name="dlrm",
    model=DLRM,
    config=Config,
    paper="arXiv:1906.00091",
    year=2019,
    input_type="table",
    output_type="label",
    sizes={
        "dlrm-s": Size(categories=(100,) * 26, bottom=(64,), top=(128, 64)),
        "dlrm-criteo-kaggle": Size(params=540_677_217, source="facebookresearch/dlrm, dlrm_s_criteo_kaggle.sh"),
        "dlrm-criteo-terabyte": Size(
            categories=TERABYTE,
            dim=64,
            bottom=(512, 256),
            top=(512, 512, 256),
            params=3_144_845_185,
            source="facebookresearch/dlrm, dlrm_s_criteo_terabyte.sh with --max-ind-range=10000000",
        ),
        "dlrm-mlperf": Size(
            categories=MLPERF,
            dim=128,
            bottom=(512, 256),
            top=(1024, 1024, 512, 256),
            params=24_036_595_969,
            source="facebookresearch/dlrm, run_and_time.sh (MLPerf)",
        ),
        "dlrm-test": Size(numbers=3, categories=(4, 5, 3), dim=4, bottom=(6,), top=(8, 6)),
    },
    weights={"official": AUTHORS},
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-4},
)

"""TabICLv2: in-context learning on tables, pretrained on synthetic ones (Qu et al. 2026, arXiv:2602.11139).

New here: a table is learned in one forward pass. Every column is a set that a few inducing points summarize, attention between the
columns of a row gives the vector of the row, and rows attend to the labeled rows of the context. Against the first version
(arXiv:2502.05564), a token is a group of three columns, targets are added to the tokens already, queries are scaled by the number of
keys, and a network with 999 quantiles predicts numbers.

The weights are on the Hugging Face Hub at jingang/TabICL under the BSD 3-clause licence, like the authors' code. They were trained on
tables of 300 to 48,000 rows, 1 to 100 columns and at most 10 classes; more are told apart by groups, in the tokens by the digits of the
class number. The training rows become the context (`Card.solver`).

Initialization: as torch's layers; inducing points and class tokens truncated normal of 0.02; the context random rows.
Shapes: B batch, C rows of the context, F columns, G = F groups of columns, D width of a token, E = 4 D width of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.mapping.config_rules import ConfigRow, Expect, WithDefault
from fieldguide.models.transformer._shared.tabicl_names import SHARED_KEYS, name_stages
from fieldguide.models.transformer._shared.table_context import (
    ContextConfig,
    InContextNetwork,
    InducedBlock,
    KeysValues,
    Learner,
    Rotation,
    RowInteraction,
    split_digits,
)


@dataclass(frozen=True, kw_only=True)
class Config(ContextConfig):
    quantiles: int = 999  # that are predicted for a number
    dim: int = 128  # D
    group: int = 3  # columns of a token
    column_depth: int = 3
    column_heads: int = 8
    points: int = 128  # inducing points
    row_depth: int = 3
    row_heads: int = 8
    row_tokens: int = 4  # class tokens of a row, whose outputs are joined
    rope_theta: float = 100_000.0
    depth: int = 12  # blocks of the in-context learner
    heads: int = 8
    expansion: int = 2  # hidden width of the MLPs, as a multiple of their width
    norm_bias: bool = True


class ColumnEmbedding(nn.Module):
    """Tokens of groups of columns, which depend on the distribution of their values in the context."""

    def __init__(self, c: Config):
        super().__init__()
        self.group = c.group
        self.project = nn.Linear(c.group, c.dim)
        self.target = nn.Linear(c.max_classes or 1, c.dim)
        self.blocks = nn.ModuleList(
            InducedBlock(c.dim, c.column_heads, c.expansion * c.dim, c.points, True, c.norm_bias) for _ in range(c.column_depth)
        )

    def forward(self, x: Tensor) -> Tensor:  # B F -> G B D
        """Return the tokens before they know the distribution: column i is joined with the columns i + 1, i + 2 and i + 4 ..."""
        places = torch.arange(x.shape[1], device=x.device)
        groups = torch.stack([x[:, (places + 2**i) % x.shape[1]] for i in range(self.group)], -1)  # B G group
        return self.project(groups).transpose(0, 1)


class TabICLv2(InContextNetwork):
    """TabICLv2; see `InContextNetwork`."""

    def __init__(self, config: Config):
        super().__init__(config)
        c, width = config, config.dim * config.row_tokens
        self.columns = ColumnEmbedding(c)
        rotation = Rotation(c.dim // c.row_heads, c.rope_theta, is_interleaved=False)
        self.rows = RowInteraction(c.dim, c.row_depth, c.row_heads, c.expansion * c.dim, c.row_tokens, rotation, c.norm_bias)
        outputs = c.max_classes or c.quantiles
        self.learner = Learner(width, c.depth, c.heads, c.expansion * width, c.max_classes, outputs, True, c.norm_bias)

    def embed_context(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[list[KeysValues]]]:  # C F, C -> C G D
        """Return the mean of the tokens for each digit of the classes, of which there is one if the network can tell them apart."""
        start, c = self.columns(x), self.config
        digits = split_digits(y, c.num_classes, c.max_classes) if c.max_classes else [y]
        total: Any = 0.0
        found = []
        for digit in digits:
            tokens, keys = start + self.encode_target(self.columns.target, digit), []
            for block in self.columns.blocks:
                keys.append(block.keys(tokens))
                tokens = block(tokens, keys[-1])
            total = total + tokens
            found.append(keys)
        return total.transpose(0, 1) / len(digits), found

    def embed_rows(self, x: Tensor, keys: list[list[KeysValues]]) -> Tensor:  # B F -> B G D
        start = self.columns(x)
        total: Any = 0.0
        for each in keys:
            tokens = start
            for block, own in zip(self.columns.blocks, each):
                tokens = block(tokens, own)
            total = total + tokens
        return total.transpose(0, 1) / len(keys)


WEIGHTS = {**name_stages(is_scaled=True), "col_embedder.y_encoder.*": "columns.target.*"}

SCALED = "qassmax-mlp-elementwise"
CONFIG: Mapping[str, ConfigRow] = {
    **SHARED_KEYS,
    "num_quantiles": WithDefault("quantiles", 999),
    "col_feature_group_size": WithDefault("group", 3),
    "col_affine": Expect(False, absent=False, among=(False,)),
    "col_target_aware": Expect(True, absent=True, among=(True,)),
    "col_feature_group": Expect("same", absent="same"),
    "col_ssmax": Expect(SCALED, absent=SCALED),
    "icl_ssmax": Expect(SCALED, absent=SCALED),
    "row_rope_interleaved": Expect(False, absent=False),
}

SOURCE = "https://huggingface.co/jingang/TabICL; the authors' code counts the 8 constant frequencies too"
CARD = Card(
    name="tabicl-v2",
    model=TabICLv2,
    config=Config,
    paper="arXiv:2602.11139",
    year=2026,
    input_type="table",
    output_type="label",
    solver="context",
    number_scale="standard",
    sizes={
        "tabicl-v2": Size(params=27_552_250, source=SOURCE),
        "tabicl-v2-regressor": Size(max_classes=0, num_classes=1, norm_bias=False, params=28_544_983, source=SOURCE),
        "tabicl-v2-test": Size(
            numbers=3,
            categories=(3, 5),
            num_classes=3,
            context=9,
            views=2,
            dim=16,
            column_depth=2,
            column_heads=2,
            points=4,
            row_depth=2,
            row_heads=2,
            row_tokens=2,
            depth=2,
            heads=4,
        ),
    },
    weights={"tabicl": WEIGHTS},
    configs={"tabicl": CONFIG},
)

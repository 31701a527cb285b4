"""TabICL: in-context learning on large tables, pretrained on synthetic ones (Qu et al. 2025, arXiv:2502.05564).

New here: a table is learned in one forward pass. A set Transformer over each column, linear in the rows thanks to inducing points,
gives every cell a weight and a bias that depend on the distribution of its column; attention between the columns of a row, with rotary
positions that tell equal columns apart, gives the vector of the row; rows attend to the labeled rows of the context. Tables may
therefore have ten times as many rows as for TabPFN.

The weights are on the Hugging Face Hub at jingang/TabICL under the BSD 3-clause licence, like the authors' code. They were trained on
tables of up to 60,000 rows, 100 columns and 10 classes (more are told apart by groups); the training rows become the context
(`Card.solver`). Classes only.

Initialization: as torch's layers; inducing points and class tokens truncated normal of 0.02; the context random rows.
Shapes: B batch, C rows of the context, F columns, D width of a token, E = 4 D width of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.mapping.config_rules import ConfigRow, Expect
from fieldguide.models.transformer._shared.tabicl_names import SHARED_KEYS, name_stages
from fieldguide.models.transformer._shared.table_context import (
    ContextConfig,
    InContextNetwork,
    InducedBlock,
    KeysValues,
    Learner,
    Rotation,
    RowInteraction,
)


@dataclass(frozen=True, kw_only=True)
class Config(ContextConfig):
    dim: int = 128  # D
    column_depth: int = 3
    column_heads: int = 4
    points: int = 128  # inducing points
    row_depth: int = 3
    row_heads: int = 8
    row_tokens: int = 4  # class tokens of a row, whose outputs are joined
    rope_theta: float = 100_000.0
    depth: int = 12  # blocks of the in-context learner
    heads: int = 4
    expansion: int = 2  # hidden width of the MLPs, as a multiple of their width
    norm_bias: bool = True


class ColumnEmbedding(nn.Module):
    """Cells times a weight plus a bias, which a set Transformer over the column gives them."""

    def __init__(self, c: Config):
        super().__init__()
        self.project = nn.Linear(1, c.dim)
        self.blocks: Any = nn.ModuleList(
            InducedBlock(c.dim, c.column_heads, c.expansion * c.dim, c.points, False, c.norm_bias)
            for _ in range(c.column_depth)
        )
        self.weight, self.weight_norm = nn.Linear(c.dim, c.dim), nn.LayerNorm(c.dim, bias=c.norm_bias)
        self.bias, self.bias_norm = nn.Linear(c.dim, c.dim), nn.LayerNorm(c.dim, bias=c.norm_bias)

    def keys(self, x: Tensor) -> tuple[Tensor, list[KeysValues]]:  # C F -> C F D
        """Return the tokens of the context, and the keys and values of each block."""
        cells = x.T[..., None]  # F C 1
        tokens, keys = self.project(cells), []
        for block in self.blocks:
            keys.append(block.keys(tokens))
            tokens = block(tokens, keys[-1])
        return self.finish(cells, tokens), keys

    def forward(self, x: Tensor, keys: list[KeysValues]) -> Tensor:  # B F -> B F D
        cells = x.T[..., None]  # F B 1
        tokens = self.project(cells)
        for block, each in zip(self.blocks, keys):
            tokens = block(tokens, each)
        return self.finish(cells, tokens)

    def finish(self, cells: Tensor, tokens: Tensor) -> Tensor:  # F B 1, F B D -> B F D
        return (cells * self.weight_norm(self.weight(tokens)) + self.bias_norm(self.bias(tokens))).transpose(0, 1)


class TabICL(InContextNetwork):
    """TabICL; see `InContextNetwork`."""

    def __init__(self, config: Config):
        super().__init__(config)
        c, width = config, config.dim * config.row_tokens
        self.columns = ColumnEmbedding(c)
        rotation = Rotation(c.dim // c.row_heads, c.rope_theta, is_interleaved=True)
        self.rows = RowInteraction(c.dim, c.row_depth, c.row_heads, c.expansion * c.dim, c.row_tokens, rotation, c.norm_bias)
        self.learner = Learner(width, c.depth, c.heads, c.expansion * width, c.max_classes, c.max_classes, False, c.norm_bias)

    def embed_context(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[KeysValues]]:  # C F, C -> C F D
        return self.columns.keys(x)

    def embed_rows(self, x: Tensor, keys: list[KeysValues]) -> Tensor:  # B F -> B F D
        return self.columns(x, keys)


WEIGHTS = {
    **name_stages(is_scaled=False),
    "col_embedder.out_w.*": "columns.weight.*",
    "col_embedder.ln_w.*": "columns.weight_norm.*",
    "col_embedder.out_b.*": "columns.bias.*",
    "col_embedder.ln_b.*": "columns.bias_norm.*",
}
CONFIG: Mapping[str, ConfigRow] = {
    **SHARED_KEYS,
    "col_affine": Expect(True, among=(True,)),
    "col_target_aware": Expect(False, among=(False,)),
    "col_feature_group": Expect(False),
    "col_ssmax": Expect(False),
    "icl_ssmax": Expect(False),
    "row_rope_interleaved": Expect(True, absent=True),
}

SOURCE = "https://huggingface.co/jingang/TabICL; the authors' code counts the 8 constant frequencies too"
CARD = Card(
    name="tabicl",
    model=TabICL,
    config=Config,
    paper="arXiv:2502.05564",
    year=2025,
    input_type="table",
    output_type="label",
    solver="context",
    number_scale="standard",
    sizes={
        "tabicl-v1": Size(params=27_051_658, source=SOURCE),  # versions 1 and 1.1 have the same shapes
        "tabicl-test": Size(
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

"""iTransformer: attention between series instead of time steps (Liu et al. 2023, arXiv:2310.06625).

New here: the tokens are inverted. The whole past of a series is one token, so attention weighs series by how they depend on each
other, and the MLPs learn what a past looks like. Every past is normalized to mean 0 and standard deviation 1, and the forecast is
scaled back. Layers are post-norm. There are no positions, so series may be in any order and any number.

Covariates are tokens too. Those known for the past only are further series; those known for the future have an embedding of their
own, since their tokens also hold the horizon. The authors embed the calendar of the past with the weights of the series.

Initialization: torch's default for linear layers, as in the authors' code.
Shapes: B batch, T steps of the past, H steps of the future, C series, Q values per step, P covariates known only in the past,
K covariates known in advance, N tokens, D width, h heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.mapping.key_rules import Fused, Reshaped, Row


@dataclass(frozen=True, kw_only=True)
class Config:
    length: int = 96  # T
    horizon: int = 96  # H
    values: int = 1  # Q: 1 for a point forecast, more for quantiles
    past: int = 0  # P
    known: int = 0  # K
    dim: int = 256  # D
    depth: int = 2
    heads: int = 8
    hidden: int = 256  # hidden width of the MLPs
    dropout: float = 0.1


class Block(nn.Module):
    """A post-norm block: attention between tokens, and an MLP."""

    def __init__(self, c: Config):
        super().__init__()
        self.heads = c.heads
        self.qkv = nn.Linear(c.dim, 3 * c.dim)
        self.proj = nn.Linear(c.dim, c.dim)
        self.norm1, self.norm2 = nn.LayerNorm(c.dim), nn.LayerNorm(c.dim)
        self.up = nn.Linear(c.dim, c.hidden)
        self.down = nn.Linear(c.hidden, c.dim)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor) -> Tensor:  # B N D -> B N D
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B h N D/h
        weights = self.dropout((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))
        x = self.norm1(x + self.dropout(self.proj((weights @ v).transpose(1, 2).flatten(2))))
        return self.norm2(x + self.dropout(self.down(self.dropout(F.gelu(self.up(x))))))


class ITransformer(nn.Module):
    """Past values and covariates -> forecasts. Raises `DataError` if the past has another length than `length`."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.dim % c.heads:
            raise SettingsError(f"dim={c.dim} must be divisible by heads={c.heads}.")
        self.embed = nn.Linear(c.length, c.dim)
        self.embed_known = nn.Linear(c.length + c.horizon, c.dim) if c.known else None
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim)
        self.head = nn.Linear(c.dim, c.horizon * c.values)

    def forward(self, series: Tensor, past: Tensor, known: Tensor) -> Tensor:  # B T C, B T P, B T+H K -> B H C Q
        c, columns = self.config, series.shape[2]
        if series.shape[1] != c.length:
            raise DataError(f"The past has {series.shape[1]} steps, but the model was created with length={c.length}.")
        x = torch.cat([series, past], 2).mT  # B C+P T
        mean = x.mean(-1, keepdim=True).detach()
        scale = (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt().detach()
        tokens = self.embed((x - mean) / scale)
        if self.embed_known is not None:
            tokens = torch.cat([tokens, self.embed_known(known.mT)], 1)
        tokens = self.dropout(tokens)  # B N D
        for block in self.blocks:
            tokens = block(tokens)
        y = self.head(self.norm(tokens[:, :columns]))  # B C H*Q
        y = y * scale[:, :columns] + mean[:, :columns]
        return y.unflatten(-1, (c.horizon, c.values)).transpose(1, 2)


def official(c: Config) -> dict[str, Row]:
    """Return the names of thuml/iTransformer, whose MLPs are convolutions of width 1."""
    layer = "encoder.attn_layers.{i}."
    projections = {
        f"{layer}attention.{name}_projection.*": Fused("blocks.{i}.qkv.*", part, 3)
        for part, name in enumerate(("query", "key", "value"))
    }
    return {
        "enc_embedding.value_embedding.*": "embed.*",
        **({"futr_embedding.*": "embed_known.*"} if c.known else {}),  # the name in neuralforecast
        **projections,
        layer + "attention.out_projection.*": "blocks.{i}.proj.*",
        layer + "conv1.weight": Reshaped("blocks.{i}.up.weight", (-1, c.dim), (-1, c.dim, 1)),
        layer + "conv1.bias": "blocks.{i}.up.bias",
        layer + "conv2.weight": Reshaped("blocks.{i}.down.weight", (-1, c.hidden), (-1, c.hidden, 1)),
        layer + "conv2.bias": "blocks.{i}.down.bias",
        layer + "norm1.*": "blocks.{i}.norm1.*",
        layer + "norm2.*": "blocks.{i}.norm2.*",
        "encoder.norm.*": "norm.*",
        "projector.*": "head.*",
    }


CARD = Card(
    name="itransformer",
    model=ITransformer,
    config=Config,
    paper="arXiv:2310.06625",
    year=2023,
    input_type="covariates",
    output_type="forecast",
    sizes={
        "itransformer-etth1": Size(params=841_568, source="the authors' layers, counted"),
        "itransformer-ecl": Size(dim=512, depth=3, hidden=512, params=4_833_888, source="the authors' layers, counted"),
        "itransformer-mini": Size(dim=64, hidden=128, heads=4),
        "itransformer-test": Size(
            length=9, horizon=4, values=2, past=2, known=3, dim=8, depth=2, heads=2, hidden=12, dropout=0.0
        ),
    },
    weights={"official": official},
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "warmup": 0.1},
)

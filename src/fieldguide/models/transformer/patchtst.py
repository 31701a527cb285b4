"""PatchTST: forecasting with patches as tokens, each series on its own (Nie et al. 2022, arXiv:2211.14730).

New here: a token is a patch of consecutive steps, so attention over a long past is cheap; all series share one model
and are processed independently. The past is normalized to mean 0 and standard deviation 1, and the forecast is scaled
back (RevIN, Kim et al. 2022). Layers are post-norm with batch normalization; attention scores are added to those of
the previous layer. For classes, the mean over patches of all series goes through one linear layer, as in transformers.

Initialization: torch's default for linear layers, positions uniform in -0.02 .. 0.02, as in the authors' code.
Shapes: B batch, T steps of the past, H steps of the future, C series, Q values per step, N patches, P steps of a
patch, D width, h heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.mapping.key_rules import Dropped, Fused


@dataclass(frozen=True, kw_only=True)
class Config:
    length: int = 336  # T
    horizon: int = 96  # H
    values: int = 1  # Q: 1 for a point forecast, more for quantiles
    patch: int = 16  # P
    stride: int = 8  # steps between patches
    dim: int = 16  # D
    depth: int = 3
    heads: int = 4
    hidden: int = 128  # hidden width of the MLPs
    dropout: float = 0.3
    output_type: str = "forecast"  # or "label"
    num_classes: int = 2  # for "label"
    channels: int = 1  # C, for "label"; any number of series can be forecast


class Block(nn.Module):
    """A post-norm block: attention and MLP, normalized over batch and patches."""

    def __init__(self, c: Config):
        super().__init__()
        self.heads = c.heads
        self.qkv = nn.Linear(c.dim, 3 * c.dim)
        self.proj = nn.Linear(c.dim, c.dim)
        self.norm1 = nn.BatchNorm1d(c.dim)
        self.up = nn.Linear(c.dim, c.hidden)
        self.down = nn.Linear(c.hidden, c.dim)
        self.norm2 = nn.BatchNorm1d(c.dim)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:  # B N D, B h N N -> both
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        new = q @ k.mT * q.shape[-1] ** -0.5
        scores = new if scores is None else scores + new
        y = self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = self.norm1((x + self.dropout(y)).mT).mT
        y = self.down(self.dropout(F.gelu(self.up(x))))
        return self.norm2((x + self.dropout(y)).mT).mT, scores


class PatchTST(nn.Module):
    """A forecasting model. Raises `DataError` if the past has another length than `length`."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.dim % c.heads:
            raise SettingsError(f"dim={c.dim} must be divisible by heads={c.heads}.")
        if c.patch > c.length:
            raise SettingsError(f"patch={c.patch} must not exceed length={c.length}, the length of the past.")
        patches = (c.length - c.patch) // c.stride + 2  # one more because the end is padded by repetition
        self.embed = nn.Linear(c.patch, c.dim)
        self.pos = nn.Parameter(torch.empty(patches, c.dim))
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        is_label = c.output_type == "label"
        self.head = nn.Linear(
            c.dim * (c.channels if is_label else patches), c.num_classes if is_label else c.horizon * c.values
        )
        nn.init.uniform_(self.pos, -0.02, 0.02)

    def forward(self, series: Tensor) -> Tensor:  # B T C -> B H C Q, or B classes
        c = self.config
        if series.shape[1] != c.length:
            raise DataError(f"The past has {series.shape[1]} steps, but the model was created with length={c.length}.")
        x = series.transpose(1, 2)  # B C T
        mean = x.mean(-1, keepdim=True).detach()
        scale = (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt().detach()
        x = F.pad((x - mean) / scale, (0, c.stride), mode="replicate").unfold(-1, c.patch, c.stride)  # B C N P
        x = self.dropout(self.embed(x).flatten(0, 1) + self.pos)  # B*C N D
        scores = None
        for block in self.blocks:
            x, scores = block(x, scores)
        if c.output_type == "label":
            return self.head(x.mean(1).unflatten(0, mean.shape[:2]).flatten(1))
        y = self.head(x.mT.flatten(1)).unflatten(0, mean.shape[:2])  # B C H*Q
        return (y * scale + mean).unflatten(-1, (c.horizon, c.values)).transpose(1, 2)


LAYER = "model.backbone.encoder.layers.{i}."
OFFICIAL = {  # names of yuqinie98/PatchTST, PatchTST_supervised, without decomposition
    "model.backbone.W_P.*": "embed.*",
    "model.backbone.W_pos": "pos",
    LAYER + "self_attn.W_Q.*": Fused("blocks.{i}.qkv.*", 0, 3),
    LAYER + "self_attn.W_K.*": Fused("blocks.{i}.qkv.*", 1, 3),
    LAYER + "self_attn.W_V.*": Fused("blocks.{i}.qkv.*", 2, 3),
    LAYER + "self_attn.sdp_attn.scale": Dropped("the constant scale of the scores"),
    LAYER + "self_attn.to_out.0.*": "blocks.{i}.proj.*",
    LAYER + "norm_attn.1.*": "blocks.{i}.norm1.*",
    LAYER + "ff.0.*": "blocks.{i}.up.*",
    LAYER + "ff.3.*": "blocks.{i}.down.*",
    LAYER + "norm_ffn.1.*": "blocks.{i}.norm2.*",
    "model.head.linear.*": "head.*",
}

CARD = Card(
    name="patchtst",
    model=PatchTST,
    config=Config,
    paper="arXiv:2211.14730",
    year=2022,
    input_type="series",
    output_type=("forecast", "label"),
    sizes={
        # The authors' code has 81,731 and 921,187 parameters: it stores the constant scale of each layer as a
        # parameter.
        "patchtst-etth1": Size(params=81_728, source="the authors' code, without 3 constants"),
        "patchtst-large": Size(
            dim=128, heads=16, hidden=256, dropout=0.2, params=921_184, source="the authors' code, without 3 constants"
        ),
        "patchtst-test": Size(
            length=13, horizon=5, values=2, patch=4, stride=3, dim=8, depth=2, heads=2, hidden=12, dropout=0.0
        ),
    },
    weights={"official": OFFICIAL},
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "warmup": 0.1},
)

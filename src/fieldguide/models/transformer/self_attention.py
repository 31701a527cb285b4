"""SelfAttention: the multi-head attention layer of the guide (Vaswani et al. 2017, arXiv:1706.03762).

New here: every token compares its query with the keys of all tokens and takes a weighted mean of their values, in
several heads at once. This is a single layer, not a whole model: no positions, no mask.

Initialization: torch's default for linear layers, as in the guide's code.
Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class Config:
    d_model: int = 512  # D
    n_heads: int = 8


class SelfAttention(nn.Module):
    """The guide's `SelfAttention(d_model, n_heads)`, computed with torch's fused attention.

    Raises `SettingsError` if `n_heads` does not divide `d_model`.
    """

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        if d_model % n_heads:
            raise SettingsError(f"d_model={d_model} must be divisible by n_heads={n_heads}.")
        self.n_heads = n_heads
        self.d_k = d_model // n_heads
        self.W_q = nn.Linear(d_model, d_model)
        self.W_k = nn.Linear(d_model, d_model)
        self.W_v = nn.Linear(d_model, d_model)
        self.W_o = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:  # B T D -> B T D
        q, k, v = (
            matrix(x).unflatten(-1, (self.n_heads, self.d_k)).transpose(1, 2) for matrix in (self.W_q, self.W_k, self.W_v)
        )  # each B heads T d_k
        return self.W_o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


CARD = Card(
    name="self-attention",
    model=SelfAttention,
    config=Config,
    build=lambda config: SelfAttention(**asdict(config)),
    paper="arXiv:1706.03762",
    year=2017,
    input_type="sequence",
    output_type="sequence",
    names={"dim": "d_model", "heads": "n_heads"},
    sizes={
        "self-attention": Size(params=1_050_624, source="torch.nn.MultiheadAttention(512, 8)"),
        "self-attention-test": Size(d_model=8, n_heads=2),
    },
)

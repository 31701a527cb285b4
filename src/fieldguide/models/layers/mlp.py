"""The MLP of a Transformer block (Vaswani et al. 2017, section 3.3), with GELU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """Two linear layers with exact GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415) in between."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # ... D -> ... D
        return self.down(self.dropout(F.gelu(self.up(x))))

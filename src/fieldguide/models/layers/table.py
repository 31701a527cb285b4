"""Columns of a table as vectors: one-hot rows, embeddings, piecewise-linear embeddings of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError


def _offsets(sizes: Sequence[int]) -> Tensor:
    """Where each column's part of a joint table starts."""
    return torch.tensor([0, *sizes[:-1]], dtype=torch.int64).cumsum(0)


class OneHot(nn.Module):
    """Each category as a one among zeros; value 0, unseen in training, as zeros alone.

    `sizes` counts the values of each column with the 0 among them, so a column takes `size - 1` places.
    """

    def __init__(self, sizes: Sequence[int]):
        super().__init__()
        self.width = sum(sizes) - len(sizes)
        values = [value for size in sizes for value in range(size)]
        keep = torch.tensor([place for place, value in enumerate(values) if value], dtype=torch.int64)
        self.register_buffer("offsets", _offsets(sizes), persistent=False)
        self.register_buffer("keep", keep, persistent=False)

    def forward(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:  # B K int64 -> B width
        full = torch.zeros(x.shape[0], self.width + x.shape[1], dtype=dtype, device=x.device)
        return full.scatter(1, x + self.offsets, 1.0)[:, self.keep]


class CategoryEmbedding(nn.Module):
    """Each category as a learned vector, all columns in one table (Guo and Berkhahn 2016, arXiv:1604.06737).

    Value 0 of a column, unseen in training, starts as zeros, so that it says nothing unless it is trained.
    """

    def __init__(self, sizes: Sequence[int], dim: int):
        super().__init__()
        self.register_buffer("offsets", _offsets(sizes), persistent=False)
        self.weight = nn.Parameter(torch.empty(sum(sizes), dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -(self.weight.shape[1] ** -0.5), self.weight.shape[1] ** -0.5)
        self.weight[self.offsets] = 0.0

    def forward(self, x: Tensor) -> Tensor:  # B K int64 -> B K D
        return nn.functional.embedding(x + self.offsets, self.weight)


class PiecewiseLinear(nn.Module):
    """Numbers as learned piecewise-linear curves (Gorishniy et al. 2022, arXiv:2203.05556; form "B" of TabM).

    Every column has `bins` intervals. A number fills those below it with 1, its own in part, the rest with 0;
    the outer two go on beyond their ends. The vector is a linear map of this plus a linear map of the number
    itself; the first starts at zero, so training starts from a linear embedding.

    `edges` (columns x bins + 1, increasing) are kept with the weights. They start at the quantiles of the
    standard normal, which are the bins of quantiles for columns brought to that distribution; for other
    columns call `set_edges`.
    """

    edges: Tensor

    def __init__(self, columns: int, bins: int, dim: int):
        super().__init__()
        if bins < 1:
            raise SettingsError(f"bins={bins}: a column needs at least one interval")
        inner = [NormalDist().inv_cdf(i / bins) for i in range(1, bins)]
        end = max(3.0, 1.2 * abs(inner[0])) if inner else 3.0
        self.register_buffer("edges", torch.tensor([[-end, *inner, end]]).repeat(columns, 1))
        low, high = torch.zeros(bins), torch.ones(bins)
        low[0], high[-1] = -torch.inf, torch.inf
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self.weight = nn.Parameter(torch.empty(columns, dim))
        self.bias = nn.Parameter(torch.empty(columns, dim))
        self.curve = nn.Parameter(torch.empty(columns, bins, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        nn.init.zeros_(self.curve)

    @torch.no_grad()
    def set_edges(self, edges: Tensor) -> None:
        """Take other intervals: columns x (bins + 1), increasing. Raises `SettingsError` otherwise."""
        if edges.shape != self.edges.shape:
            raise SettingsError(f"edges have shape {tuple(edges.shape)}, not {tuple(self.edges.shape)}")
        if not (edges.diff(dim=1) > 0).all():
            column = int((edges.diff(dim=1) <= 0).any(1).nonzero()[0])
            raise SettingsError(f"the edges of column {column} do not increase: {edges[column].tolist()}")
        self.edges.copy_(edges)

    def forward(self, x: Tensor) -> Tensor:  # B N -> B N D
        part = (x[..., None] - self.edges[:, :-1]) / self.edges.diff(dim=1)  # B N bins
        part = part.clamp(self.low, self.high)
        curve = torch.bmm(part.transpose(0, 1), self.curve).transpose(0, 1)  # one product a column
        return curve + self.bias + self.weight * x[..., None]

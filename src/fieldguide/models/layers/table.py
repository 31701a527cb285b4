"""Encodings of table columns: one-hot, category embeddings and piecewise-linear embeddings of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError


def _offsets(sizes: Sequence[int]) -> Tensor:
    """Return the offset of each column in the joint table."""
    return torch.tensor([0, *sizes[:-1]], dtype=torch.int64).cumsum(0)


class OneHot(nn.Module):
    """One-hot encoding of categories; value 0 (unseen in training) is encoded as zeros.

    `sizes` counts the values of each column including 0, so a column takes `size - 1` positions.
    """

    offsets: Tensor  # K
    keep: Tensor  # width

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
    """An embedding of categories, with all columns in one table (Guo and Berkhahn 2016, arXiv:1604.06737).

    The embedding of value 0 of a column (unseen in training) is initialized to zeros. Its gradient is sparse if `sparse` is set.
    """

    offsets: Tensor  # K
    is_only_looked_up = True
    sparse = False

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
        return nn.functional.embedding(x + self.offsets, self.weight, sparse=self.sparse)


class LookupTable(nn.Embedding):
    """An embedding that is only looked up, so that its gradient may be sparse (set `sparse`)."""

    is_only_looked_up = True


class PiecewiseLinear(nn.Module):
    """Piecewise-linear embeddings of numbers (Gorishniy et al. 2022, arXiv:2203.05556; version B of TabM).

    Every column has `bins` intervals. A number is encoded as 1 for the intervals below it, the fraction of its own
    interval, and 0 for the rest; the outer intervals extrapolate linearly. The embedding is a linear map of this
    encoding plus a linear map of the number itself; the former is initialized to zero, so training starts from a
    linear embedding.

    `edges` (columns x bins + 1, increasing) are stored with the weights. They are initialized to the quantiles of the
    standard normal distribution, which are the quantile bins of columns transformed to that distribution; for other
    columns call `set_edges`. Raises `SettingsError` if `bins` is less than 1.
    """

    edges: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, columns: int, bins: int, dim: int):
        super().__init__()
        if bins < 1:
            raise SettingsError(f"bins={bins} must be at least 1.")
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
        """Set the edges of the intervals, columns x (bins + 1). Raises `SettingsError` if the shape is wrong or a row
        does not increase.
        """
        if edges.shape != self.edges.shape:
            raise SettingsError(f"edges must have shape {tuple(self.edges.shape)}, got {tuple(edges.shape)}.")
        if not (edges.diff(dim=1) > 0).all():
            column = int((edges.diff(dim=1) <= 0).any(1).nonzero()[0])
            raise SettingsError(f"The edges of column {column} must increase, got {edges[column].tolist()}.")
        self.edges.copy_(edges)

    def forward(self, x: Tensor) -> Tensor:  # B N -> B N D
        part = (x[..., None] - self.edges[:, :-1]) / self.edges.diff(dim=1)  # B N bins
        part = part.clamp(self.low, self.high)
        curve = torch.bmm(part.transpose(0, 1), self.curve).transpose(0, 1)  # one product per column
        return curve + self.bias + self.weight * x[..., None]

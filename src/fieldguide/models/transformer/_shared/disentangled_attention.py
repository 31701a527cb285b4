"""Disentangled attention, shared by the versions of DeBERTa: content-content, content-position and position-content
scores.

A relative distance is i - j, ordered from T - 1 down to 1 - T; which distances share an embedding (buckets) is
defined in the model files.
Shapes: B batch, T tokens, D width, d width of a head, R = 2 T - 1 relative distances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fieldguide.models.layers.dot_product_attention import dot_product_attention


def relative_shift(x: Tensor) -> Tensor:  # ... T R -> ... T T
    """Convert scores of position i for each distance (T - 1 first) to scores of position i for each position j: entry T
    - 1 - i + j.

    Each row of the result begins one entry earlier than the row above, so the result is a view with rows of R - 1
    entries; nothing is gathered.
    """
    steps, width = x.shape[-2:]
    if steps == 1:
        return x
    rows = x.flatten(-2)[..., steps - 1 : steps - 1 + steps * (width - 1)]
    return rows.unflatten(-1, (steps, width - 1))[..., :steps]


def attend(q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_q: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Return disentangled attention (equation 4): B heads T d three times, heads R d twice, mask B T (True for real
    tokens) -> B T D.
    """
    scale = 1 / math.sqrt(3 * q.shape[-1])  # the score is the sum of three terms
    ahead = relative_shift(q @ (far_k * scale).mT)  # content i to distance i - j
    back = relative_shift(k @ (far_q * scale).flip(-2).mT).mT  # distance i - j to content j
    added = ahead + back  # B heads T T
    if mask is not None:
        added = added.masked_fill_(~mask[:, None, None, :], -torch.inf)
    x = dot_product_attention(q, k, v, added, dropout, scale=scale)
    return x.transpose(1, 2).flatten(2)


class RelativeDistances(nn.Module):
    """The row of the embedding table for each relative distance.

    `rows[n]` is the offset of distance n from the middle of the table; distance -n has the opposite offset. The table
    has `2 * zero` rows; distances beyond it use the first or the last row.
    """

    rows: Tensor

    def __init__(self, rows: Sequence[int], zero: int):
        super().__init__()
        self.far, self.zero = [min(row, zero) for row in rows], zero
        self.register_buffer("rows", torch.tensor(self.far), persistent=False)

    def span(self, steps: int) -> tuple[int, int]:
        """Return the range of table rows (start, stop) that sequences of this length use; all rows for a length that a traced graph
        leaves open.
        """
        if not isinstance(steps, int):
            return 0, 2 * self.zero
        return self.zero - self.far[steps - 1], min(self.zero + self.far[steps - 1] + 1, 2 * self.zero)

    def forward(self, steps: int) -> Tensor:  # -> R int64
        """Return the row of each distance, T - 1 first."""
        rows = self.rows[:steps]
        return (torch.cat([rows.flip(0), -rows[1:]]) + self.zero).clamp(max=2 * self.zero - 1)


def split_heads(x: Tensor, heads: int) -> Tensor:  # ... T D -> ... heads T d
    """Split the last dimension into heads."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)

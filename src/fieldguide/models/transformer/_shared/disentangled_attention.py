"""What DeBERTa's versions share: scores of content for content, of content for distance, and of distance for content.

A distance is i - j, from T - 1 down to 1 - T; what is the same for two of them (buckets) is a matter of the model file.
Shapes: B batch, T tokens, D width, d width of a head, R = 2 T - 1 distances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def by_place(x: Tensor) -> Tensor:  # ... T R -> ... T T
    """Scores of place i for each distance, T - 1 first, as scores of place i for each place j: entry T - 1 - i + j.

    Each row of the answer begins one entry before that of the row above: rows of R - 1 entries, from the first one on.
    So it is a view, and nothing is gathered.
    """
    steps, width = x.shape[-2:]
    if steps == 1:
        return x
    rows = x.flatten(-2)[..., steps - 1 : steps - 1 + steps * (width - 1)]
    return rows.unflatten(-1, (steps, width - 1))[..., :steps]


def attend(q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_q: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Disentangled attention (equation 4): B heads T d three times, heads R d twice, B T True where real -> B T D."""
    scale = 1 / math.sqrt(3 * q.shape[-1])  # three sums make a score
    ahead = by_place(q @ (far_k * scale).mT)  # content i for distance i - j
    back = by_place(k @ (far_q * scale).flip(-2).mT).mT  # the same distance for content j
    added = ahead + back  # B heads T T
    if mask is not None:
        added = added.masked_fill_(~mask[:, None, None, :], -torch.inf)
    x = F.scaled_dot_product_attention(q, k, v, added, dropout, scale=scale)
    return x.transpose(1, 2).flatten(2)


class Distances(nn.Module):
    """Which rows of a table of embeddings stand for which distances.

    `rows[n]` is how far behind the middle of the table the row of distance n stands; that of -n stands so far before it.
    The table has `2 * zero` rows; what is farther than they reach has the last, or the first.
    """

    def __init__(self, rows: Sequence[int], zero: int):
        super().__init__()
        self.far, self.zero = [min(row, zero) for row in rows], zero
        self.register_buffer("rows", torch.tensor(self.far), persistent=False)

    def span(self, steps: int) -> tuple[int, int]:
        """The rows of the table that texts of so many tokens use, from and up to."""
        return self.zero - self.far[steps - 1], min(self.zero + self.far[steps - 1] + 1, 2 * self.zero)

    def forward(self, steps: int) -> Tensor:  # -> R int64
        """The row of each distance, T - 1 first."""
        rows = self.rows[:steps]
        return (torch.cat([rows.flip(0), -rows[1:]]) + self.zero).clamp(max=2 * self.zero - 1)


def heads_of(x: Tensor, heads: int) -> Tensor:  # ... T D -> ... heads T d
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)

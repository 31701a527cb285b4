"""Multi-scale deformable attention in plain torch (Zhu et al. 2020, arXiv:2010.04159, section 4.1).

Shapes: B batch, Q queries, S positions of all maps, D width, L maps, P points per map and head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DeformableAttention(nn.Module):
    """Attention to a few points around each query's box instead of all positions.

    Each head reads P points of each map by bilinear interpolation, zeros outside. Their places relative to the box and their
    weights are linear functions of the query. Raises no error for heads that do not divide `dim`: the caller checks that.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.places = nn.Linear(dim, heads * levels * points * 2)
        self.weights = nn.Linear(dim, heads * levels * points)
        self.value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let each head look into a direction of its own, at distances 1 to P (section A.4 of the paper)."""
        nn.init.zeros_(self.places.weight)
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        way = torch.stack([angle.cos(), angle.sin()], -1)
        way = way / way.abs().amax(-1, keepdim=True)  # heads 2
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        with torch.no_grad():
            self.places.bias.copy_((way[:, None, None] * steps[:, None]).expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        for layer in (self.value, self.proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, query: Tensor, boxes: Tensor, memory: Tensor, sides: Sequence[tuple[int, int]]
    ) -> Tensor:  # B Q D, B Q 4, B S D -> B Q D
        """Read the maps of `memory`, whose (height, width) are `sides`.

        `boxes` are (center x, center y, width, height) as fractions of the image's sides, or one for each map, B Q L 4. A place of
        1 is the P-th part of half the side of the box.
        """
        shape = (self.heads, self.levels, self.points)
        places = self.places(query).unflatten(-1, (*shape, 2)).to(boxes.dtype)  # B Q heads L P 2
        weights = self.weights(query).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, shape[1:])
        boxes = boxes[:, :, None] if boxes.ndim == 3 else boxes
        center, size = boxes[:, :, None, :, None, :2], boxes[:, :, None, :, None, 2:]
        grid = 2 * (center + places / self.points * size / 2) - 1  # -1 to 1, as grid_sample wants
        value = self.value(memory).unflatten(-1, (self.heads, -1)).to(boxes.dtype)  # B S heads d
        read = []
        for level, part in enumerate(value.split([height * width for height, width in sides], 1)):
            maps = part.permute(0, 2, 3, 1).unflatten(-1, sides[level]).flatten(0, 1)  # B*heads d H W
            points = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)  # B*heads Q P 2
            read.append(F.grid_sample(maps, points, "bilinear", "zeros", align_corners=False))  # B*heads d Q P
        amounts = weights.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(2)[:, None]  # B*heads 1 Q LP
        x = (torch.stack(read, -2).flatten(-2) * amounts.to(boxes.dtype)).sum(-1)  # B*heads d Q
        x = x.unflatten(0, (-1, self.heads)).permute(0, 3, 1, 2).flatten(2)
        return self.proj(x.to(query.dtype))

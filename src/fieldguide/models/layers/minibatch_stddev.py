"""Minibatch standard deviation (Karras et al. 2017, "Progressive Growing of GANs", arXiv:1710.10196, section 3).

A critic sees one more map, which holds how much images of a group differ. A generator that always makes the same image is easily
told apart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPSILON = 1e-8  # added to the variance


class MinibatchStddev(nn.Module):
    """Append a map with the mean standard deviation over the images of a group.

    Image i of a batch is in group i modulo the number of groups, ceil(B / group). Batches that are no multiple of `group` have
    groups of unequal sizes.
    """

    def __init__(self, group: int = 4):
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D+1 H W
        groups = (x.shape[0] + self.group - 1) // self.group
        number = torch.arange(x.shape[0], device=x.device) % groups  # of the group of each image
        flat = x.flatten(1).float() if x.dtype in (torch.float16, torch.bfloat16) else x.flatten(1)
        empty = flat.new_zeros(groups, flat.shape[1])
        sizes = flat.new_zeros(groups, 1).index_add(0, number, flat.new_ones(x.shape[0], 1))
        mean = empty.index_add(0, number, flat) / sizes
        variance = empty.index_add(0, number, (flat - mean[number]).square()) / sizes
        deviation = (variance + EPSILON).sqrt().mean(1)[number].to(x.dtype)
        return torch.cat([x, deviation[:, None, None, None].expand(-1, 1, *x.shape[2:])], 1)

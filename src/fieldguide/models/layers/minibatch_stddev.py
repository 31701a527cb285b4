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
        flat = x.flatten(1).float() if x.dtype in (torch.float16, torch.bfloat16) else x.flatten(1)
        each = torch.ones_like(flat[:, 0], dtype=torch.int64)  # tensors, so that a traced graph takes any number of images
        number = (each.cumsum(0) - 1) % ((each.sum() + self.group - 1) // self.group)  # of the group of each image
        share = (number[:, None] == number).to(flat.dtype)  # B B
        share = share / share.sum(1, keepdim=True)
        mean = share @ flat
        deviation = (share @ (flat - mean).square() + EPSILON).sqrt().mean(1).to(x.dtype)
        return torch.cat([x, deviation[:, None, None, None].expand(-1, 1, *x.shape[2:])], 1)

"""Batch norm with fixed statistics and fixed scale and shift, as in networks that are fine-tuned with few images per batch.

The values come from a checkpoint (He et al. 2015, arXiv:1512.03385, appendix A; Carion et al. 2020, arXiv:2005.12872, A.4).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FrozenBatchNorm(nn.Module):
    """Multiply each channel by `weight / sqrt(running_var + eps)` and shift it, all of them constants.

    Its four tensors are buffers, so they are saved, but neither trained nor counted as parameters. Without a checkpoint it is
    the identity (up to `eps`).
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def freeze_norms(module: nn.Module, eps: float = 1e-5) -> None:
    """Replace every `nn.BatchNorm2d` inside of a module by a `FrozenBatchNorm` that is the identity."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm(child.num_features, eps))
        else:
            freeze_norms(child, eps)

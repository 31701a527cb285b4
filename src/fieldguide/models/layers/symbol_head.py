"""The output layer of CTC networks, which keeps the symbols that a checkpoint has when there are more."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SymbolHead(nn.Linear):
    """A linear layer with a row for each symbol, the blank first. A checkpoint with fewer symbols fills the first rows."""

    def resize_weight(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return the tensor with our rows after its own; None if it has more rows than ours, or others."""
        own = getattr(self, name).detach()
        if tensor.ndim != own.ndim or tensor.shape[1:] != own.shape[1:] or len(tensor) > len(own):
            return None
        return torch.cat([tensor, own[len(tensor) :].to(tensor)])

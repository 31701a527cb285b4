"""Networks without random initialization: for tensors that are loaded next, or that only need their shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fieldguide.core.card import Card

# Functions of torch.nn.init and of tensors that a `TorchFunctionMode` intercepts.
INIT_FUNCTIONS = {Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_}


class SkipInitialization(TorchFunctionMode):
    """Skip random initialization inside the block, for networks whose tensors are all loaded next."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func not in INIT_FUNCTIONS:
            return func(*args, **kwargs or {})
        tensor = args[0] if args else kwargs["tensor"]
        if not tensor.is_meta:
            tensor.detach().zero_()  # 0 is within the bounds of a truncated normal, which torch samples until all values are
        return tensor


def make_on_meta(card: Card, config: Any) -> nn.Module:
    """Return the network of a config on the meta device: shapes without memory."""
    with torch.device("meta"), SkipInitialization():
        return card.make(config)

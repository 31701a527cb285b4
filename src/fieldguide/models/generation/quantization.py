"""Weights of eight bits: a quarter is read for each token, which is what an answer on a CPU takes its time with.

Each row of a matrix has one scale, its largest number by 127; what comes to it stays in floats (weight-only, as section 2.1
of Dettmers et al. 2022, arXiv:2208.07339, scales the rows). No network knows of it: a weight is replaced by a tensor that
`F.linear` and `F.embedding` treat in their own way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fieldguide.core.errors import SettingsError

MOST = 127  # -128 has no counterpart
WIDE = 32  # what the product of eight bits reads at once; it minds no ends
FEW = 32  # rows up to which the product of eight bits is quicker than making floats of the weights once


class Int8(Tensor):
    """A matrix as `whole` (O I int8) times `scale` (O). Linear layers and tables read the whole numbers; any other
    operation sees the matrix as floats.

    On a CPU the product of few rows takes and gives bfloat16, whose eight digits are finer than those of the weights;
    sums are in float32.
    """

    whole: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, whole: Tensor, scale: Tensor) -> Int8:
        return Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype, device=whole.device)

    def __init__(self, whole: Tensor, scale: Tensor):
        self.whole, self.scale = whole, scale
        self.rough = scale.bfloat16()

    @classmethod
    def of(cls, weight: Tensor) -> Int8:  # O I
        scale = weight.detach().abs().amax(1).clamp(min=torch.finfo(weight.dtype).tiny) / MOST
        return cls((weight.detach() / scale[:, None]).round().to(torch.int8), scale)

    def floats(self) -> Tensor:  # -> O I
        return self.whole * self.scale[:, None]

    def linear(self, input: Tensor, bias: Tensor | None = None) -> Tensor:  # ... I -> ... O
        rows = input.reshape(-1, input.shape[-1])
        if len(rows) > FEW or rows.shape[1] % WIDE or not rows.is_cpu:
            return F.linear(input, self.floats(), bias)
        y = torch._weight_int8pack_mm(rows.bfloat16(), self.whole, self.rough).to(input.dtype)
        return (y if bias is None else y.add_(bias)).view(*input.shape[:-1], -1)

    def __repr__(self, **_: Any) -> str:
        return f"Int8({', '.join(map(str, self.whole.shape))})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear and isinstance(args[1], cls):
            return args[1].linear(args[0], *args[2:], **(kwargs or {}))
        if func is F.embedding and isinstance(args[1], cls):
            return F.embedding(args[0], args[1].whole) * F.embedding(args[0], args[1].scale[:, None])
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].whole, args[0].scale)
        plain = lambda x: x.floats() if isinstance(x, cls) else x
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


@torch.no_grad()
def shrink(network: nn.Module) -> nn.Module:
    """The network itself, its linear layers and tables now in eight bits: to be asked, not taught or saved. Raises
    `SettingsError` for a network without linear layers."""
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Embedding) and not isinstance(m.weight, Int8)]
    if not any(isinstance(m, nn.Linear) for m in layers):
        raise SettingsError(f"{type(network).__name__} has no linear layers whose weights could be held in eight bits")
    before = {id(m.weight): m.weight for m in layers}  # a head may be a table, too
    made = {key: nn.Parameter(Int8.of(weight), requires_grad=False) for key, weight in before.items()}
    for layer in layers:
        layer.weight = made[id(layer.weight)]
    return network.requires_grad_(False)

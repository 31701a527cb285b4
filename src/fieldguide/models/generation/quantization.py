"""Weight-only int8 quantization for faster generation on a CPU, which is limited by reading the weights.

Each row of a matrix has one scale, its largest absolute value divided by 127; activations stay in floating point
(row-wise scaling as in section 2.1 of Dettmers et al. 2022, arXiv:2208.07339). Models need no change: a weight is
replaced by a tensor subclass that implements `F.linear` and `F.embedding`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fieldguide.core.errors import SettingsError

MAX_INT8 = 127  # symmetric range: -128 has no positive counterpart
ROW_MULTIPLE = 32  # the int8 kernel reads this many elements at once and does not handle remainders
MAX_INT8_ROWS = 32  # up to this many rows the int8 kernel is faster than dequantizing the weights once


class Int8(Tensor):
    """An int8 matrix: `int_values` (O I int8) times `scale` (O).

    Linear layers and embeddings use the integers; any other operation sees the dequantized matrix. On a CPU the
    product with few rows uses bfloat16 inputs and outputs, whose 8 significant bits are finer than the weights; it
    accumulates in float32.
    """

    int_values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, int_values: Tensor, scale: Tensor) -> Int8:
        return Tensor._make_wrapper_subclass(cls, int_values.shape, dtype=scale.dtype, device=int_values.device)

    def __init__(self, int_values: Tensor, scale: Tensor):
        self.int_values, self.scale = int_values, scale
        self.bf16_scale = scale.bfloat16()

    @classmethod
    def quantize(cls, weight: Tensor) -> Int8:  # O I
        """Return the quantized matrix."""
        scale = weight.detach().abs().amax(1).clamp(min=torch.finfo(weight.dtype).tiny) / MAX_INT8
        return cls((weight.detach() / scale[:, None]).round().to(torch.int8), scale)

    def dequantize_floats(self) -> Tensor:  # -> O I
        """Return the matrix in floating point."""
        return self.int_values * self.scale[:, None]

    def linear(self, input: Tensor, bias: Tensor | None = None) -> Tensor:  # ... I -> ... O
        """Compute `F.linear` with this matrix as the weight."""
        rows = input.reshape(-1, input.shape[-1])
        if len(rows) > MAX_INT8_ROWS or rows.shape[1] % ROW_MULTIPLE or not rows.is_cpu:
            return F.linear(input, self.dequantize_floats(), bias)
        y = torch._weight_int8pack_mm(rows.bfloat16(), self.int_values, self.bf16_scale).to(input.dtype)
        return (y if bias is None else y.add_(bias)).view(*input.shape[:-1], -1)

    def __repr__(self, *, tensor_contents: str | None = None) -> str:  # type: ignore[override]  # torch declares no annotations
        return f"Int8({', '.join(map(str, self.int_values.shape))})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and isinstance(args[1], cls):
            return args[1].linear(args[0], *args[2:], **(kwargs or {}))
        if func is F.embedding and isinstance(args[1], cls):
            return F.embedding(args[0], args[1].int_values) * F.embedding(args[0], args[1].scale[:, None])
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares another type for this method
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].int_values, args[0].scale)
        plain = lambda x: x.dequantize_floats() if isinstance(x, cls) else x
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


@torch.no_grad()
def quantize_int8(network: nn.Module) -> nn.Module:
    """Quantize all linear and embedding layers of the model in place and return it; the result is for inference only.

    Raises `SettingsError` for a model without linear layers.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Embedding) and not isinstance(m.weight, Int8)]
    if not any(isinstance(m, nn.Linear) for m in layers):
        raise SettingsError(f"{type(network).__name__} has no linear layers, so int8 quantization is not possible.")
    before = {id(m.weight): m.weight for m in layers}  # tied weights are quantized once
    made = {key: nn.Parameter(Int8.quantize(weight), requires_grad=False) for key, weight in before.items()}
    for layer in layers:
        layer.weight = made[id(layer.weight)]
    return network.requires_grad_(False)

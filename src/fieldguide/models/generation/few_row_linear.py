"""Faster linear layers on a CPU for small batches, as they occur when a few sequences are generated together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

MIN_ROWS, MAX_ROWS = 7, 32  # range of the number of rows for which the transposed product is faster
MIN_WEIGHT_NUMBERS = 500_000  # smallest matrix, in elements, for which the order of the product matters


class FewRows(TorchFunctionMode):
    """A context in which float32 linear layers of 7 to 32 rows compute weight times rows instead of rows times weight.

    MKL reads a large matrix once for up to three rows, and is efficient from 16 rows on; around 8 to 12 rows it takes
    1.3 to 2.2 times as long as for 16 (one core of Ice Lake, oneMKL of torch 2.13). The transposed order does not
    have this gap. Results differ by rounding only.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and type(args[1]) in (Tensor, torch.nn.Parameter):
            x, weight, *bias = args
            rows = x.numel() // x.shape[-1]
            if (
                MIN_ROWS <= rows <= MAX_ROWS
                and weight.numel() >= MIN_WEIGHT_NUMBERS
                and x.dtype == weight.dtype == torch.float32
            ):
                flat = x.reshape(rows, -1).t()
                y = torch.mm(weight, flat) if not bias or bias[0] is None else torch.addmm(bias[0][:, None], weight, flat)
                return y.t().unflatten(0, x.shape[:-1])
        return func(*args, **(kwargs or {}))


def few_rows_mode(rows: int, device: torch.device) -> AbstractContextManager[object]:
    """Return `FewRows` if this number of rows on this device benefits from it, else a null context."""
    helps = device.type == "cpu" and MIN_ROWS <= rows <= MAX_ROWS and torch.backends.mkl.is_available()
    return FewRows() if helps else nullcontext()

"""Linear layers of a few rows, as they occur where some answers are written together, in the order that a CPU is quick in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LEAST, MOST = 7, 32  # rows
LARGE = 500_000  # numbers in a matrix


class FewRows(TorchFunctionMode):
    """Inside, a linear layer of 7 to 32 rows in float32 is weight times rows, not rows times weight.

    MKL reads a large matrix once for up to three rows, and well from 16 on; between them, around 8 and 12, it takes 1.3 to
    2.2 times as long as for 16 (one core of Ice Lake, oneMKL of torch 2.13). The other order has no such hole. Answers
    differ by rounding.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs and type(args[1]) in (Tensor, torch.nn.Parameter):
            x, weight, *bias = args
            rows = x.numel() // x.shape[-1]
            if LEAST <= rows <= MOST and weight.numel() >= LARGE and x.dtype == weight.dtype == torch.float32:
                flat = x.reshape(rows, -1).t()
                y = torch.mm(weight, flat) if not bias or bias[0] is None else torch.addmm(bias[0][:, None], weight, flat)
                return y.t().unflatten(0, x.shape[:-1])
        return func(*args, **(kwargs or {}))


def quick(rows: int, device: torch.device) -> AbstractContextManager:
    """`FewRows` where so many answers at a time gain by it."""
    helps = device.type == "cpu" and LEAST <= rows <= MOST and torch.backends.mkl.is_available()
    return FewRows() if helps else nullcontext()

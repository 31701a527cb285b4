"""Scaled dot-product attention, by the kernel that is faster: torch's fused one, or matrix products and a softmax.

The backward pass of torch's fused kernel for bfloat16 on CPUs takes three to eight times as long as plain matrix products
(docs/log.md, 2026-11-29). In float32 both are equal, and the fused kernel needs less memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SCORES = 2**24  # scores of a layer (batch x heads x queries x keys) that are kept for the backward pass

FUSED_ONLY: ContextVar[bool] = ContextVar("fused_only", default=False)


@contextmanager
def use_fused_kernels() -> Iterator[None]:
    """Use torch's fused kernel for everything inside, as on GPUs: for tracing on a CPU what a GPU would do."""
    before = FUSED_ONLY.set(True)
    try:
        yield
    finally:
        FUSED_ONLY.reset(before)


SLICE: ContextVar[int] = ContextVar("slice", default=0)


@contextmanager
def slice_attention(queries: int) -> Iterator[None]:
    """Compute attention for at most this many queries at a time inside the block, so that large images need less memory where no
    fused kernel avoids storing all scores. 0 computes all at once. Results are equal up to rounding.
    """
    before = SLICE.set(queries)
    try:
        yield
    finally:
        SLICE.reset(before)


def dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return what `F.scaled_dot_product_attention` does, and by it unless bfloat16 is trained on a CPU.

    `mask` is True where a query attends to a key, or is added to the scores. See `slice_attention` for less memory.
    """
    if 0 < (size := SLICE.get()) < q.shape[-2] and not is_causal:
        several = mask is not None and mask.shape[-2] > 1  # a row for each query
        masks = mask.split(size, -2) if mask is not None and several else [mask] * -(-q.shape[-2] // size)
        parts = zip(q.split(size, -2), masks)
        return torch.cat([compute_attention(part, k, v, seen, dropout, False, scale, enable_gqa) for part, seen in parts], -2)
    return compute_attention(q, k, v, mask, dropout, is_causal, scale, enable_gqa)


def compute_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Return the attention output of all queries, by the faster kernel."""
    if is_unfused_faster(q, k):
        return attend_unfused(q, k, v, mask, dropout, is_causal, scale)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa)


def is_unfused_faster(q: Tensor, k: Tensor) -> bool:
    """Return whether matrix products are faster, and their scores fit into memory."""
    if q.device.type != "cpu" or FUSED_ONLY.get() or not (torch.is_grad_enabled() and q.requires_grad):
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    return dtype == torch.bfloat16 and q.shape[:-1].numel() * k.shape[-2] <= MAX_SCORES


def attend_unfused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, is_causal: bool, scale: float | None
) -> Tensor:
    """Return the attention output in bfloat16, by two matrix products and a softmax that accumulates in float32."""
    with torch.autocast("cpu", enabled=False):
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        if (copies := q.shape[1] // k.shape[1]) > 1:  # a head of keys serves several heads of queries
            k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
        if is_causal:
            scores += torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype).triu_(1)
        if mask is not None and mask.dtype == torch.bool:
            scores.masked_fill_(~mask, -torch.inf)
        elif mask is not None:
            scores += mask
        # A query that attends to no key gets zeros, as from the fused kernel.
        weights = torch._safe_softmax(scores, -1) if mask is not None else scores.softmax(-1)
        return F.dropout(weights, dropout) @ v if dropout else weights @ v


Weigh = Callable[[Tensor, Tensor | None], Tensor]  # scores B groups heads/groups T K, and the mask of the keys -> weights


def attend_groups(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, weigh: Weigh, is_causal: bool = False
) -> Tensor:  # B heads T d, B groups K d -> B T D
    """Return the output of grouped-query attention, heads concatenated, with weights that no fused kernel computes.

    `weigh` receives the products of queries and keys, and the mask `seen` (T K, or B 1 T K) in a shape that they broadcast with.
    With `is_causal`, no mask means that queries attend to the keys up to their own.
    """
    groups, steps, keys = k.shape[1], q.shape[2], k.shape[2]
    if is_causal and seen is None and steps > 1:  # a whole sequence without padding
        seen = torch.ones(steps, keys, dtype=torch.bool, device=q.device).tril(keys - steps)
    if seen is not None and seen.ndim == 4:
        seen = seen[:, :, None]  # equal for all groups and heads
    q = q.unflatten(1, (groups, -1)).flatten(2, 3)  # the heads of a group become rows: B groups heads/groups*T d
    weights = weigh((q @ k.mT).unflatten(2, (-1, steps)), seen)
    x = (weights.flatten(2, 3) @ v).unflatten(2, (-1, steps))
    return x.flatten(1, 2).transpose(1, 2).flatten(2)

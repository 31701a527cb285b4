"""The way through a U-Net whose resolution is changed by residual blocks, which see the time too (Dhariwal and Nichol 2021,
arXiv:2105.05233, section 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def run_levels(
    down: Iterable[Any], mid: Any, up: Iterable[Any], x: Tensor, condition: Tensor, *others: Any
) -> Tensor:  # B D H W, B E -> B D' H W
    """Return the output of the last level. Levels have `blocks`, are called with the number of a block, and may have a `resize`.

    `others` are passed to all blocks, but not to those that change the resolution.
    """
    seen = [x]
    for level in down:
        for i in range(len(level.blocks)):
            seen.append(x := level(i, x, condition, *others))
        if level.resize is not None:
            seen.append(x := level.resize(x, condition))
    x = mid(x, condition, *others)
    for level in up:
        for i in range(len(level.blocks)):
            x = level(i, torch.cat([x, seen.pop()], 1), condition, *others)
        if level.resize is not None:
            x = level.resize(x, condition)
    return x

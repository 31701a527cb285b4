"""Boxes: overlap, the loss on it, and which of many boxes of one object to keep.

A box is (left, top, right, bottom) in pixels, right and bottom outside it: its area is (right - left)(bottom - top).
Shapes: B batch, M N numbers of boxes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PAIRS = 1_000_000  # pairs of boxes that `nms` compares at once, in about 100 MB


def area(boxes: Tensor) -> Tensor:  # ... 4 -> ...
    """Square pixels; 0 where a box is turned inside out."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).unbind(-1)
    return width * height


def common(a: Tensor, b: Tensor) -> Tensor:  # ... 4, ... 4 -> ...
    """Area of the common part of each box of `a` and the box of `b` at the same place."""
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    width, height = sides.clamp(min=0).unbind(-1)
    return width * height


def iou(a: Tensor, b: Tensor) -> Tensor:  # ... 4, ... 4 -> ...
    """Common area over joint area, 0 to 1; 0 where both are empty. For all pairs, give `a[:, None], b[None]`."""
    shared = common(a, b)
    joint = area(a) + area(b) - shared
    return torch.where(joint > 0, shared / torch.where(joint > 0, joint, 1), 0)


def ciou(a: Tensor, b: Tensor) -> Tensor:  # ... 4, ... 4 -> ...
    """Complete IoU (Zheng et al. 2019, arXiv:1911.08287, eqs. 8 to 11), at most 1; the loss is 1 minus this.

    IoU, less the squared distance of the middles over the squared diagonal of what encloses both, less alpha v, where
    v compares the proportions. Through alpha no gradient goes. Finite for empty boxes too.
    """
    overlap, tiny = iou(a, b), torch.finfo(a.dtype).eps
    enclosing = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    apart = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]).square().sum(-1) / 4
    (wide, high), (width, height) = ((x[..., 2:] - x[..., :2]).clamp(min=tiny).unbind(-1) for x in (a, b))
    v = 4 / math.pi**2 * (torch.atan2(wide, high) - torch.atan2(width, height)).square()
    with torch.no_grad():
        alpha = v / (1 - overlap + v).clamp(min=tiny)
    return overlap - apart / enclosing.square().sum(-1).clamp(min=tiny) - alpha * v


def nms(boxes: Tensor, scores: Tensor, groups: Tensor, limit: float) -> Tensor:  # M 4, M, M int64 -> M bool
    """Non-maximum suppression: exactly what the greedy sweep keeps, for all groups (picture and class) at once.

    The sweep takes boxes from the highest score down, of equal scores the first in the list, and drops a box that
    overlaps one kept before it, of its group, by more than `limit` IoU. Here only pairs within a group are compared,
    and those that overlap become arrows from the higher score to the lower. A box that no arrow points at is kept; those
    its arrows point at are dropped, with all their arrows; and so on until none is left. There are as many rounds as
    the longest chain of arrows has links, which is few, and each has fewer arrows than the last.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    (left, top, right, bottom), areas = boxes[order].T.contiguous(), area(boxes)[order]
    sizes = torch.unique_consecutive(groups[order], return_counts=True)[1]
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # M: where the group of each begins
    place = torch.arange(len(order), device=order.device)
    before = place - first  # boxes of its group that come before each
    high, low = [], []
    for part in chunks(before):
        count = before[part]
        target = place[part].repeat_interleave(count)
        # Those before it, from the first of its group: the pair's number less that of the target's first pair.
        start = first[part] - (count.cumsum(0) - count)
        source = torch.arange(len(target), device=order.device) + start.repeat_interleave(count)
        width = torch.minimum(right[source], right[target]) - torch.maximum(left[source], left[target])
        beside = (width > 0).nonzero()[:, 0]  # most pairs end here
        source, target, width = source[beside], target[beside], width[beside]
        height = torch.minimum(bottom[source], bottom[target]) - torch.maximum(top[source], top[target])
        shared = width * height.clamp(min=0)
        close = shared > limit * (areas[source] + areas[target] - shared)
        high.append(source[close])
        low.append(target[close])
    high, low = torch.cat(high or [place[:0]]), torch.cat(low or [place[:0]])
    dropped = torch.zeros_like(place, dtype=torch.bool)
    while len(high):
        waits = torch.zeros_like(dropped)
        waits[low] = True
        dropped[low[~waits[high]]] = True  # their highest neighbour is kept
        open_ = waits[high] & ~dropped[high] & ~dropped[low]
        high, low = high[open_], low[open_]
    keep = torch.empty_like(dropped)
    keep[order] = ~dropped
    return keep


def chunks(counts: Tensor) -> list[slice]:  # M int64 -> slices of M
    """Stretches whose counts add up to about `PAIRS` at most."""
    sizes = torch.unique_consecutive(counts.cumsum(0) // PAIRS, return_counts=True)[1]
    return [slice(end - size, end) for size, end in zip(sizes.tolist(), sizes.cumsum(0).tolist())]

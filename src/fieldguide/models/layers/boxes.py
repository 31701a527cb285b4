"""Bounding boxes: intersection over union, generalized and complete IoU, non-maximum suppression.

A box is (left, top, right, bottom) in pixels; right and bottom are exclusive, so its area is (right - left)(bottom -
top).
Shapes: B batch, M N numbers of boxes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_PAIRS_PER_CHUNK = 1_000_000  # pairs of boxes that `nms` compares at once; takes about 100 MB
EXPORTED_ROUNDS = 50  # of non-maximum suppression in graphs


def area(boxes: Tensor) -> Tensor:  # ... 4 -> ...
    """Return the area in square pixels; 0 for boxes with negative width or height."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).unbind(-1)
    return width * height


def intersection_area(a: Tensor, b: Tensor) -> Tensor:  # ... 4, ... 4 -> ...
    """Return the area of the intersection of `a` and `b`, elementwise."""
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    width, height = sides.clamp(min=0).unbind(-1)
    return width * height


def iou(a: Tensor, b: Tensor) -> Tensor:  # ... 4, ... 4 -> ...
    """Return the intersection over union, 0 to 1; 0 if both boxes are empty. For all pairs, pass `a[:, None], b[None]`."""
    shared = intersection_area(a, b)
    joint = area(a) + area(b) - shared
    return torch.where(joint > 0, shared / torch.where(joint > 0, joint, 1), 0)


def giou(a: Tensor, b: Tensor) -> Tensor:  # ... 4, ... 4 -> ...
    """Return the generalized IoU (Rezatofighi et al. 2019, arXiv:1902.09630, algorithm 1), -1 to 1.

    It is the IoU minus the fraction of the smallest enclosing box that neither `a` nor `b` covers, and 0 for two empty boxes at
    one place.
    """
    shared = intersection_area(a, b)
    joint = area(a) + area(b) - shared
    enclosing = area(torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], -1))
    overlap = torch.where(joint > 0, shared / torch.where(joint > 0, joint, 1), 0)
    return overlap - torch.where(enclosing > 0, (enclosing - joint) / torch.where(enclosing > 0, enclosing, 1), 0)


def to_corners(boxes: Tensor) -> Tensor:  # ... 4 -> ... 4
    """Return boxes (center x, center y, width, height) as (left, top, right, bottom)."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], -1)


def to_centers(boxes: Tensor) -> Tensor:  # ... 4 -> ... 4
    """Return boxes (left, top, right, bottom) as (center x, center y, width, height)."""
    first, last = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(first + last) / 2, last - first], -1)


def ciou(a: Tensor, b: Tensor) -> Tensor:  # ... 4, ... 4 -> ...
    """Return the complete IoU (Zheng et al. 2019, arXiv:1911.08287, eqs. 8 to 11), at most 1; the loss is 1 - CIoU.

    CIoU is the IoU minus the squared distance of the centers over the squared diagonal of the enclosing box, minus
    alpha v, where v compares the aspect ratios. No gradient flows through alpha. The result is finite for empty
    boxes.
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
    """Return a mask of the boxes kept by greedy non-maximum suppression, computed for all groups (image and class) at
    once.

    The result equals that of the greedy sweep, which visits boxes by descending score (ties in input order) and drops
    a box that overlaps a previously kept box of its group by more than `limit` IoU. Here the overlapping pairs of
    each group form a graph with edges from the higher to the lower score. In each round, boxes without incoming edges
    are kept, their neighbors are dropped, and the edges of both are removed. The number of rounds is the longest
    chain of edges, which is short in practice.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    (left, top, right, bottom), areas = boxes[order].T.contiguous(), area(boxes)[order]
    sizes = torch.unique_consecutive(groups[order], return_counts=True)[1]
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # M: index of the first box of each box's group
    place = torch.arange(len(order), device=order.device)
    before = place - first  # number of boxes of its group with a higher score
    highs: list[Tensor] = []  # the pairs of all chunks
    lows: list[Tensor] = []
    for part in split_by_total(before):
        count = before[part]
        target = place[part].repeat_interleave(count)
        # The sources of a target are the boxes before it in its group: pair number minus the first pair of the
        # target.
        start = first[part] - (count.cumsum(0) - count)
        source = torch.arange(len(target), device=order.device) + start.repeat_interleave(count)
        width = torch.minimum(right[source], right[target]) - torch.maximum(left[source], left[target])
        overlapping = (width > 0).nonzero()[:, 0]  # discards most pairs early
        source, target, width = source[overlapping], target[overlapping], width[overlapping]
        height = torch.minimum(bottom[source], bottom[target]) - torch.maximum(top[source], top[target])
        shared = width * height.clamp(min=0)
        close = shared > limit * (areas[source] + areas[target] - shared)
        highs.append(source[close])
        lows.append(target[close])
    high, low = torch.cat(highs or [place[:0]]), torch.cat(lows or [place[:0]])
    dropped = torch.zeros_like(place, dtype=torch.bool)
    while len(high):
        waits = torch.zeros_like(dropped)
        waits[low] = True
        dropped[low[~waits[high]]] = True  # a kept neighbor with a higher score
        open_ = waits[high] & ~dropped[high] & ~dropped[low]
        high, low = high[open_], low[open_]
    keep = torch.empty_like(dropped)
    keep[order] = ~dropped
    return keep


def nms_of_sorted(
    boxes: Tensor, real: Tensor, limit: float, groups: Tensor | None = None
) -> Tensor:  # B M 4, B M bool, B M int64 -> B M bool
    """Return what `nms` does for boxes in descending order of score, with operations whose shapes do not depend on values.

    For graphs that are exported. Boxes that are not `real` are neither kept nor suppress others, nor do those of other groups. In
    each round, a box is kept if no kept box before it overlaps it. The result is final for a box after as many rounds as the
    longest chain of overlapping boxes before it, which is short; there are `EXPORTED_ROUNDS`.
    """
    place = torch.arange(boxes.shape[1], device=boxes.device)
    close = (iou(boxes[:, :, None], boxes[:, None]) > limit) & (place[:, None] < place) & real[..., None]  # B M M
    if groups is not None:
        close = close & (groups[:, :, None] == groups[:, None])
    keep, close = real, close.to(boxes.dtype)
    for _ in range(min(EXPORTED_ROUNDS, boxes.shape[1])):
        keep = real & ((keep.to(boxes.dtype)[:, None] @ close)[:, 0] == 0)
    return keep


def split_by_total(counts: Tensor) -> list[slice]:  # M int64 -> slices of M
    """Split into consecutive slices whose counts add up to about `MAX_PAIRS_PER_CHUNK` at most."""
    sizes = torch.unique_consecutive(counts.cumsum(0) // MAX_PAIRS_PER_CHUNK, return_counts=True)[1]
    return [slice(end - size, end) for size, end in zip(sizes.tolist(), sizes.cumsum(0).tolist())]

"""From the masks of queries, which overlap, to segments that do not: the inference of Mask2Former for panoptic segmentation.

Cheng et al. 2021 (arXiv:2107.06278, section 3.4) and the authors' code. Shapes: B batch, Q queries, h w height and width of mask logits,
H W those of an image.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fieldguide.core.packed_masks import encode_mask, pack_masks
from fieldguide.data.preprocessing.detection import Letterbox
from fieldguide.objectives.object_masks import build_grid, find_box, place_logits

RULES = ("paper", "transformers")  # which pixels a segment holds, see `merge_masks`
MIN_PROBABILITY = 0.5  # from which on a position belongs to the mask of a query


@dataclass
class Segment:
    """Pixels of an image with one class; the score is the probability of the class."""

    label: int
    score: float
    mask: Tensor  # H W bool


def merge_masks(
    probabilities: Iterable[Tensor],
    scores: Iterable[float],
    labels: Iterable[int],
    fused: Collection[int],
    *,
    min_visible: float = 0.8,
    rule: str = "paper",
) -> list[Segment]:  # H W each -> segments by descending score
    """Give each pixel to the query with the highest product of its score and the pixel's probability, and return the segments.

    A query is left out if less than `min_visible` of its mask, the pixels with a probability of at least 0.5, is given to it. The segments
    of a class in `fused` are one segment.

    By the rule of the paper, a segment holds only pixels of the query's mask; others belong to no segment. With "transformers", as in
    `post_process_panoptic_segmentation`, it holds all pixels that are given to the query, and its mask are the pixels whose product
    with the score is at least 0.5, so that scores below 0.5 have no segment.
    """
    scores, labels = list(scores), list(labels)
    best = owner = sure = None
    whole = []
    for k, (inside, score) in enumerate(zip(probabilities, scores)):
        weighted = inside * score
        mask = (weighted if rule == "transformers" else inside) >= MIN_PROBABILITY
        whole.append(int(mask.sum()))
        if best is None or owner is None or sure is None:
            best, owner, sure = weighted, torch.zeros_like(inside, dtype=torch.int64), mask
            continue
        better = weighted > best
        best = torch.where(better, weighted, best)
        owner, sure = owner.masked_fill(better, k), torch.where(better, mask, sure)
    if owner is None or sure is None:
        return []
    areas = torch.bincount(owner.flatten(), minlength=len(scores)).tolist()
    found: list[Segment] = []
    for k, (score, label) in enumerate(zip(scores, labels)):
        if not whole[k] or not areas[k] or areas[k] < min_visible * whole[k]:
            continue
        mask = owner == k if rule == "transformers" else (owner == k) & sure
        former = next((one for one in found if one.label == label), None) if label in fused else None
        if former is not None:
            former.mask, former.score = former.mask | mask, max(former.score, score)
        elif mask.any():
            found.append(Segment(label, score, mask))
    return sorted(found, key=lambda one: -one.score)


def merge_queries(
    found: dict[str, Tensor],
    frame: Letterbox,
    side: int,
    fused: Collection[int],
    *,
    threshold: float,
    min_visible: float = 0.8,
    rule: str = "paper",
) -> dict[str, Tensor]:
    """Return the segments of images whose letterbox is `frame`, as packed masks with `labels`, `scores` and `boxes` B Q.

    `found` are the outputs of `MaskSetPanoptic`; queries with a score of at most `threshold` are left out.
    """
    logits, labels = found["masks"], found["labels"]
    count, cells = labels.shape[1], (logits.shape[2], logits.shape[3])
    boxes, scores, names = torch.zeros(*labels.shape, 4), torch.zeros(labels.shape), torch.full(labels.shape, -1)
    codes, sizes = [], []
    for i in range(len(labels)):
        scale, corner = (tuple(values[i].tolist()) for values in (frame.scale, frame.corner))
        width, height = (int(v) for v in frame.size[i].tolist())
        grid = build_grid(cells, side / cells[1], scale, corner, range(height), range(width), logits)
        kept = ((labels[i] >= 0) & (found["scores"][i] > threshold)).nonzero().flatten().tolist()
        segments = merge_masks(
            (place_logits(logits[i, k], grid).sigmoid() for k in kept),
            found["scores"][i, kept].tolist(),
            labels[i, kept].tolist(),
            fused,
            min_visible=min_visible,
            rule=rule,
        )
        masks = [one.mask.cpu().numpy() for one in segments]
        codes.append([encode_mask(mask) for mask in masks])
        sizes.append((height, width))
        for place, (one, mask) in enumerate(zip(segments, masks)):
            scores[i, place], names[i, place], boxes[i, place] = one.score, one.label, torch.tensor(find_box(mask))
    packed = {name: torch.from_numpy(values) for name, values in pack_masks(codes, sizes, count).items()}
    return {"boxes": boxes, "scores": scores, "labels": names, **packed}

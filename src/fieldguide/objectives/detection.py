"""Detection: points of a grid that answer for boxes; which point answers for which is found while training.

For networks that give "boxes" (see `fieldguide.core.card.GIVES`). Three parts in the loss, all of them weighted by how well
a point's answer and its object are aligned: complete IoU of the box, the distribution focal loss of its four
distances, and binary cross-entropy of every class with that alignment as the wanted probability.

Shapes: B batch, N boxes of a picture, A points of all levels, R bins of a distance, K classes, D detections. Boxes are
(left, top, right, bottom) in pixels of the tensor that the network sees; labels are class numbers, -1 = padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.models.layers.boxes import ciou, iou, nms
from fieldguide.objectives.base import Objective


def make_grid(height: int, width: int, strides: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:  # -> A 2, A
    """Points in the middle of every cell, (x, y) in pixels, and the stride of each; as the network orders them."""
    points, sides = [], []
    for stride in strides:
        ys, xs = ((torch.arange(-(-size // stride), device=device) + 0.5) * stride for size in (height, width))
        y, x = torch.meshgrid(ys, xs, indexing="ij")
        points.append(torch.stack([x, y], -1).view(-1, 2))
        sides.append(torch.full((len(points[-1]),), float(stride), device=device))
    return torch.cat(points), torch.cat(sides)


def decode(raw: Tensor, bins: Tensor, points: Tensor, strides: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B A 4R+K -> boxes B A 4 in pixels, logits of distances B A 4 R, logits of classes B A K.

    A distance is the mean of its distribution (Li et al. 2020, arXiv:2006.04388, eq. 5). Never below float32.
    """
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    bins = bins.flatten().to(raw.dtype)
    distances = raw[..., : 4 * len(bins)].unflatten(-1, (4, len(bins)))
    sides = (distances.softmax(-1) * bins).sum(-1) * strides[:, None]
    boxes = torch.cat([points - sides[..., :2], points + sides[..., 2:]], -1)
    return boxes, distances, raw[..., 4 * len(bins) :]


@torch.no_grad()
def assign(
    scores: Tensor,
    boxes: Tensor,
    points: Tensor,
    truth: Tensor,
    labels: Tensor,
    *,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
    smallest: float = 8.0,
) -> tuple[Tensor, Tensor]:
    """Task-aligned assignment (Feng et al. 2021, arXiv:2108.07755, section 3.2).

    `scores` B A K probabilities and `boxes` B A 4, both as predicted; `points` A 2; `truth` B N 4; `labels` B N.
    Returns `owner` B A, the number of the box that a point answers for (-1 = none), and `quality` B A, 0 to 1, the
    probability that it should give that box's class.

    Alignment is t = s^alpha u^beta of the class's score s and the IoU u. Of the points within a box the `topk` best
    with t > 0 answer for it; one that is wanted by several boxes is for that of the highest IoU. Quality is t, scaled
    for each box so that its best is the highest IoU among its points. Beside the paper: a side of fewer than
    `smallest` pixels counts as that long when points are looked for, or the smallest boxes might hold none.
    """
    count, size = labels.shape[1], len(points)
    if not count:
        return labels.new_full((len(labels), size), -1), boxes.new_zeros(len(labels), size)
    middle, half = (truth[..., :2] + truth[..., 2:]) / 2, ((truth[..., 2:] - truth[..., :2]) / 2).clamp(min=smallest / 2)
    away = points - middle[:, :, None]  # B N A 2
    inside = ((away >= -half[:, :, None]) & (away < half[:, :, None])).all(-1) & (labels >= 0)[..., None]
    overlap = iou(truth[:, :, None], boxes[:, None]) * inside  # B N A
    score = scores.mT.gather(1, labels.clamp(min=0)[..., None].expand(-1, -1, size))
    aligned = score**alpha * overlap**beta
    best, where = aligned.topk(min(topk, size), -1)
    chosen = torch.zeros_like(inside).scatter(-1, where, best > 0)
    most, owner = torch.where(chosen, overlap, -1).max(1)  # B A
    owner = owner.masked_fill(most < 0, -1)
    owned = owner[:, None] == torch.arange(count, device=owner.device)[:, None]  # B N A
    aligned, overlap = aligned * owned, overlap * owned
    top = aligned.amax(-1, keepdim=True)
    quality = aligned / torch.where(top > 0, top, 1) * overlap.amax(-1, keepdim=True)
    return owner, quality.amax(1)


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:  # ... R, ... -> ...
    """Distribution focal loss (arXiv:2006.04388, eq. 6): cross-entropy with the two bins beside a distance, each in
    proportion to its nearness. Distances beyond the last bin count as just below it."""
    distances = distances.clamp(0, logits.shape[-1] - 1.01)
    low = distances.floor().long()
    part = distances - low
    logs = logits.log_softmax(-1)
    below, above = (logs.gather(-1, at[..., None])[..., 0] for at in (low, low + 1))
    return -(1 - part) * below - part * above


class Detection(Objective):
    """A network that gives boxes. The batch holds its `inputs` (first of them the picture), `boxes` and `labels`.

    `box`, `label` and `distance` are the weights of the loss's parts, `topk`, `alpha` and `beta` those of the
    assignment. An answer has a score above `confidence`, of the `candidates` best of a picture, and overlaps no better
    one of its class by more than `overlap` IoU; at most `most` are given.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[str] = ("image",),
        *,
        box: float = 7.5,
        label: float = 0.5,
        distance: float = 1.5,
        topk: int = 10,
        alpha: float = 0.5,
        beta: float = 6.0,
        confidence: float = 0.001,
        overlap: float = 0.7,
        candidates: int = 1000,
        most: int = 300,
    ):
        super().__init__()
        self.model, self.inputs = model, tuple(inputs)
        self.weights = {"box": box, "label": label, "distance": distance}
        self.matching = {"topk": topk, "alpha": alpha, "beta": beta, "smallest": float(min(model.strides))}
        self.confidence, self.overlap, self.candidates, self.most = confidence, overlap, candidates, most

    def compute_predictions(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Boxes, logits of distances and of classes (see `decode`), and the points and strides they are of."""
        raw = self.model(*(batch[name] for name in self.inputs))
        points, strides = make_grid(*batch[self.inputs[0]].shape[-2:], self.model.strides, raw.device)
        return *decode(raw, self.model.bins, points, strides), points, strides

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        """Every part is a sum over points divided by the sum of their qualities: a mean over objects, about."""
        boxes, distances, logits, points, strides = self.compute_predictions(batch)
        truth, labels = batch["boxes"].to(boxes.dtype), batch["labels"]
        owner, quality = assign(logits.sigmoid(), boxes, points, truth, labels, **self.matching)
        total = quality.sum().clamp(min=1)
        row, point = (owner >= 0).nonzero(as_tuple=True)  # P points that answer for a box
        at, weight = owner[row, point], quality[row, point]
        wanted = torch.zeros_like(logits)
        wanted[row, point, labels[row, at]] = weight
        mine, near, stride = truth[row, at], points[point], strides[point, None]
        sides = torch.cat([near - mine[:, :2], mine[:, 2:] - near], -1) / stride
        parts = {
            "box": ((1 - ciou(boxes[row, point], mine)) * weight).sum() / total,
            "label": F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / total,
            "distance": (distribution_focal_loss(distances[row, point], sides).mean(-1) * weight).sum() / total,
        }
        return {"loss": sum(self.weights[name] * part for name, part in parts.items()), **parts}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`boxes` B D 4 within the picture, `scores` B D from the highest down, `labels` B D; padding is 0, 0 and -1."""
        boxes, _, logits, _, _ = self.compute_predictions(batch)
        height, width = batch[self.inputs[0]].shape[-2:]
        return select_detections(
            boxes,
            logits.sigmoid(),
            (height, width),
            confidence=self.confidence,
            overlap=self.overlap,
            candidates=self.candidates,
            most=self.most,
        )


@torch.no_grad()
def select_detections(
    boxes: Tensor, scores: Tensor, size: tuple[int, int], *, confidence: float, overlap: float, candidates: int, most: int
) -> dict[str, Tensor]:
    """Boxes B A 4 and their classes' scores B A K -> what `Detection.outputs` gives; `size` is (height, width).

    One box may answer for several classes: each (box, class) above `confidence` is a candidate.
    """
    classes = scores.shape[-1]
    scores, which = scores.flatten(1).topk(min(candidates, scores[0].numel()))
    labels, boxes = which % classes, boxes.gather(1, (which // classes)[..., None].expand(-1, -1, 4))
    row, place = (scores > confidence).nonzero(as_tuple=True)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep[row, place] = nms(boxes[row, place], scores[row, place], row * classes + labels[row, place], overlap)
    scores, order = torch.where(keep, scores, -1).sort(descending=True, stable=True)
    scores, order = (F.pad(x, (0, max(0, most - x.shape[1])), value=fill)[:, :most] for x, fill in ((scores, -1), (order, 0)))
    real = scores > 0
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    limit = boxes.new_tensor([*reversed(size)] * 2)
    return {
        "boxes": torch.minimum(boxes.clamp(min=0), limit) * real[..., None],
        "scores": scores * real,
        "labels": torch.where(real, labels.gather(1, order), -1),
    }

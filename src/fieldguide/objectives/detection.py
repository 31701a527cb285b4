"""Anchor-free object detection with task-aligned assignment of grid points to boxes.

For networks with output type "boxes" (see `fieldguide.core.card.OUTPUT_TYPES`). The loss has three parts, all weighted by
the alignment between a point's prediction and its object: complete IoU of the box, distribution focal loss of its four
distances, and binary cross-entropy of every class with the alignment as the target probability.

Shapes: B batch, N boxes of an image, A points of all levels, R bins of a distance, K classes, D detections. Boxes are
(left, top, right, bottom) in pixels of the input tensor; labels are class indices, -1 = padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.models.layers.boxes import ciou, iou, nms, nms_of_sorted
from fieldguide.objectives.base import Objective


def make_grid(height: int, width: int, strides: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:  # -> A 2, A
    """Return the centers (x, y) of all grid cells in pixels, and the stride of each, in the order of the network's outputs."""
    points, sides = [], []
    for stride in strides:
        ys, xs = ((torch.arange(-(-size // stride), device=device) + 0.5) * stride for size in (height, width))
        y, x = torch.meshgrid(ys, xs, indexing="ij")
        points.append(torch.stack([x, y], -1).view(-1, 2))
        sides.append(torch.full((len(points[-1]),), float(stride), device=device))
    return torch.cat(points), torch.cat(sides)


def decode(raw: Tensor, bins: Tensor, points: Tensor, strides: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split raw outputs B A 4R+K into boxes B A 4 in pixels, distance logits B A 4 R and class logits B A K.

    A distance is the mean of its distribution (Li et al. 2020, arXiv:2006.04388, eq. 5). Computed in float32 or better.
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
    """Assign grid points to ground-truth boxes by task alignment (Feng et al. 2021, arXiv:2108.07755, section 3.2).

    The alignment of a point with a box is t = s^alpha u^beta, with the score s of the box's class and the IoU u. The
    `topk` points inside a box with the largest t > 0 are assigned to it; a point chosen by several boxes goes to the one
    with the highest IoU. The quality is t, scaled per box so that its maximum is the highest IoU among its points.
    Unlike the paper, box sides shorter than `smallest` pixels are treated as `smallest` when points inside the box are
    searched, because very small boxes may contain no point.

    Args:
        scores: predicted class probabilities, B A K.
        boxes: predicted boxes, B A 4.
        points: centers of the grid cells, A 2.
        truth: ground-truth boxes, B N 4.
        labels: class indices of the ground-truth boxes, B N, -1 = padding.

    Returns:
        `owner` B A, the index of the box assigned to each point (-1 = none), and `quality` B A, the target probability
        of that box's class, 0 to 1.
    """
    count, size = labels.shape[1], len(points)
    if not count:
        return labels.new_full((len(labels), size), -1), boxes.new_zeros(len(labels), size)
    center, half = (truth[..., :2] + truth[..., 2:]) / 2, ((truth[..., 2:] - truth[..., :2]) / 2).clamp(min=smallest / 2)
    away = points - center[:, :, None]  # B N A 2
    inside = ((away >= -half[:, :, None]) & (away < half[:, :, None])).all(-1) & (labels >= 0)[..., None]
    overlap = iou(truth[:, :, None], boxes[:, None]) * inside  # B N A
    score = scores.mT.gather(1, labels.clamp(min=0)[..., None].expand(-1, -1, size))
    aligned = score**alpha * overlap**beta
    best, index = aligned.topk(min(topk, size), -1)
    chosen = torch.zeros_like(inside).scatter(-1, index, best > 0)
    max_iou, owner = torch.where(chosen, overlap, -1).max(1)  # B A
    owner = owner.masked_fill(max_iou < 0, -1)
    owned = owner[:, None] == torch.arange(count, device=owner.device)[:, None]  # B N A
    aligned, overlap = aligned * owned, overlap * owned
    top = aligned.amax(-1, keepdim=True)
    quality = aligned / torch.where(top > 0, top, 1) * overlap.amax(-1, keepdim=True)
    return owner, quality.amax(1)


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:  # ... R, ... -> ...
    """Return the distribution focal loss (arXiv:2006.04388, eq. 6).

    It is the cross-entropy with the two bins next to a distance, weighted linearly. Distances beyond the last bin are
    clamped to just below it.
    """
    distances = distances.clamp(0, logits.shape[-1] - 1.01)
    low = distances.floor().long()
    part = distances - low
    logs = logits.log_softmax(-1)
    below, above = (logs.gather(-1, at[..., None])[..., 0] for at in (low, low + 1))
    return -(1 - part) * below - part * above


class Assigned(NamedTuple):
    """The points of a batch that are assigned to an object."""

    row: Tensor  # P, index of the image
    point: Tensor  # P
    item: Tensor  # P, index of the object in its image
    weight: Tensor  # P, quality of the assignment
    total: Tensor  # sum of all qualities, at least 1


class Detection(Objective):
    """Detection loss for a network with output type "boxes".

    The batch holds the network's `inputs` (the image first), `boxes` and `labels`.

    Args:
        box: weight of the box loss; `label` and `distance` are those of the class and distance losses.
        topk: points per box in the assignment; `alpha` and `beta` are its exponents.
        confidence: minimum score of a detection.
        overlap: IoU above which non-maximum suppression drops the lower-scored of two boxes of a class.
        candidates: number of highest-scored candidates per image that enter non-maximum suppression.
        most: maximum number of detections per image.
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
        max_detections: int = 300,
    ):
        super().__init__()
        self.model, self.inputs = model, tuple(inputs)
        self.weights = {"box": box, "label": label, "distance": distance}
        self.matching: dict[str, Any] = {"topk": topk, "alpha": alpha, "beta": beta, "smallest": float(min(self.model.strides))}
        self.confidence, self.overlap, self.candidates, self.max_detections = confidence, overlap, candidates, max_detections

    def run_network(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output of the network, and the points and strides of the grid."""
        return self.model(*(batch[name] for name in self.inputs)), *self.make_grid(batch)

    def make_grid(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the points and strides of the grid."""
        image = batch[self.inputs[0]]
        return make_grid(image.shape[-2], image.shape[-1], self.model.strides, image.device)

    def compute_predictions(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return boxes, distance logits and class logits (see `decode`), and the points and strides of the grid."""
        raw, points, strides = self.run_network(batch)
        return *decode(raw, self.model.bins, points, strides), points, strides

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        """Return the losses. Each part is a sum over points divided by the sum of their qualities."""
        parts, _ = self.measure(batch, *self.compute_predictions(batch))
        return {"loss": self.weigh(parts), **parts}

    def weigh(self, parts: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the parts of a loss."""
        first, *others = (self.weights[name] * part for name, part in parts.items())
        return sum(others, first)

    def measure(
        self, batch: dict[str, Tensor], boxes: Tensor, distances: Tensor, logits: Tensor, points: Tensor, strides: Tensor
    ) -> tuple[dict[str, Tensor], Assigned]:
        """Return the parts of the loss, and the points that are assigned to objects."""
        truth, labels = batch["boxes"].to(boxes.dtype), batch["labels"]
        owner, quality = assign(logits.sigmoid(), boxes, points, truth, labels, **self.matching)
        total = quality.sum().clamp(min=1)
        row, point = (owner >= 0).nonzero(as_tuple=True)  # P assigned points
        at, weight = owner[row, point], quality[row, point]
        target = torch.zeros_like(logits)
        target[row, point, labels[row, at]] = weight
        mine, near, stride = truth[row, at], points[point], strides[point, None]
        sides = torch.cat([near - mine[:, :2], mine[:, 2:] - near], -1) / stride
        parts = {
            "box": ((1 - ciou(boxes[row, point], mine)) * weight).sum() / total,
            "label": F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / total,
            "distance": (distribution_focal_loss(distances[row, point], sides).mean(-1) * weight).sum() / total,
        }
        return parts, Assigned(row, point, at, weight, total)

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `boxes` B D 4 clipped to the image, `scores` B D in descending order, `labels` B D; padding is 0, 0, -1."""
        boxes, _, logits, _, _ = self.compute_predictions(batch)
        height, width = batch[self.inputs[0]].shape[-2:]
        return select_detections(
            boxes,
            logits.sigmoid(),
            (height, width),
            confidence=self.confidence,
            overlap=self.overlap,
            candidates=self.candidates,
            max_detections=self.max_detections,
        )


@torch.no_grad()
def select_detections(
    boxes: Tensor,
    scores: Tensor,
    size: tuple[int, int],
    *,
    confidence: float,
    overlap: float,
    candidates: int,
    max_detections: int,
) -> dict[str, Tensor]:
    """Select detections from boxes B A 4, or B A K 4 for each class, and class scores B A K, in the format of `Detection.outputs`.

    `size` is (height, width). Each (box, class) pair above `confidence` is a candidate, so a box may yield several
    classes.
    """
    return rank_detections(
        boxes, scores, size, confidence=confidence, overlap=overlap, candidates=candidates, max_detections=max_detections
    )[0]


@torch.no_grad()
def rank_detections(
    boxes: Tensor,
    scores: Tensor,
    size: tuple[int, int],
    *,
    confidence: float,
    overlap: float,
    candidates: int,
    max_detections: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return what `select_detections` returns, and the index of the box of each detection, B D."""
    classes = scores.shape[-1]
    scores, which = scores.flatten(1).topk(min(candidates, scores[0].numel()))
    labels, which, boxes = which % classes, which if boxes.ndim == 4 else which // classes, boxes.flatten(1, -2)
    boxes, origin = boxes.gather(1, which[..., None].expand(-1, -1, 4)), which
    if torch.compiler.is_exporting():  # the other way has shapes that depend on values
        keep = nms_of_sorted(boxes, scores > confidence, overlap, labels)
    else:
        row, place = (scores > confidence).nonzero(as_tuple=True)
        keep = torch.zeros_like(scores, dtype=torch.bool)
        keep[row, place] = nms(boxes[row, place], scores[row, place], row * classes + labels[row, place], overlap)
    kept = torch.where(keep, scores, -1)
    if torch.compiler.is_exporting():  # ONNX has no stable sort, but equal values keep their order in its TopK
        scores, order = kept.topk(kept.shape[1])
    else:
        scores, order = kept.sort(descending=True, stable=True)
    scores, order = (
        F.pad(x, (0, max(0, max_detections - x.shape[1])), value=fill)[:, :max_detections]
        for x, fill in ((scores, -1), (order, 0))
    )
    real = scores > 0
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    limit = boxes.new_tensor([*reversed(size)] * 2)
    found = {
        "boxes": torch.minimum(boxes.clamp(min=0), limit) * real[..., None],
        "scores": scores * real,
        "labels": torch.where(real, labels.gather(1, order), -1),
    }
    return found, origin.gather(1, order)

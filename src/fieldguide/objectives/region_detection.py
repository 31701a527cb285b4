"""Two-stage detection: losses of the region proposals and of the classified regions (Ren et al. 2015, arXiv:1506.01497, 3.1).

For networks with output type "regions" (see `fieldguide.core.card.OUTPUT_TYPES`). Both stages sample a fixed number of boxes per
image with a minimum share of negative ones, and have a class and a box loss each.

Shapes: B batch, N objects of an image at most, A anchors, P proposals, R sampled regions, M all regions of a batch, K classes,
D detections. Boxes are (left, top, right, bottom) in pixels of the input tensor; labels are class indices, -1 = padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.models.layers.box_offsets import OFFSET_SCALES, clip, decode_offsets, encode_offsets
from fieldguide.models.layers.boxes import iou
from fieldguide.objectives.base import Objective
from fieldguide.objectives.detection import select_detections

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1
BETA = 1 / 9  # where the smooth L1 loss becomes linear
TRAINING_FACTOR = 2  # candidates and proposals in training, for each in prediction
MIN_SIDE_PIXELS = 1e-2  # of a detection


@torch.no_grad()
def match_boxes(
    boxes: Tensor, truth: Tensor, labels: Tensor, high: float, low: float, all_objects: bool
) -> tuple[Tensor, Tensor]:
    """Match each box with the object of the highest IoU.

    A box is positive from an IoU of `high` on, and negative below `low`. With `all_objects`, the boxes that have the highest
    IoU with an object are positive as well, whatever it is (3.1.2, condition i).

    Args:
        boxes: B A 4.
        truth: boxes of the objects, B N 4.
        labels: B N, -1 = padding.

    Returns:
        The object's index B A, and B A of `POSITIVE`, `NEGATIVE` or `IGNORED`.
    """
    if not labels.shape[1]:
        return labels.new_zeros(boxes.shape[:2]), labels.new_full(boxes.shape[:2], NEGATIVE)
    real = (labels >= 0)[..., None]
    overlap = torch.where(real, iou(truth[:, :, None], boxes[:, None]), -1)  # B N A
    best, owner = overlap.max(1)
    kind = torch.where(best >= high, POSITIVE, torch.where(best < low, NEGATIVE, IGNORED))
    if all_objects:
        highest = (overlap == overlap.amax(-1, keepdim=True)) & real
        kind = torch.where(highest.any(1), POSITIVE, kind)
    return owner, kind


@torch.no_grad()
def sample(kind: Tensor, count: int, fraction: float) -> Tensor:  # B A -> B A bool
    """Choose at most `count` boxes of each image at random: at most a `fraction` of positive ones, the others negative."""
    key = torch.rand(kind.shape, device=kind.device)
    place = lambda some: torch.where(some, key, 2.0).argsort(-1).argsort(-1)
    positive = (kind == POSITIVE) & (place(kind == POSITIVE) < int(count * fraction))
    free = count - positive.sum(-1, keepdim=True)
    return positive | ((kind == NEGATIVE) & (place(kind == NEGATIVE) < free))


class RegionDetection(Objective):
    """Losses of Faster R-CNN: objectness and offsets of anchors, classes and offsets of regions.

    The batch holds the network's `inputs` (the image first), `boxes` and `labels`.

    Args:
        anchors: anchors per image that the first stage learns from, at most half of them positive.
        regions: regions per image that the second stage learns from, at most a quarter of them positive.
        confidence: minimum score of a detection.
        overlap: IoU above which non-maximum suppression drops the lower-scored of two boxes of a class.
        candidates: number of highest-scored candidates per image that enter non-maximum suppression.
        max_detections: maximum number of detections per image.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[str] = ("image",),
        *,
        anchors: int = 256,
        regions: int = 512,
        confidence: float = 0.01,
        overlap: float = 0.5,
        candidates: int = 1000,
        max_detections: int = 100,
    ):
        super().__init__()
        self.model, self.inputs = model, tuple(inputs)
        self.anchors, self.regions = anchors, regions
        self.confidence, self.overlap, self.candidates, self.max_detections = confidence, overlap, candidates, max_detections

    def get_size(self, batch: dict[str, Tensor]) -> tuple[int, int]:
        """Return (height, width) of the input."""
        height, width = batch[self.inputs[0]].shape[-2:]
        return height, width

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        """Return the losses. Class losses are means over the sampled boxes, box losses sums divided by their number."""
        size, model = self.get_size(batch), self.model
        maps = model.features(*(batch[name] for name in self.inputs))
        logits, moves, anchors = model.predict_anchors(maps)
        truth, labels = batch["boxes"].to(logits.dtype), batch["labels"]
        parts = self.measure_anchors(logits, moves, anchors, truth, labels)
        with torch.no_grad():
            boxes = clip(decode_offsets(moves.detach(), anchors), size)
            boxes, _, real = model.propose(maps, logits.detach(), boxes, size, TRAINING_FACTOR)
        parts |= self.measure_regions(maps, boxes, real, truth, labels)
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    def measure_anchors(
        self, logits: Tensor, moves: Tensor, anchors: Tensor, truth: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses of the first stage, of logits B A and offsets B A 4."""
        every = anchors.expand(len(logits), -1, -1)
        owner, kind = match_boxes(every, truth, labels, 0.7, 0.3, all_objects=True)
        chosen = sample(kind, self.anchors, 0.5)
        target = (kind == POSITIVE).to(logits.dtype)
        image, place = (chosen & (kind == POSITIVE)).nonzero(as_tuple=True)
        wanted = encode_offsets(truth[image, owner[image, place]], anchors[place])
        return {
            "objectness": F.binary_cross_entropy_with_logits(logits[chosen], target[chosen]),
            "proposal": F.smooth_l1_loss(moves[image, place], wanted, reduction="sum", beta=BETA) / chosen.sum(),
        }

    def choose_regions(
        self, boxes: Tensor, real: Tensor, truth: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample from proposals B P 4 and the objects themselves.

        Returns:
            Boxes B R 4, their class from 1 on (0 = background) B R, the box of their object B R 4, and which are real B R.
        """
        boxes, real = torch.cat([boxes, truth], 1), torch.cat([real, labels >= 0], 1)
        owner, kind = match_boxes(boxes, truth, labels, 0.5, 0.5, all_objects=False)
        chosen = sample(torch.where(real, kind, IGNORED), self.regions, 0.25)
        real, index = chosen.int().topk(min(self.regions, chosen.shape[1]))
        owner, kind, rows = (
            owner.gather(1, index),
            kind.gather(1, index),
            torch.arange(len(boxes), device=boxes.device)[:, None],
        )
        if not labels.shape[1]:
            return boxes[rows, index], owner, boxes[rows, index], real.bool()
        target = torch.where(kind == POSITIVE, labels.gather(1, owner) + 1, 0)
        return boxes[rows, index], target, truth[rows, owner], real.bool()

    def measure_regions(
        self, maps: list[Tensor], boxes: Tensor, real: Tensor, truth: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses of the second stage, of proposals B P 4."""
        with torch.no_grad():
            regions, target, mine, real = self.choose_regions(boxes, real, truth, labels)
        logits, offsets = self.model.classify(self.model.pool(maps, regions)[real])
        target, regions, mine = target[real], regions[real], mine[real]
        rows = target.nonzero()[:, 0]
        wanted = encode_offsets(mine[rows], regions[rows]) * offsets.new_tensor(OFFSET_SCALES)
        found = offsets[rows, target[rows]]
        return {
            "label": F.cross_entropy(logits, target),
            "box": F.smooth_l1_loss(found, wanted, reduction="sum", beta=BETA) / len(target),
        }

    @torch.no_grad()
    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `boxes` B D 4 clipped to the image, `scores` B D in descending order, `labels` B D; padding is 0, 0, -1."""
        found = self.model(*(batch[name] for name in self.inputs))
        size, classes = self.get_size(batch), self.model.config.num_classes + 1
        proposals, _, logits, offsets = found.split([4, 1, classes, 4 * classes], -1)
        offsets = offsets.unflatten(-1, (classes, 4))[:, :, 1:] / offsets.new_tensor(OFFSET_SCALES)
        boxes = clip(decode_offsets(offsets, proposals[:, :, None]), size)  # B P K 4
        scores = logits.softmax(-1)[..., 1:] * (boxes[..., 2:] - boxes[..., :2] >= MIN_SIDE_PIXELS).all(-1)
        return select_detections(
            boxes,
            scores,
            size,
            confidence=self.confidence,
            overlap=self.overlap,
            candidates=self.candidates,
            max_detections=self.max_detections,
        )

"""Detection as a set whose scores predict the quality of boxes, trained with noisy copies of the objects.

For networks with output type "scored-queries" (see `fieldguide.core.card.OUTPUT_TYPES`): the losses of RT-DETR (Zhao et al. 2023,
arXiv:2304.08069). Class scores are trained with the varifocal loss (Zhang et al. 2020, arXiv:2008.13367, eq. 2), whose target is
the IoU of the matched box. Contrastive denoising is that of DINO (Zhang et al. 2022, arXiv:2203.03605, section 3.3).

Shapes: as in `fieldguide.objectives.set_detection`; G noisy copies, in groups of 2N: N positive ones, then N negative ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.models.layers.boxes import iou, to_centers, to_corners
from fieldguide.objectives.set_detection import SetDetection, pad_detections, promote

TINY = 1e-8  # inside of logarithms
LOGIT_LIMIT = 1e-5  # distance of a coordinate to 0 and 1


@dataclass(frozen=True)
class NoisyObjects:
    """Noisy copies of the objects of a batch.

    `labels` B G are classes, K = none; `boxes` B G 4 logits of (center x, center y, width, height); `mask` G+Q G+Q is True
    where one query sees another; `pairs` are the indices of image, copy and object of the positive copies, and `groups` is
    the number of groups.
    """

    labels: Tensor
    boxes: Tensor
    mask: Tensor
    pairs: tuple[Tensor, Tensor, Tensor]
    groups: int


@torch.no_grad()
def add_noise(
    boxes: Tensor, labels: Tensor, classes: int, queries: int, *, copies: int = 100, flipped: float = 0.25, size: float = 1.0
) -> NoisyObjects | None:
    """Return noisy copies of objects, or None for a batch without objects.

    A corner of a positive copy moves by less than half a side of its box times `size`, one of a negative copy by half to a whole
    side. Groups see only themselves, and queries no copies.

    Args:
        boxes: (center x, center y, width, height) as fractions of the image's sides, B N 4.
        labels: B N, -1 = padding.
        classes: K.
        queries: Q.
        copies: approximate number of positive copies per image, in as many groups as the image with the most objects allows.
        flipped: fraction of the copies that get a random class.
        size: amount of noise.
    """
    real = labels >= 0
    most = int(real.sum(1).max()) if labels.numel() else 0
    if not most:
        return None
    order = (~real).int().argsort(dim=1, stable=True)[:, :most]  # the real ones first
    rows = torch.arange(len(labels), device=labels.device)[:, None]
    groups = max(1, copies // most)
    there = real[rows, order].repeat(1, 2 * groups)  # B G
    known = labels[rows, order].repeat(1, 2 * groups)
    box = torch.where(real[rows, order, None], boxes[rows, order], 0).repeat(1, 2 * groups, 1)
    negative = (torch.arange(2 * groups, device=labels.device) % 2 == 1).repeat_interleave(most)[:, None]  # G 1
    others = torch.randint(classes, known.shape, device=labels.device)
    known = torch.where(torch.rand(known.shape, device=labels.device) < flipped, others, known)
    way = torch.randint(2, box.shape, device=labels.device) * 2 - 1
    amount = torch.rand(box.shape, device=labels.device, dtype=box.dtype) + negative
    moved = (to_corners(box) + way * amount * box[..., 2:].repeat(1, 1, 2) / 2 * size).clamp(0, 1)
    moved = to_centers(moved)
    group = torch.arange(groups, device=labels.device).repeat_interleave(2 * most)
    group = torch.cat([group, group.new_full((queries,), groups)])  # the queries are one more group
    image, copy = (there & ~negative[:, 0]).nonzero(as_tuple=True)
    return NoisyObjects(
        torch.where(there, known, classes),
        torch.log(moved.clamp(min=LOGIT_LIMIT) / (1 - moved).clamp(min=LOGIT_LIMIT)),
        (group[:, None] == group) | (group[:, None] < groups) & (group == groups),
        (image, copy, order[image, copy % most]),
        groups,
    )


class DenoisingDetection(SetDetection):
    """Losses of RT-DETR: varifocal loss, L1 distance and generalized IoU of every layer, of the encoder's proposals and of noisy copies.

    The losses of the copies are divided by the number of objects times that of groups.

    Args:
        alpha: weight of negative examples in the varifocal loss, and `gamma` the exponent of their scores.
        copies: approximate number of positive noisy copies per image; 0 = none.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[str] = ("image",),
        *,
        alpha: float = 0.75,
        gamma: float = 2.0,
        copies: int = 100,
        max_detections: int = 100,
        overlap: float = 1.0,
    ):
        super().__init__(model, inputs, max_detections=max_detections, overlap=overlap)
        self.costs["label"] = 2.0
        self.alpha, self.gamma, self.copies = alpha, gamma, copies

    def class_cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the difference of the focal losses of a query with and without the object (Lin et al. 2017, arXiv:1708.02002)."""
        score = logits.sigmoid().gather(-1, labels.clamp(min=0)[None, :, None].expand(*logits.shape[:3], -1))
        positive = -0.25 * (1 - score).square() * (score + TINY).log()
        return positive + 0.75 * score.square() * (1 - score + TINY).log()

    def measure_quality(self, found: Tensor, true: Tensor) -> Tensor:
        """Return the IoU."""
        return iou(to_corners(found), to_corners(true))

    def label_loss(self, logits: Tensor, target: Tensor, quality: Tensor, count: Tensor) -> Tensor:
        """Return the varifocal loss of logits L B Q K, summed and divided by `count`. `target` L B Q is K for no object."""
        chosen = F.one_hot(target, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
        wanted = quality[..., None] * chosen
        weight = self.alpha * logits.detach().sigmoid() ** self.gamma * (1 - chosen) + wanted
        return F.binary_cross_entropy_with_logits(logits, wanted, weight, reduction="sum") / count

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        """Return the losses, each summed over the layers of the decoder and the proposals; those of copies begin with `noisy`."""
        config = self.model.config
        floats = torch.promote_types(batch[self.inputs[0]].dtype, torch.float32)
        boxes, labels = self.get_targets(batch, floats)
        noisy = add_noise(boxes, labels, config.num_classes, config.queries, copies=self.copies) if self.copies else None
        known = None if noisy is None else (noisy.labels, noisy.boxes, noisy.mask)
        layers, proposals = self.model.predict_all(*(batch[name] for name in self.inputs), known)
        predictions = promote(torch.stack(layers))
        start = 0 if noisy is None else noisy.labels.shape[1]
        count = (labels >= 0).sum().clamp(min=1)
        every = torch.cat([predictions[:, :, start:], promote(proposals)[None].to(predictions.dtype)])
        parts = self.measure(every, boxes, labels, count)
        loss = self.weigh(parts)
        if noisy is not None:
            depth, (image, copy, item) = len(layers), noisy.pairs
            layer = torch.arange(depth, device=image.device).repeat_interleave(len(image))
            pairs = (layer, *(x.repeat(depth) for x in (image, copy, item)))
            copied = self.measure(predictions[:, :, :start], boxes, labels, count * noisy.groups, pairs)
            loss = loss + self.weigh(copied)
            parts |= {f"noisy_{name}": part for name, part in copied.items()}
        return {"loss": loss, **parts}

    def rank(self, boxes: Tensor, logits: Tensor) -> dict[str, Tensor]:  # B Q 4, B Q K
        """Return the pairs of query and class with the highest scores."""
        classes = logits.shape[-1]
        scores, index = logits.sigmoid().flatten(1).topk(min(self.max_detections, logits[0].numel()))
        boxes = boxes.gather(1, (index // classes)[..., None].expand(-1, -1, 4))
        return pad_detections(boxes, scores, index % classes, self.max_detections)

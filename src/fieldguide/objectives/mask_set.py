"""Segmentation as a set of masks: queries and segments are matched one to one (Cheng et al. 2021, arXiv:2112.01527, section 3.2).

For networks with output type "mask-queries" (see `fieldguide.core.card.OUTPUT_TYPES`). Each layer of the decoder is matched and
trained separately.

Shapes: L layers, B batch, Q queries, N segments of an image at most, K classes, P positions of a mask, M matched pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective
from fieldguide.objectives.segmentation import Segmentation
from fieldguide.objectives.set_detection import match_costs, promote

MULTIPLE = 32  # images are padded to multiples of it, so that positions of masks are squares of pixels


def pad_image(image: Tensor) -> Tensor:
    """Extend images at the right and bottom by zeros to multiples of 32 pixels."""
    return F.pad(image, (0, -image.shape[-1] % MULTIPLE, 0, -image.shape[-2] % MULTIPLE))


def dice_distance(masks: Tensor, true: Tensor) -> Tensor:  # ... P, ... P -> ...
    """Return 1 - the soft Dice score of probabilities and true values."""
    return 1 - (2 * (masks * true).sum(-1) + 1) / (masks.sum(-1) + true.sum(-1) + 1)


class MaskSet:
    """The loss of sets of masks: cross-entropy with a class "no object", binary cross-entropy and Dice of matched masks.

    Masks are compared at all positions of the network's masks. The authors compare 12,544 points, drawn anew in each step, mostly
    where masks are uncertain; a crop of 448 pixels has as many positions.

    Args:
        label: weight of the class loss; `mask` and `dice` those of the two mask losses. They are also the costs of matching.
        background: weight of queries without a segment in the class loss.
    """

    def __init__(self, label: float = 2.0, mask: float = 5.0, dice: float = 5.0, background: float = 0.1):
        self.weights, self.background = {"label": label, "mask": mask, "dice": dice}, background

    @torch.no_grad()
    def match(self, logits: Tensor, masks: Tensor, labels: Tensor, true: Tensor, known: Tensor) -> tuple[Tensor, ...]:
        """Match the queries of each layer, L B Q K+1 and L B Q P, with the segments of their image, B N and B N P."""
        place = labels.clamp(min=0)[None, :, None].expand(*logits.shape[:3], -1)
        cost = -self.weights["label"] * logits.softmax(-1).gather(-1, place)
        true, count = true * known[:, None], known.sum(-1).clamp(min=1)[:, None, None]
        # Cross-entropy is linear in the true value: softplus(-x) where it is 1, softplus(x) where it is 0.
        absent = (known[:, None] - true).mT
        entropy = (F.softplus(-masks) @ true.mT + F.softplus(masks) @ absent) / count  # L B Q N
        sure = masks.sigmoid() * known[:, None]
        shared = 2 * (sure @ true.mT) + 1
        dice = 1 - shared / (sure.sum(-1)[..., None] + true.sum(-1)[:, None] + 1)
        return match_costs(cost + self.weights["mask"] * entropy + self.weights["dice"] * dice, labels >= 0)

    def measure(self, logits: Tensor, masks: Tensor, labels: Tensor, true: Tensor, known: Tensor) -> dict[str, Tensor]:
        """Return the parts of the loss, summed over layers. `known` B P is 0 for positions that are not scored."""
        layer, image, query, item = self.match(logits, masks, labels, true, known)
        target = torch.full(logits.shape[:-1], logits.shape[-1] - 1, device=logits.device)
        target[layer, image, query] = labels[image, item]
        weight = logits.new_ones(logits.shape[-1])
        weight[-1] = self.background
        losses = F.cross_entropy(logits.movedim(-1, 1), target, weight, reduction="none")  # L B Q
        count = (labels >= 0).sum().clamp(min=1)
        found, real, scored = masks[layer, image, query], true[image, item], known[image]
        entropy = F.binary_cross_entropy_with_logits(found, real, reduction="none") * scored
        return {
            "label": (losses.sum((1, 2)) / weight[target].sum((1, 2))).sum(),
            "mask": (entropy.sum(-1) / scored.sum(-1).clamp(min=1)).sum() / count,
            "dice": dice_distance(found.sigmoid() * scored, real * scored).sum() / count,
        }

    def __call__(self, logits: Tensor, masks: Tensor, labels: Tensor, true: Tensor, known: Tensor) -> dict[str, Tensor]:
        """Return the weighted loss and its parts."""
        parts = self.measure(logits, masks, labels, true, known)
        first, *others = (self.weights[name] * part for name, part in parts.items())
        return {"loss": sum(others, first), **parts}


class MaskSetSegmentation(Segmentation):
    """Semantic segmentation by a set of masks: the segments of an image are its classes.

    A pixel's score of a class is the sum over queries of the probability of the class times that of the pixel in the mask.
    """

    def __init__(self, model: nn.Module, classes: int, tile: int = 512):
        super().__init__(model, classes, tile)
        self.measure = MaskSet()

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        """Return the losses of a batch as for `Segmentation`."""
        image = pad_image(batch["image"])
        layers = self.model.predict_layers(image)
        logits, masks = (promote(torch.stack(parts)) for parts in zip(*layers))
        below, right = (a - b for a, b in zip(image.shape[-2:], batch["target"].shape[-2:]))
        target = F.pad(batch["target"], (0, right, 0, below), value=-1)
        size = (masks.shape[-2], masks.shape[-1])
        real = F.adaptive_avg_pool2d((target >= 0).to(masks.dtype)[:, None], size)  # B 1 h w
        everywhere = F.one_hot(target.clamp(min=0), self.classes).movedim(-1, 1) * (target >= 0)[:, None]
        shares = F.adaptive_avg_pool2d(everywhere.to(masks.dtype), size) / real.clamp(min=1e-6)  # B K h w
        there = everywhere.flatten(2).any(-1)  # B K
        labels = torch.where(there, torch.arange(self.classes, device=there.device), -1)
        return self.measure(logits, masks.flatten(3), labels, shares.flatten(2), (real > 0).to(masks.dtype).flatten(1))

    def predict_untiled(self, image: Tensor) -> Tensor:  # B C H W -> B classes H W scores
        """Return the score of every pixel for each class."""
        padded = pad_image(image)
        logits, masks = self.model.predict_layers(padded)[-1]
        scores = torch.einsum("bqk,bqhw->bkhw", promote(logits).softmax(-1)[..., :-1], promote(masks).sigmoid())
        scores = F.interpolate(scores, padded.shape[-2:], mode="bilinear", align_corners=False)
        return scores[..., : image.shape[-2], : image.shape[-1]]

    segment_canvas = predict_untiled


class MaskSetInstances(Objective):
    """Instance segmentation by a set of masks: the segments of an image are its objects.

    The batch holds the network's `inputs` (the image first), `labels` B N (-1 = padding) and `masks` B N h w, the coverage of cells.

    Args:
        max_detections: pairs of query and class per image with the highest scores.
        overlap: not used: a set holds no duplicates to suppress.
    """

    cuts_by_box = False  # boxes are those of the masks

    def __init__(
        self, model: nn.Module, inputs: Sequence[str] = ("image",), *, max_detections: int = 100, overlap: float = 1.0
    ):
        super().__init__()
        self.model, self.inputs, self.max_detections, self.overlap = model, tuple(inputs), max_detections, overlap
        self.measure = MaskSet()

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        """Return the losses, each summed over the layers of the decoder."""
        layers = self.model.predict_layers(*(batch[name] for name in self.inputs))
        logits, masks = (promote(torch.stack(parts)) for parts in zip(*layers))
        true = batch["masks"].flatten(2).to(masks.dtype)
        return self.measure(logits, masks.flatten(3), batch["labels"], true, self.find_known(true))

    def find_known(self, true: Tensor) -> Tensor:  # B N P -> B P
        """Return 1 for positions whose masks are scored, 0 for others."""
        return torch.ones_like(true[:, 0])

    @torch.no_grad()
    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `scores` B D in descending order, `labels` B D (-1 = padding), `masks` B D h w logits, and `boxes` B D 4 of zeros.

        A score is the probability of the class times the mean probability of the mask's positions (section 3.4 of the paper's
        predecessor, arXiv:2107.06278, and the authors' code).
        """
        logits, masks = self.model.predict_layers(*(batch[name] for name in self.inputs))[-1]
        return rank_masks(promote(logits), promote(masks), self.max_detections)


class MaskSetPanoptic(MaskSetInstances):
    """Panoptic segmentation by a set of masks: the segments of an image are its objects and its regions of other classes.

    Positions that no segment covers are not scored: it is not known what is there.
    """

    def find_known(self, true: Tensor) -> Tensor:  # B N P -> B P
        return (true.sum(1) > 0).to(true.dtype)

    @torch.no_grad()
    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the predictions of the queries: `scores` B Q, `labels` B Q (-1 = no segment), and `masks` B Q h w logits."""
        logits, masks = self.model.predict_layers(*(batch[name] for name in self.inputs))[-1]
        scores, labels = promote(logits).softmax(-1).max(-1)
        return {"scores": scores, "labels": torch.where(labels < logits.shape[-1] - 1, labels, -1), "masks": promote(masks)}


def rank_masks(logits: Tensor, masks: Tensor, max_detections: int) -> dict[str, Tensor]:  # B Q K+1, B Q h w
    """Return the pairs of query and class with the highest probabilities, in the format of `MaskSetInstances.outputs`."""
    found = logits.softmax(-1)[..., :-1]
    scores, place = found.flatten(1).topk(min(max_detections, found[0].numel()))
    query = place // found.shape[-1]
    inside = masks > 0
    area = inside.sum((-2, -1))
    sure = (masks.sigmoid() * inside).sum((-2, -1)) / area.clamp(min=1)  # B Q
    scores = scores * sure.gather(1, query)
    missing = max(0, max_detections - scores.shape[1])
    boxes = scores.new_zeros(*scores.shape, 4)
    labels = torch.where(scores > 0, place % found.shape[-1], -1)
    scores, order = scores.sort(descending=True, stable=True)
    query = query.gather(1, order)
    chosen = masks.gather(1, query[..., None, None].expand(-1, -1, *masks.shape[2:]))
    return {
        "boxes": F.pad(boxes, (0, 0, 0, missing)),
        "scores": F.pad(scores, (0, missing)),
        "labels": F.pad(labels.gather(1, order), (0, missing), value=-1),
        "masks": F.pad(chosen, (0, 0, 0, 0, 0, missing)),
    }

"""Detection as a set: predictions and objects are matched one to one (Carion et al. 2020, arXiv:2005.12872, section 3.1).

For networks with output type "queries" (see `fieldguide.core.card.OUTPUT_TYPES`). Each layer of the decoder is matched and
trained separately (auxiliary losses, section 3.2); the last layer predicts.

Shapes: L layers of the decoder, B batch, Q queries, N objects of an image at most, K classes, M matched pairs of all layers and
images, D detections. Boxes of a batch are (left, top, right, bottom) in pixels of the input tensor, labels are class indices,
-1 = padding; boxes of predictions are (center x, center y, width, height) as fractions of the image's sides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from fieldguide.models.layers.boxes import giou, to_centers, to_corners
from fieldguide.objectives.base import Objective

LARGEST_COST = 1e6  # replaces costs that are not finite, so that such predictions are matched last


def to_pixels(boxes: Tensor, size: tuple[int, int]) -> Tensor:  # ... 4 -> ... 4
    """Return boxes of predictions as (left, top, right, bottom) in pixels, within an image of (height, width)."""
    limit = boxes.new_tensor([*reversed(size)] * 2)
    return torch.minimum((to_corners(boxes) * limit).clamp(min=0), limit)


def to_fractions(boxes: Tensor, size: tuple[int, int]) -> Tensor:  # ... 4 -> ... 4
    """Return boxes in pixels of an image of (height, width) in the format of predictions."""
    return to_centers(boxes / boxes.new_tensor([*reversed(size)] * 2))


def match_costs(cost: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # L B Q N, B N bool -> 4 times M
    """Return the pairs of least total cost as indices of layer, image, query and object (the Hungarian algorithm).

    Every object that is `real` gets a query of its own, unless there are more objects than queries.
    """
    costs = torch.nan_to_num(cost.detach(), nan=LARGEST_COST, posinf=LARGEST_COST, neginf=LARGEST_COST).cpu().numpy()
    objects = [row.nonzero()[:, 0] for row in real.cpu()]
    pairs: list[Tensor] = []
    for layer in range(len(costs)):
        for image, some in enumerate(objects):
            query, place = (torch.from_numpy(x) for x in linear_sum_assignment(costs[layer, image][:, some.numpy()]))
            pairs.append(torch.stack([torch.full_like(query, layer), torch.full_like(query, image), query, some[place]]))
    layers, images, queries, found = torch.cat(pairs, 1).to(cost.device)
    return layers, images, queries, found


def pad_detections(boxes: Tensor, scores: Tensor, labels: Tensor, max_detections: int) -> dict[str, Tensor]:
    """Sort detections B D 4, B D, B D by score and cut or pad them to `max_detections`; padding is 0, 0, -1."""
    scores, order = scores.sort(descending=True, stable=True)
    missing = max(0, max_detections - scores.shape[1])
    boxes, labels = boxes.gather(1, order[..., None].expand(-1, -1, 4)), labels.gather(1, order)
    return {
        "boxes": F.pad(boxes, (0, 0, 0, missing))[:, :max_detections],
        "scores": F.pad(scores, (0, missing))[:, :max_detections],
        "labels": F.pad(labels, (0, missing), value=-1)[:, :max_detections],
    }


class SetDetection(Objective):
    """Loss of DETR: cross-entropy with a class "no object", L1 distance and generalized IoU of matched boxes.

    The batch holds the network's `inputs` (the image first), `boxes` and `labels`. Box losses are divided by the number of
    objects in the batch, class losses by the sum of their weights.

    Args:
        label: weight of the class loss; `box` and `giou` are those of the L1 distance and the generalized IoU. The same
            weights, with the probability of the class in place of its logarithm, are the costs of matching.
        background: weight of queries without an object in the class loss.
        max_detections: number of detections per image, with padding.
        overlap: not used: a set holds no duplicates to suppress.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[str] = ("image",),
        *,
        label: float = 1.0,
        box: float = 5.0,
        giou: float = 2.0,
        background: float = 0.1,
        max_detections: int = 100,
        overlap: float = 1.0,
    ):
        super().__init__()
        self.model, self.inputs = model, tuple(inputs)
        self.weights = {"label": label, "box": box, "giou": giou}
        self.costs = dict(self.weights)
        self.background, self.max_detections, self.overlap = background, max_detections, overlap

    def get_size(self, batch: dict[str, Tensor]) -> tuple[int, int]:
        """Return (height, width) of the input."""
        height, width = batch[self.inputs[0]].shape[-2:]
        return height, width

    def get_targets(self, batch: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the objects' boxes in the format of predictions (B N 4), and their labels (B N)."""
        return to_fractions(batch["boxes"].to(dtype), self.get_size(batch)), batch["labels"]

    def match(self, predictions: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Match the predictions L B Q 4+.. of each layer with the objects of their image."""
        with torch.no_grad():
            found = predictions[..., None, :4]  # L B Q 1 4
            cost = self.costs["label"] * self.class_cost(predictions[..., 4:], labels)
            cost = cost + self.costs["box"] * (found - boxes[:, None]).abs().sum(-1)
            cost = cost - self.costs["giou"] * giou(to_corners(found), to_corners(boxes)[:, None])
            return match_costs(cost, labels >= 0)

    def class_cost(self, logits: Tensor, labels: Tensor) -> Tensor:  # L B Q K+1, B N -> L B Q N
        """Return the cost of giving an object of a class to a query: minus the class's probability."""
        place = labels.clamp(min=0)[None, :, None].expand(*logits.shape[:3], -1)
        return -logits.softmax(-1).gather(-1, place)

    def label_loss(self, logits: Tensor, target: Tensor, quality: Tensor, count: Tensor) -> Tensor:
        """Return the class loss of logits L B Q K+1, summed over layers. `target` L B Q is K for "no object"."""
        weight = logits.new_ones(logits.shape[-1])
        weight[-1] = self.background
        losses = F.cross_entropy(logits.permute(1, 3, 2, 0), target.permute(1, 2, 0), weight, reduction="none")  # B Q L
        return (losses.sum((0, 1)) / weight[target].sum((1, 2))).sum()

    def measure(
        self, predictions: Tensor, boxes: Tensor, labels: Tensor, count: Tensor, pairs: tuple[Tensor, ...] | None = None
    ) -> dict[str, Tensor]:
        """Return the parts of the loss of predictions L B Q 4+.., summed over layers.

        `pairs` are the indices of layer, image, query and object that belong together; by default they are matched.
        """
        layer, image, query, item = self.match(predictions, boxes, labels) if pairs is None else pairs
        found, true = predictions[layer, image, query, :4], boxes[image, item]
        similarity = giou(to_corners(found), to_corners(true))
        logits = predictions[..., 4:]
        target = torch.full(logits.shape[:-1], self.model.config.num_classes, device=logits.device)
        target[layer, image, query] = labels[image, item]
        quality = logits.new_zeros(logits.shape[:-1])
        quality[layer, image, query] = self.measure_quality(found.detach(), true)
        return {
            "label": self.label_loss(logits, target, quality, count),
            "box": (found - true).abs().sum() / count,
            "giou": (1 - similarity).sum() / count,
        }

    def measure_quality(self, found: Tensor, true: Tensor) -> Tensor:  # M 4, M 4 -> M
        """Return how good a matched box is; used by objectives whose class scores predict it."""
        return found.new_ones(len(found))

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        """Return the losses, each summed over the layers of the decoder."""
        predictions = promote(self.model.predict_layers(*(batch[name] for name in self.inputs)))
        boxes, labels = self.get_targets(batch, predictions.dtype)
        count = (labels >= 0).sum().clamp(min=1)
        parts = self.measure(predictions, boxes, labels, count)
        return {"loss": self.weigh(parts), **parts}

    def weigh(self, parts: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the parts of a loss."""
        first, *others = (self.weights[name] * part for name, part in parts.items())
        return sum(others, first)

    @torch.no_grad()
    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `boxes` B D 4 clipped to the image, `scores` B D in descending order, `labels` B D; padding is 0, 0, -1."""
        predictions = promote(self.model(*(batch[name] for name in self.inputs)))
        boxes = to_pixels(predictions[..., :4], self.get_size(batch))
        return self.rank(boxes, predictions[..., 4:])

    def rank(self, boxes: Tensor, logits: Tensor) -> dict[str, Tensor]:  # B Q 4, B Q K+1
        """Return each query's most probable class besides "no object"."""
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        return pad_detections(boxes, scores, labels, self.max_detections)


def promote(x: Tensor) -> Tensor:
    """Return a tensor in float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

"""Detection of objects with masks that are sums of prototypes (Bolya et al. 2019, arXiv:1904.02689, sections 3.1 to 3.3).

For networks with output type "prototypes" (see `fieldguide.core.card.OUTPUT_TYPES`). The loss of `Detection`, plus the binary
cross-entropy of the masks of assigned points, within the true box and divided by its area.

Shapes: B batch, N objects of an image, A points, P prototypes, h w height and width of masks, M assigned points, D detections. Masks
of a batch are the coverage of cells, from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.detection import Detection, decode, rank_detections


def find_cells(boxes: Tensor, size: tuple[int, int], stride: float) -> Tensor:  # M 4 -> M h w bool
    """Return which cells of `stride` pixels each box touches."""
    y, x = (torch.arange(n, device=boxes.device, dtype=boxes.dtype) for n in size)
    left, top, right, bottom = (boxes / stride).unbind(-1)
    across = (x + 1 > left[:, None]) & (x < right[:, None])
    down = (y + 1 > top[:, None]) & (y < bottom[:, None])
    return down[:, :, None] & across[:, None]


class PrototypeDetection(Detection):
    """Loss of detection with masks. The batch also holds `masks` B N h w.

    Args:
        mask: weight of the mask loss.
        max_masks: points per image, on average over the batch, whose masks are trained: those of the highest quality.
        The others are those of `Detection`.
    """

    cuts_by_box = True  # masks end at their box

    def __init__(
        self, model: nn.Module, inputs: Sequence[str] = ("image",), *, mask: float = 7.5, max_masks: int = 100, **options: Any
    ):
        super().__init__(model, inputs, **options)
        self.weights |= {"mask": mask}
        self.max_masks = max_masks

    def predict_parts(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs of detection B A 4R+K, the coefficients B A P and the prototypes B P h w in float32 or better."""
        grid, prototypes = self.model.predict_parts(*(batch[name] for name in self.inputs))
        count = prototypes.shape[1]
        grid, prototypes = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (grid, prototypes))
        return grid[..., :-count], grid[..., -count:], prototypes

    def run_network(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs of detection, and the points and strides of the grid."""
        return self.predict_parts(batch)[0], *self.make_grid(batch)

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        """Return the losses, each a sum over points divided by the sum of their qualities."""
        raw, coefficients, prototypes = self.predict_parts(batch)
        points, strides = self.make_grid(batch)
        parts, (row, point, item, weight, total) = self.measure(
            batch, *decode(raw, self.model.bins, points, strides), points, strides
        )
        if len(row) > (most := self.max_masks * len(raw)):
            best = weight.topk(most).indices.sort().values
            row, point, item, weight = row[best], point[best], item[best], weight[best]
        true, boxes = batch["masks"], batch["boxes"]
        stride = batch[self.inputs[0]].shape[-1] / prototypes.shape[-1]
        losses = []
        for image in range(len(raw)):
            some = row == image
            logits = coefficients[image, point[some]] @ prototypes[image].flatten(1)  # m hw
            inside = find_cells(boxes[image, item[some]], (true.shape[-2], true.shape[-1]), stride).flatten(1)
            wanted = true[image, item[some]].flatten(1).to(logits.dtype)
            entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none") * inside
            losses.append((entropy.sum(-1) / inside.sum(-1).clamp(min=1) * weight[some]).sum())
        parts["mask"] = torch.stack(losses).sum() / total
        return {"loss": self.weigh(parts), **parts}

    @torch.no_grad()
    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what `Detection.outputs` does, and `masks`, the logits B D h w of cells."""
        raw, coefficients, prototypes = self.predict_parts(batch)
        points, strides = self.make_grid(batch)
        boxes, _, logits = decode(raw, self.model.bins, points, strides)
        height, width = batch[self.inputs[0]].shape[-2:]
        found, place = rank_detections(
            boxes,
            logits.sigmoid(),
            (height, width),
            confidence=self.confidence,
            overlap=self.overlap,
            candidates=self.candidates,
            max_detections=self.max_detections,
        )
        chosen = coefficients.gather(1, place[..., None].expand(-1, -1, coefficients.shape[-1]))
        return {**found, "masks": torch.einsum("bdp,bphw->bdhw", chosen, prototypes)}

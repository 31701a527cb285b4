"""Detection of objects with keypoints (Maji et al. 2022, arXiv:2204.06806, section 3).

For networks with output type "poses" (see `fieldguide.core.card.OUTPUT_TYPES`). The loss of `Detection`, plus 1 - OKS (the
object keypoint similarity that poses are scored with) of the assigned points, and binary cross-entropy of whether a keypoint is
labeled.

Shapes: B batch, N objects of an image, P keypoints, M assigned points, D detections. Keypoints are (x, y) in pixels of the input
tensor, NaN where not labeled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.detection import Detection, decode, rank_detections

BOX_FILL = 0.5  # area of an object as a fraction of its box, where no outline is known
MIN_AREA = 1.0  # square pixels


def decode_keypoints(raw: Tensor, points: Tensor, strides: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keypoints ... P 2 in pixels and their logits ... P, from raw outputs ... 3P of grid points ... 2."""
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32)).unflatten(-1, (-1, 3))
    corner = points - strides[..., None] / 2
    return corner[..., None, :] + 2 * raw[..., :2] * strides[..., None, None], raw[..., 2]


def keypoint_similarity(found: Tensor, true: Tensor, area: Tensor, sigmas: Tensor) -> Tensor:  # M P 2, M P 2, M, P -> M
    """Return the mean over labeled keypoints of exp(-d^2 / (2 area (2 sigma)^2)); 0 for an object without any.

    It is the OKS of COCO (cocodataset.org/#keypoints-eval).
    """
    known = true.isfinite().all(-1)
    apart = ((found - torch.where(known[..., None], true, 0)) ** 2).sum(-1) / (2 * area[:, None] * (2 * sigmas) ** 2)
    return (torch.exp(-apart) * known).sum(-1) / known.sum(-1).clamp(min=1)


class PoseDetection(Detection):
    """Loss of detection with keypoints. The batch also holds `keypoints` B N P 2.

    Args:
        sigmas: tolerance of each keypoint, as a fraction of the root of the object's area.
        pose: weight of 1 - OKS; `labeled` that of the probability that a keypoint is labeled.
        The others are those of `Detection`.
    """

    sigmas: Tensor

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[str] = ("image",),
        *,
        sigmas: Sequence[float],
        pose: float = 12.0,
        labeled: float = 1.0,
        **options: Any,
    ):
        super().__init__(model, inputs, **options)
        self.weights |= {"pose": pose, "labeled": labeled}
        self.register_buffer("sigmas", torch.tensor(sigmas, dtype=torch.float32), persistent=False)

    def split_grid(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the raw outputs of detection and of keypoints, and the points and strides of the grid."""
        raw, points, strides = self.run_network(batch)
        values = 3 * len(self.sigmas)
        return raw[..., :-values], raw[..., -values:], points, strides

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        """Return the losses, each a sum over points divided by the sum of their qualities."""
        raw, poses, points, strides = self.split_grid(batch)
        parts, (row, point, item, weight, total) = self.measure(
            batch, *decode(raw, self.model.bins, points, strides), points, strides
        )
        found, logits = decode_keypoints(poses[row, point], points[point], strides[point])
        true, boxes = batch["keypoints"][row, item].to(found.dtype), batch["boxes"][row, item].to(found.dtype)
        known = true.isfinite().all(-1)  # M P
        area = (BOX_FILL * (boxes[:, 2:] - boxes[:, :2]).prod(-1)).clamp(min=MIN_AREA)
        weight = weight * known.any(-1)
        missed = 1 - keypoint_similarity(found, true, area, self.sigmas.to(found.dtype))
        labels = F.binary_cross_entropy_with_logits(logits, known.to(logits.dtype), reduction="none").mean(-1)
        parts |= {"pose": (missed * weight).sum() / total, "labeled": (labels * weight).sum() / total}
        return {"loss": self.weigh(parts), **parts}

    @torch.no_grad()
    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what `Detection.outputs` does, and `keypoints` B D P 3: x, y and the probability of being labeled."""
        raw, poses, points, strides = self.split_grid(batch)
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
        chosen = poses.gather(1, place[..., None].expand(-1, -1, poses.shape[-1]))
        keypoints, logits = decode_keypoints(chosen, points[place], strides[place])
        real = (found["labels"] >= 0)[..., None, None]
        return {**found, "keypoints": torch.cat([keypoints, logits.sigmoid()[..., None]], -1) * real}

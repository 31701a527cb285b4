"""Pre-training by the prediction of clusters of hidden frames (Hsu et al. 2021, arXiv:2106.07447, section II).

Every frame of a recording belongs to a cluster, found before. The network predicts the clusters of hidden frames from the frames
around them.
Shapes: B recordings, N samples, S frames of the network, T frames with clusters, K clusters, H hidden frames of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.hidden_frames import HiddenFrames, sum_rows, to_full_precision


def align_frames(frames: int, field: int, stride: int, first: float, step: float) -> Tensor:  # -> S int64
    """Return for each frame of a network the clustered frame whose middle is nearest to its own, the earlier one of two.

    `field` is the number of samples that a frame of the network covers, `stride` the samples between frames; the middle of
    clustered frame t is at sample `first + t * step`.
    """
    middle = torch.arange(frames, dtype=torch.float64) * stride + field / 2
    return ((middle - first) / step - 0.5).ceil().long().clamp(min=0)


class MaskedClusters(HiddenFrames):
    """Mean cross-entropy of the clusters of hidden frames (equation 2 with alpha = 1), for a network with output type "clusters".

    Batches hold `clusters` (B T int64, -1 after the last) in addition to the network's `inputs`; the middle of frame t of T is at
    sample `first + t * step`. `hidden` and `seed` are those of `HiddenFrames`.
    """

    share: ClassVar[float] = 0.08  # section IV.C

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[str] = ("waveform", "lengths"),
        *,
        first: float,
        step: float,
        share: float | None = None,
        length: int | None = None,
        penalty: float = 0.0,
    ):
        super().__init__(model, inputs, share=share, length=length, penalty=penalty)
        self.first, self.step = first, step

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        batch = self.hide(batch)
        logits, target, convolved = self.compute_logits(batch)
        count = max(len(target), 1)
        nats = F.cross_entropy(logits, target, reduction="sum") / count
        magnitude = self.penalize(convolved, batch)
        right = (logits.argmax(-1) == target).sum() / count
        return {
            "loss": nats + self.penalty * magnitude,
            "nats": nats.detach(),
            "magnitude": magnitude.detach(),
            "accuracy": right,
        }

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `nats`, `right` (correct predictions) and `count`, summed over the hidden frames of each row, and how often each
        cluster is predicted, `used`: B, B, B, B 1 K.
        """
        batch = self.hide(batch)
        logits, target, _ = self.compute_logits(batch)
        best, hidden = logits.argmax(-1), batch["hidden"]
        nats = F.cross_entropy(logits, target, reduction="none")
        used = F.one_hot(best, logits.shape[-1]).to(logits.dtype)
        return {
            "nats": sum_rows(nats, hidden),
            "right": sum_rows((best == target).to(logits.dtype), hidden),
            "count": hidden.sum(1),
            "used": sum_rows(used, hidden)[:, None],
        }

    def compute_logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits and the clusters of the hidden frames, H K and H, and the output of the convolutions, B S C."""
        hidden = batch["hidden"]
        states, convolved = self.model.encode_hidden(*(batch[name] for name in self.inputs), hidden)
        target = self.align(batch, hidden.shape[1])
        return to_full_precision(self.model.clusters(states[hidden])), target[hidden], convolved

    def align(self, batch: dict[str, Tensor], frames: int) -> Tensor:  # -> B S int64
        """Return the cluster of each frame of the network; frames near the end of a recording get its last one."""
        clusters = batch["clusters"]
        places = align_frames(frames, self.model.field, self.model.stride, self.first, self.step).to(clusters.device)
        last = (clusters >= 0).sum(1, keepdim=True) - 1
        return clusters.gather(1, torch.minimum(places.expand(len(clusters), -1), last.clamp(min=0)))

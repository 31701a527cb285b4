"""CTC: a network says a symbol or nothing at each frame; any way of stretching a transcript over the frames is right.

Graves et al. 2006, "Connectionist Temporal Classification". The loss is the negative logarithm of the probability of all
alignments that collapse (repeats first, then blanks) to the transcript. How such answers are read is in
`fieldguide.objectives.ctc_decoding`.
Shapes: B recordings, S frames of the network's answer, L symbols of a transcript, V symbols with the blank, 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective

BLANK = 0


def min_frames(target: Tensor, lengths: Tensor) -> Tensor:  # B L, B -> B
    """The fewest frames that a transcript fits in: one a symbol, and a blank between two that are the same."""
    second = torch.arange(1, target.shape[1], device=target.device) < lengths[:, None]
    return lengths + ((target[:, 1:] == target[:, :-1]) & second).sum(1)


def compute_log_probabilities(logits: Tensor) -> Tensor:  # B S V -> B S V
    """At least in float32: sums over hundreds of frames are no work for bfloat16."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def compute_losses(logits: Tensor, frames: Tensor, target: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(B, B bool): negative log-likelihood of each transcript, and whether it fits. Of one that does not, the loss is
    infinite; here it is 0, without gradient, for the caller to count."""
    nll = F.ctc_loss(
        compute_log_probabilities(logits).transpose(0, 1), target, frames, lengths, BLANK, "none", zero_infinity=True
    )
    return nll, min_frames(target, lengths) <= frames


class CTC(Objective):
    """A network that gives "ctc", and transcripts: batches hold `target` (B L int64, padded with 0) and
    `target_lengths` (B int64) beside the network's `inputs`, of which `lengths` are the real frames.

    The loss is the mean over transcripts of the loss a symbol, so that long ones do not outweigh short ones. A transcript
    with more symbols than the network has frames is impossible: it teaches nothing, and their share is returned as
    `impossible`, not hidden. A smaller hop, or larger symbols, make them possible.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[str] = ("features", "lengths")):
        super().__init__()
        self.model, self.inputs = model, tuple(inputs)

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        logits, frames = self.compute_logits(batch)
        nll, possible = compute_losses(logits, frames, batch["target"], batch["target_lengths"])
        each = nll / batch["target_lengths"].clamp(min=1)
        return {"loss": each.sum() / possible.sum().clamp(min=1), "impossible": 1 - possible.float().mean()}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`path` (B S int64: the likeliest symbol of each frame, -1 after the last), `frames` (B), `sure` (B: geometric
        mean of the path's probabilities) and, where there are transcripts, `loss` (B: per symbol, NaN if impossible)."""
        logits, frames = self.compute_logits(batch)
        best, path = compute_log_probabilities(logits).max(-1)
        real = torch.arange(path.shape[1], device=path.device) < frames[:, None]
        answer = {
            "path": path.masked_fill(~real, -1),
            "frames": frames,
            "sure": ((best * real).sum(1) / frames.clamp(min=1)).exp(),
        }
        if "target" in batch:
            nll, possible = compute_losses(logits, frames, batch["target"], batch["target_lengths"])
            answer["loss"] = (nll / batch["target_lengths"].clamp(min=1)).masked_fill(~possible, torch.nan)
        return answer

    def compute_logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(B S V, B): the network's answer and the real frames of it."""
        return self.model(*(batch[name] for name in self.inputs)), self.model.frames(batch["lengths"])

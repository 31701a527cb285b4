"""CTC objective (Graves et al. 2006, "Connectionist Temporal Classification").

The network predicts a symbol or a blank at each frame. The loss is the negative log-probability of all alignments that
collapse to the transcript (repeats are merged first, then blanks are removed). Decoding is in
`fieldguide.objectives.ctc_decoding`.
Shapes: B recordings, S output frames, L symbols of a transcript, V symbols including the blank, which is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective

BLANK = 0


def min_frames(target: Tensor, lengths: Tensor) -> Tensor:  # B L, B -> B
    """Return the minimum number of frames of each transcript: one per symbol, plus a blank between equal neighbors."""
    second = torch.arange(1, target.shape[1], device=target.device) < lengths[:, None]
    return lengths + ((target[:, 1:] == target[:, :-1]) & second).sum(1)


def compute_log_probabilities(logits: Tensor) -> Tensor:  # B S V -> B S V
    """Return log-probabilities in float32 or better, because bfloat16 is too coarse for sums over hundreds of frames."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def compute_losses(logits: Tensor, frames: Tensor, target: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood of each transcript (B) and whether it fits into its frames (B bool).

    The loss of a transcript that does not fit is infinite; it is returned as 0, without gradient.
    """
    nll = F.ctc_loss(
        compute_log_probabilities(logits).transpose(0, 1), target, frames, lengths, BLANK, "none", zero_infinity=True
    )
    return nll, min_frames(target, lengths) <= frames


class CTC(Objective):
    """CTC loss for a network with output type "ctc".

    Batches hold `target` (B L int64, padded with 0) and `target_lengths` (B int64) in addition to the network's `inputs`,
    of which `lengths` is the number of real frames.

    The loss of each transcript is divided by its number of symbols and averaged over transcripts, so that long ones do
    not dominate. A transcript that needs more frames than the network outputs does not contribute; the fraction of such
    transcripts is returned as `impossible`. A smaller hop or larger symbols make them fit.
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
        """Return `path` (B S int64: the most likely symbol of each frame, -1 after the last), `frames` (B), `sure` (B:
        geometric mean of the path's probabilities) and, if the batch has transcripts, `loss` (B: per symbol, NaN if the
        transcript does not fit)."""
        logits, frames = self.compute_logits(batch)
        best, path = compute_log_probabilities(logits).max(-1)
        real = torch.arange(path.shape[1], device=path.device) < frames[:, None]
        outputs = {
            "path": path.masked_fill(~real, -1),
            "frames": frames,
            "sure": ((best * real).sum(1) / frames.clamp(min=1)).exp(),
        }
        if "target" in batch:
            nll, possible = compute_losses(logits, frames, batch["target"], batch["target_lengths"])
            outputs["loss"] = (nll / batch["target_lengths"].clamp(min=1)).masked_fill(~possible, torch.nan)
        return outputs

    def compute_logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits (B S V) and the number of real frames of each row (B)."""
        return self.model(*(batch[name] for name in self.inputs)), self.model.frames(batch["lengths"])

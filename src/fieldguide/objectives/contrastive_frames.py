"""Contrastive pre-training on unlabeled speech (Baevski et al. 2020, arXiv:2006.11477, section 3).

Frames of a recording are hidden from the Transformer. For each, the network must tell the quantized vector of the frame from those
of other hidden frames of the same recording; a second term asks for an even use of the codebooks.
Shapes: B recordings, N samples, S frames, K distractors, E width of the comparison, G codebooks of V entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective

START_TEMPERATURE, END_TEMPERATURE, DECAY = 2.0, 0.5, 0.999995  # of the Gumbel softmax, per step (section 4.2)


def sample_hidden_frames(
    counts: Tensor, width: int, generator: torch.Generator | None = None, share: float = 0.065, length: int = 10
) -> Tensor:  # B -> B S bool
    """Return the frames to hide: a fraction `share` of a recording's frames, without replacement and rounded up or down at random,
    begin a span of `length` frames; spans may overlap (section 3.1). With the defaults, 49 % of long recordings are hidden.

    A recording with at least two frames has at least two hidden ones, since each needs a distractor.
    """
    length = max(1, min(length, int(counts.min()) if len(counts) else 1))
    places = torch.arange(width)
    spans = (share * counts + torch.rand(len(counts), generator=generator)).floor().clamp(min=1)
    starts = (counts - length + 1).clamp(min=1)  # where a span may begin
    drawn = torch.rand(len(counts), width, generator=generator).masked_fill(places >= starts[:, None], -1.0)
    begins = (drawn.argsort(1, descending=True).argsort(1) < torch.minimum(spans, starts)[:, None]).float()
    reached = F.pad(begins.cumsum(1), (length, 0))
    hidden = (reached[:, length:] - reached[:, :width] > 0) & (places < counts[:, None])
    alone = (hidden.sum(1) == 1) & (counts > 1)
    hidden[alone, :2] = True
    return hidden


def sample_distractors(hidden: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:  # B S -> B S K int64
    """Return for each hidden frame the places of `count` other hidden frames of the same recording, uniformly with replacement.

    Frames that are not hidden get 0, and so does the only hidden frame of a recording.
    """
    rows, width = hidden.shape
    total = hidden.sum(1)  # B
    order = hidden.long().cumsum(1) - 1  # place among the hidden frames of the row
    drawn = torch.rand(rows, width, count, generator=generator)
    other = (drawn * (total - 1).clamp(min=1)[:, None, None]).long()
    other = (other + (other >= order[..., None])).clamp(max=(total - 1).clamp(min=0)[:, None, None])  # never the frame itself
    places = hidden.long().argsort(dim=1, descending=True, stable=True)  # B S: places of the hidden frames first
    chosen = places.gather(1, other.flatten(1)).view(rows, width, count)
    return chosen.masked_fill(~hidden[..., None] | (total < 2)[:, None, None], 0)


class ContrastiveFrames(Objective):
    """Contrastive and diversity loss of a network with output type "contexts", per hidden frame.

    Batches hold `hidden` (B S bool) and `distractors` (B S K int64, places in the same recording), see `sample_hidden_frames` and
    `sample_distractors`, in addition to the network's `inputs`. A distractor with the same quantized vector as the frame does not
    count. The temperature of the quantizer falls with each training step.
    """

    steps: Tensor

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[str] = ("waveform", "lengths"),
        temperature: float = 0.1,
        diversity: float = 0.1,
    ):
        super().__init__()
        self.model, self.inputs = model, tuple(inputs)
        self.temperature, self.diversity = temperature, diversity
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        if self.training:
            self.model.quantizer.temperature = max(START_TEMPERATURE * DECAY ** int(self.steps), END_TEMPERATURE)
            self.steps += 1
        logits, probabilities = self.compare(batch)
        count = max(len(logits), 1)
        contrast = F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64), reduction="sum") / count
        mean = probabilities.flatten(0, 1)[batch["hidden"].flatten()].sum(0) / count  # G V
        perplexity = torch.exp(-torch.xlogy(mean, mean).sum(-1)).sum()
        unused = 1 - perplexity / mean.numel()
        right = (logits[:, 1:].amax(1) < logits[:, 0]).float().sum() / count if logits.shape[1] > 1 else contrast.new_ones(())
        return {
            "loss": contrast + self.diversity * unused,
            "contrast": contrast.detach(),
            "perplexity": perplexity.detach(),
            "accuracy": right,
        }

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `nats` and `right` (choices of the right vector), summed over the hidden frames of each row, and their `count`."""
        logits, _ = self.compare(batch)
        rows = batch["hidden"].nonzero()[:, 0]
        nats = F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64), reduction="none")
        sums = lambda x: x.new_zeros(len(batch["hidden"])).index_add_(0, rows, x)
        right = (logits[:, 1:].amax(1) < logits[:, 0]).long()
        return {"nats": sums(nats), "right": sums(right), "count": batch["hidden"].sum(1)}

    def compare(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return for each of the H hidden frames the similarity to its own vector, then to its distractors, divided by the
        temperature: H 1+K; and the probabilities of the codebooks' entries, B S G V."""
        hidden = batch["hidden"]
        contexts, targets, probabilities = self.model.contrast(*(batch[name] for name in self.inputs), hidden)
        row, place = hidden.nonzero(as_tuple=True)
        own, others = targets[row, place], targets[row[:, None], batch["distractors"][row, place]]  # H E, H K E
        choices = torch.cat([own[:, None], others], 1).float()
        logits = F.cosine_similarity(contexts[row, place][:, None].float(), choices, -1) / self.temperature
        same = (others == own[:, None]).all(-1)
        return torch.cat([logits[:, :1], logits[:, 1:].masked_fill(same, -torch.inf)], 1), probabilities

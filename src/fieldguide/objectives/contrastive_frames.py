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

from fieldguide.objectives.hidden_frames import HiddenFrames, sum_rows, to_full_precision

START_TEMPERATURE, END_TEMPERATURE = 2.0, 0.5  # of the Gumbel softmax (section 4.2)
# Fraction of the steps over which the temperature falls. The published factor of 0.999995 per step takes 277,000 of 400,000 steps.
ANNEALED_FRACTION = 0.7
DISTRACTORS = 100  # of each hidden frame


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


class ContrastiveFrames(HiddenFrames):
    """Contrastive and diversity loss of a network with output type "contexts", per hidden frame.

    Batches hold what `HiddenFrames` says, and may hold `distractors` (B S K int64, places in the same recording), see
    `sample_distractors`. A distractor with the same quantized vector as the frame does not count in the loss. The temperature of the
    quantizer falls geometrically during the first part of training, and stays then.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[str] = ("waveform", "lengths"),
        *,
        temperature: float = 0.1,
        diversity: float = 0.1,
        distractors: int = DISTRACTORS,
        share: float | None = None,
        length: int | None = None,
        penalty: float = 0.0,
    ):
        super().__init__(model, inputs, share=share, length=length, penalty=penalty)
        self.temperature, self.diversity, self.distractors = temperature, diversity, distractors

    def draw(self, counts: Tensor, width: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        drawn = super().draw(counts, width, generator)
        return {**drawn, "distractors": sample_distractors(drawn["hidden"], self.distractors, generator)}

    @property
    def gumbel_temperature(self) -> float:
        """Return the temperature of the quantizer at the present step."""
        fall = min(self.progress / ANNEALED_FRACTION, 1.0)
        return START_TEMPERATURE * (END_TEMPERATURE / START_TEMPERATURE) ** fall

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        batch = self.hide(batch)
        if self.training:
            self.model.quantizer.temperature = self.gumbel_temperature
        logits, probabilities, convolved = self.compare(batch)
        count = max(len(logits), 1)
        contrast = F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64), reduction="sum") / count
        mean = probabilities[batch["hidden"]].sum(0) / count  # G V
        perplexity = torch.exp(-torch.xlogy(mean, mean).sum(-1)).sum()
        unused = 1 - perplexity / mean.numel()
        losses = {
            "loss": contrast + self.diversity * unused,
            "contrast": contrast.detach(),
            "perplexity": perplexity.detach(),
            "accuracy": find_right(logits).sum() / count,
        }
        if self.penalty:
            magnitude = self.penalize(convolved, batch)
            losses |= {"loss": losses["loss"] + self.penalty * magnitude, "magnitude": magnitude.detach()}
        return losses

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `nats` and `right` (choices of the right vector, see `find_right`), summed over the hidden frames of each row,
        their `count`, and how often each entry of the codebooks is chosen, `used`: B, B, B, B G V.
        """
        batch = self.hide(batch)
        logits, probabilities, _ = self.compare(batch)
        hidden = batch["hidden"]
        nats = F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64), reduction="none")
        return {
            "nats": sum_rows(nats, hidden),
            "right": sum_rows(find_right(logits), hidden),
            "count": hidden.sum(1),
            "used": sum_rows(probabilities[hidden], hidden),
        }

    def compare(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return for each of the H hidden frames the similarity to its own vector, then to its distractors, divided by the
        temperature: H 1+K; the probabilities of the codebooks' entries, B S G V; and the output of the convolutions, B S C."""
        hidden = batch["hidden"]
        contexts, targets, probabilities, convolved = self.model.contrast(*(batch[name] for name in self.inputs), hidden)
        row, place = hidden.nonzero(as_tuple=True)
        own, others = targets[row, place], targets[row[:, None], batch["distractors"][row, place]]  # H E, H K E
        choices = to_full_precision(torch.cat([own[:, None], others], 1))
        logits = F.cosine_similarity(to_full_precision(contexts[row, place])[:, None], choices, -1) / self.temperature
        same = (others == own[:, None]).all(-1)
        logits = torch.cat([logits[:, :1], logits[:, 1:].masked_fill(same, -torch.inf)], 1)
        return logits, probabilities, convolved


def find_right(logits: Tensor) -> Tensor:  # H 1+K -> H
    """Return for each frame the probability that its own vector, the first choice, is chosen: 0 if another one is more similar, and
    one of 1 + n if n distractors have the same vector.

    So a quantizer that uses a single code scores no better than chance.
    """
    others = logits[:, 1:]
    same = (others == -torch.inf).sum(1)
    is_best = (logits[:, :1] > others).all(1)
    return is_best.to(logits.dtype) / (1 + same)

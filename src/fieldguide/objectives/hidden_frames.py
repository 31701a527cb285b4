"""Base of the pre-training objectives on unlabeled speech: which frames are hidden, and the penalty on the convolutions' output.

Shapes: B recordings, N samples, S frames, C width of the convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective


def sample_hidden_frames(
    counts: Tensor, width: int, generator: torch.Generator | None = None, share: float = 0.065, length: int = 10
) -> Tensor:  # B -> B S bool
    """Return the frames to hide: a fraction `share` of a recording's frames, without replacement and rounded up or down at random,
    begin a span of `length` frames; spans may overlap (Baevski et al. 2020, arXiv:2006.11477, section 3.1). With the defaults, 49 %
    of long recordings are hidden.

    At least one span is hidden. Spans are shorter in recordings that have fewer frames. A recording with at least two frames has at
    least two hidden ones, since each needs a distractor.
    """
    lengths = counts.clamp(min=1, max=max(1, length))  # B: frames of a span
    places = torch.arange(width)
    spans = (share * counts + torch.rand(len(counts), generator=generator)).floor().clamp(min=1)
    starts = (counts - lengths + 1).clamp(min=1)  # where a span may begin
    drawn = torch.rand(len(counts), width, generator=generator).masked_fill(places >= starts[:, None], -1.0)
    begins = drawn.argsort(1, descending=True).argsort(1) < torch.minimum(spans, starts)[:, None]
    begun = F.pad(begins.long().cumsum(1), (1, 0))  # B S+1: spans that begin before each place
    ended = begun.gather(1, (places - lengths[:, None] + 1).clamp(min=0))  # those that begin too early to reach it
    hidden = (begun[:, 1:] > ended) & (places < counts[:, None])
    alone = (hidden.sum(1) == 1) & (counts > 1)
    hidden[alone, :2] = True
    return hidden


class HiddenFrames(Objective):
    """An objective that hides frames of recordings from the Transformer of `model`.

    Batches hold the network's `inputs` and, for examples that are scored, `seed` (B int64), which determines what is hidden in each
    recording; in training, torch's global generator of the CPU does. Batches may hold `hidden` (B S bool) themselves.

    The loss contains `penalty` times the mean square of the convolutions' output before normalization (arXiv:2006.11477, section
    4.2). The authors also multiply the gradients of the convolutions by 0.1, which Adam undoes.
    """

    share: ClassVar[float] = 0.065  # default fraction of the frames that begin a hidden span
    length: ClassVar[int] = 10  # default frames of a span

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[str] = ("waveform", "lengths"),
        *,
        share: float | None = None,
        length: int | None = None,
        penalty: float = 0.0,
    ):
        super().__init__()
        self.model, self.inputs, self.penalty = model, tuple(inputs), penalty
        self.hidden_share = self.share if share is None else share
        self.span_length = self.length if length is None else length

    def hide(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch with `hidden`, and what else the subclass draws for the hidden frames."""
        if "hidden" in batch:
            return batch
        counts, width = self.model.frames(batch["lengths"]).cpu(), max(1, self.model.frames(batch["waveform"].shape[1]))
        if self.training or "seed" not in batch:
            drawn = self.draw(counts, width, None)
        else:  # independent of the other recordings of the batch, also of its width
            rows = []
            for count, seed in zip(counts, batch["seed"].tolist()):
                rows.append(self.draw(count[None], max(1, int(count)), torch.Generator().manual_seed(seed)))
            drawn = {name: torch.cat([pad_frames(row[name], width) for row in rows]) for name in rows[0]}
        return {**batch, **{name: x.to(batch["waveform"].device) for name, x in drawn.items()}}

    def draw(self, counts: Tensor, width: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Return random tensors, B S ... each, for recordings with B `counts` of frames: `hidden`, and what else is drawn."""
        return {"hidden": sample_hidden_frames(counts, width, generator, self.hidden_share, self.span_length)}

    def penalize(self, convolved: Tensor, batch: dict[str, Tensor]) -> Tensor:  # B S C -> scalar
        """Return the mean square of the convolutions' output over the real frames."""
        frames = self.model.frames(batch["lengths"])
        real = torch.arange(convolved.shape[1], device=convolved.device) < frames[:, None]
        squares = (to_full_precision(convolved).square().mean(-1) * real).sum()
        return squares / frames.sum().clamp(min=1)

    @torch.no_grad()
    def predict_codes(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `codes` (B S G int64): what each frame is, one number for each of G codebooks; -1 after the last frame."""
        codes = self.model.predict_codes(*(batch[name] for name in self.inputs))
        real = torch.arange(codes.shape[1], device=codes.device) < self.model.frames(batch["lengths"])[:, None]
        return {"codes": codes.masked_fill(~real[..., None], -1)}


def pad_frames(x: Tensor, width: int) -> Tensor:  # B s ... -> B S ...
    """Return a tensor with zeros after its frames."""
    return F.pad(x, (*[0, 0] * (x.ndim - 2), 0, width - x.shape[1]))


def sum_rows(x: Tensor, hidden: Tensor) -> Tensor:  # H ..., B S bool -> B ...
    """Return the sums of the values of the hidden frames, which are in the order of `hidden.nonzero()`, of each recording."""
    return x.new_zeros(len(hidden), *x.shape[1:]).index_add_(0, hidden.nonzero()[:, 0], x)


def to_full_precision(x: Tensor) -> Tensor:
    """Return a tensor in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

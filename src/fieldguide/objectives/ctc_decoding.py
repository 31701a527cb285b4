"""Decoding and alignment of CTC outputs.

`collapse` is greedy decoding of the most likely symbol of each frame; `beam_search` sums over alignments and can use a
language model; `align` finds the frames of a known transcript; `compute_logits_in_chunks` processes a recording of any
length in pieces.
Shapes: B recordings, S frames, L symbols of a transcript, V symbols including the blank, which is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.ctc import BLANK

LOG_ZERO = -math.inf
Prefix = tuple[int, ...]


def collapse(path: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:  # B S, B -> B N, B
    """Merge repeats, then remove blanks. Return the symbols, padded with 0, and the number of symbols of each row."""
    real = torch.arange(path.shape[1], device=path.device) < frames[:, None]
    before = torch.nn.functional.pad(path[:, :-1], (1, 0), value=BLANK)
    emitted = real & (path != BLANK) & (path != before)
    count = emitted.sum(1)
    out = path.new_zeros(len(path), int(count.max()) if len(path) else 0)
    out[torch.arange(out.shape[1], device=path.device) < count[:, None]] = path[emitted]
    return out, count


@dataclass(frozen=True)
class Hypothesis:
    """A decoded symbol sequence with its scores."""

    symbols: Prefix
    log_probability: float  # sum over the alignments that the search kept
    score: float  # including language model and bonus; hypotheses are ranked by it


def beam_search(
    log_probabilities: Tensor,
    width: int = 16,
    *,
    symbols: int | None = None,
    language: Callable[[Prefix, int], float] | None = None,
    weight: float = 1.0,
    bonus: float = 0.0,
    ends: bool = False,
) -> list[Hypothesis]:  # S V -> the best `width`, best first
    """Return the best hypotheses of one recording by prefix beam search in log space (Hannun et al. 2014,
    arXiv:1408.2873, algorithm 1).

    For each prefix the search keeps the probability of the alignments that end in a blank and of those that do not, and
    sums alignments of the same prefix, while `collapse` follows a single alignment. The result is exact if `width` is
    large enough and `symbols` is None.

    Args:
        width: number of prefixes to keep.
        symbols: number of most likely symbols per frame that may extend a prefix; None tries all.
        language: `language(prefix, symbol)` returns the log-probability that the symbol follows the prefix.
        weight: factor of the language model's log-probabilities.
        bonus: score added per symbol, to offset the language model's preference for short transcripts.
        ends: `language(prefix, 0)` is the log-probability that the transcript ends, which is added in the last frame.

    Raises:
        SettingsError: if `width` is below 1.
    """
    if width < 1:
        raise SettingsError(f"width={width} must be at least 1")
    vocab = log_probabilities.shape[1]
    candidates_by_frame = (log_probabilities[:, 1:].topk(min(symbols or vocab, vocab - 1)).indices + 1).tolist()
    rows = log_probabilities.double().tolist()
    beam: dict[Prefix, tuple[float, float]] = {
        (): (0.0, LOG_ZERO)
    }  # log-probability of alignments that end in a blank, and of the others
    extra: dict[Prefix, float] = {(): 0.0}

    def rank(entry: tuple[Prefix, tuple[float, float]]) -> float:
        return log_add(*entry[1]) + extra[entry[0]]

    for row, candidates in zip(rows, candidates_by_frame):
        after: dict[Prefix, tuple[float, float]] = {}
        for prefix, (blank, symbol) in beam.items():
            both = log_add(blank, symbol)
            b, s = after.get(prefix, (LOG_ZERO, LOG_ZERO))
            repeated = symbol + row[prefix[-1]] if prefix else LOG_ZERO
            after[prefix] = log_add(b, both + row[BLANK]), log_add(s, repeated)
            for c in candidates:
                longer = (*prefix, c)
                # A repeated symbol starts a new one only after a blank.
                gain = (blank if prefix and c == prefix[-1] else both) + row[c]
                if gain == LOG_ZERO:
                    continue
                if longer not in extra:
                    extra[longer] = extra[prefix] + bonus + (weight * language(prefix, c) if language else 0.0)
                b, s = after.get(longer, (LOG_ZERO, LOG_ZERO))
                after[longer] = b, log_add(s, gain)
        beam = dict(sorted(after.items(), key=rank, reverse=True)[:width])
        extra = {prefix: extra[prefix] for prefix in beam}
    if ends and language:
        extra = {prefix: score + weight * language(prefix, BLANK) for prefix, score in extra.items()}
    found = [Hypothesis(prefix, log_add(*last), log_add(*last) + extra[prefix]) for prefix, last in beam.items()]
    return sorted(found, key=lambda hypothesis: hypothesis.score, reverse=True)


def log_add(a: float, b: float) -> float:
    """Return log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    return a if b == LOG_ZERO else a + math.log1p(math.exp(b - a))


@dataclass(frozen=True)
class Alignment:
    """Frames of each symbol of a batch of transcripts."""

    spans: Tensor  # B L 2 int64: first frame of each symbol, and the frame after its last; -1 for padding
    confidence: Tensor  # B L: geometric mean of a symbol's probability over its frames; 0 for padding
    score: Tensor  # B: log-probability of the whole path; -inf if the transcript does not fit


@torch.no_grad()
def align(log_probabilities: Tensor, frames: Tensor, target: Tensor, lengths: Tensor) -> Alignment:
    """Return the most likely alignment of each transcript with its frames (Viterbi over the CTC states), batched.

    The states are blank, first symbol, blank, second symbol, ..., blank. From one frame to the next a path stays,
    advances by one, or advances by two from a symbol to a different one.

    Args:
        log_probabilities: B S V.
        frames: B, number of real frames.
        target: B L symbols; the padding may hold anything.
        lengths: B, number of symbols.
    """
    rows, steps, _ = log_probabilities.shape
    longest = target.shape[1]
    states = torch.full((rows, 2 * longest + 1), BLANK, device=target.device)
    states[:, 1::2] = target.where(torch.arange(longest, device=target.device) < lengths[:, None], BLANK)
    skips = torch.zeros_like(states, dtype=torch.bool)
    skips[:, 2:] = (states[:, 2:] != BLANK) & (states[:, 2:] != states[:, :-2])
    emissions = log_probabilities.gather(2, states[:, None].expand(-1, steps, -1))  # B S 2L+1
    best = emissions.new_full(states.shape, LOG_ZERO)
    best[:, 0] = 0.0  # before the first frame, so that a path can start in state 0 or 1
    moves = torch.zeros(steps, *states.shape, dtype=torch.int64, device=target.device)
    for t in range(steps):
        one = torch.nn.functional.pad(best[:, :-1], (1, 0), value=LOG_ZERO)
        two = torch.nn.functional.pad(best[:, :-2], (2, 0), value=LOG_ZERO)[:, : best.shape[1]]
        two = two.masked_fill(~skips, LOG_ZERO)
        top, moves[t] = torch.stack([best, one, two]).max(0)
        best = (top + emissions[:, t]).where((t < frames)[:, None], best)
    last = 2 * lengths[:, None]  # a path ends in the last symbol or in the blank after it
    ends = torch.cat([last, (last - 1).clamp(min=0)], 1)
    score, which = best.gather(1, ends).max(1)
    state = ends.gather(1, which[:, None])
    path = torch.full((rows, steps), -1, device=target.device)
    for t in reversed(range(steps)):
        real = (t < frames)[:, None]
        path[:, t : t + 1] = state.where(real, -1)
        state = (state - moves[t].gather(1, state)).where(real, state).clamp(min=0)
    symbol = ((path - 1) // 2).where(
        (path > 0) & (path % 2 == 1) & score.isfinite()[:, None], longest
    )  # index of the spare column
    place = torch.arange(steps, device=target.device).expand(rows, -1)
    spare = lambda value: torch.full((rows, longest + 1), value, device=target.device)
    first = spare(steps).scatter_reduce(1, symbol, place, "amin")[:, :longest]
    end = spare(-1).scatter_reduce(1, symbol, place, "amax")[:, :longest] + 1
    none = end == 0
    along = emissions.gather(2, path.clamp(min=0)[..., None])[..., 0]
    mean = along.new_zeros(rows, longest + 1).scatter_add(1, symbol, along)[:, :longest] / (end - first).clamp(min=1)
    spans = torch.stack([first, end], -1).masked_fill(none[..., None], -1)
    return Alignment(spans, mean.exp().masked_fill(none, 0.0), score)


def stitch_chunks(chunks: Tensor, overlap: int, total: int) -> Tensor:  # C S V -> total V
    """Join the outputs of chunks that each start S - overlap frames after the previous one.

    In the frames that two chunks share, each chunk contributes the half that is farther from its own edge. `overlap` must
    be even.
    """
    _, steps, vocab = chunks.shape
    half = overlap // 2
    middle = chunks[:, half : steps - half].reshape(-1, vocab)
    return torch.cat([chunks[0, :half], middle, chunks[-1, steps - half :]])[:total]


class FrameModel(Protocol):
    """A network that reads a signal and returns logits for each frame."""

    @property
    def stride(self) -> int:
        """Steps of the signal per frame."""

    def frames(self, steps: Tensor, /) -> Tensor:
        """Return the number of frames of signals with these numbers of steps."""

    def __call__(self, signal: Tensor, length: Tensor, /) -> Tensor:  # B T *, B -> B S V
        """Return the logits."""


@torch.no_grad()
def compute_logits_in_chunks(
    model: FrameModel, signal: Tensor, *, size: int, overlap: int, batch: int = 8
) -> Tensor:  # T * -> S V
    """Return the logits of one long recording, computed in overlapping chunks of `size` steps, `batch` chunks at a time.

    The result equals that of the whole recording if the receptive field reaches less than half of the overlap to each
    side. Attention reaches further: it sees each chunk as a separate recording. Memory grows linearly with the length of
    the recording.

    Raises:
        SettingsError: if `size` or half of `overlap` is not a multiple of `model.stride`, so that the frames of the
            chunks would not coincide, or if `overlap` is not smaller than `size`.
    """
    stride = model.stride
    if size % stride or overlap % (2 * stride) or not 0 <= overlap < size:
        raise SettingsError(
            f"size={size} must be a multiple of {stride} and larger than overlap={overlap}, a multiple of {2 * stride}"
        )
    length, hop, total = len(signal), size - overlap, int(model.frames(torch.tensor(len(signal))))
    count = max(1, math.ceil((length - overlap) / hop))
    signal = torch.nn.functional.pad(signal, (*[0, 0] * (signal.ndim - 1), 0, (count - 1) * hop + size - length))
    chunks = signal.unfold(0, size, hop).movedim(-1, 1)  # C size *
    lengths = (length - hop * torch.arange(count, device=signal.device)).clamp(max=size)
    outputs = torch.cat([model(chunks[i : i + batch], lengths[i : i + batch]) for i in range(0, count, batch)])
    outputs = torch.nn.functional.pad(outputs, (0, 0, 0, size // stride - outputs.shape[1]))
    return stitch_chunks(outputs, overlap // stride, total)

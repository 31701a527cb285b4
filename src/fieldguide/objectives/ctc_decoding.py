"""Alignments: what the answers of a CTC network say, and when each symbol was said.

`collapse` reads the likeliest symbol of each frame; `beam_search` sums over alignments and may ask a language model;
`align` finds the frames of a known transcript; `in_chunks` hears a recording of any length piece by piece.
Shapes: B recordings, S frames, L symbols of a transcript, V symbols with the blank, 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.ctc import BLANK

LOG_ZERO = -math.inf
Prefix = tuple[int, ...]


def collapse(path: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:  # B S, B -> B N, B
    """Repeats made one, then blanks dropped: symbols padded with 0, and how many each row has."""
    real = torch.arange(path.shape[1], device=path.device) < frames[:, None]
    before = torch.nn.functional.pad(path[:, :-1], (1, 0), value=BLANK)
    said = real & (path != BLANK) & (path != before)
    count = said.sum(1)
    out = path.new_zeros(len(path), int(count.max()) if len(path) else 0)
    out[torch.arange(out.shape[1], device=path.device) < count[:, None]] = path[said]
    return out, count


@dataclass(frozen=True)
class Hypothesis:
    symbols: Prefix
    log_probability: float  # of all its alignments that the search kept
    score: float  # with language model and bonus; what ranks it


def beam_search(
    log_probabilities: Tensor,
    width: int = 16,
    *,
    symbols: int | None = None,
    language: Callable[[Prefix, int], float] | None = None,
    weight: float = 1.0,
    bonus: float = 0.0,
) -> list[Hypothesis]:  # S V -> the best `width`, best first
    """Prefix beam search (Hannun et al. 2014, arXiv:1408.2873, algorithm 1), in logarithms, for one recording.

    A prefix carries the probability of its alignments that end in a blank and of those that do not; those that write the
    same are added, where `collapse` follows a single one. `symbols` are the likeliest of each frame that may extend a
    prefix; None tries all. `language(prefix, symbol)` is the logarithm of the probability that the symbol follows; it
    counts `weight` times. `bonus` is given for each symbol, against the language model's liking for few. With
    enough width and all symbols the result is exact.
    """
    if width < 1:
        raise SettingsError(f"width={width}: a search keeps at least one prefix")
    vocab = log_probabilities.shape[1]
    likely = log_probabilities[:, 1:].topk(min(symbols or vocab, vocab - 1)).indices + 1
    rows, likely = log_probabilities.double().tolist(), likely.tolist()
    beam: dict[Prefix, tuple[float, float]] = {(): (0.0, LOG_ZERO)}  # ends in a blank, does not
    extra: dict[Prefix, float] = {(): 0.0}

    def rank(entry: tuple[Prefix, tuple[float, float]]) -> float:
        return log_add(*entry[1]) + extra[entry[0]]

    for row, candidates in zip(rows, likely):
        after: dict[Prefix, tuple[float, float]] = {}
        for prefix, (blank, symbol) in beam.items():
            both = log_add(blank, symbol)
            b, s = after.get(prefix, (LOG_ZERO, LOG_ZERO))
            repeated = symbol + row[prefix[-1]] if prefix else LOG_ZERO
            after[prefix] = log_add(b, both + row[BLANK]), log_add(s, repeated)
            for c in candidates:
                longer = (*prefix, c)
                # The same symbol again begins a new one only after a blank.
                gain = (blank if prefix and c == prefix[-1] else both) + row[c]
                if gain == LOG_ZERO:
                    continue
                if longer not in extra:
                    extra[longer] = extra[prefix] + bonus + (weight * language(prefix, c) if language else 0.0)
                b, s = after.get(longer, (LOG_ZERO, LOG_ZERO))
                after[longer] = b, log_add(s, gain)
        beam = dict(sorted(after.items(), key=rank, reverse=True)[:width])
        extra = {prefix: extra[prefix] for prefix in beam}
    return [Hypothesis(prefix, log_add(*ends), log_add(*ends) + extra[prefix]) for prefix, ends in beam.items()]


def log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))"""
    if a < b:
        a, b = b, a
    return a if b == LOG_ZERO else a + math.log1p(math.exp(b - a))


@dataclass(frozen=True)
class Alignment:
    spans: Tensor  # B L 2 int64: first frame of each symbol, and the frame after its last; -1 for none
    confidence: Tensor  # B L: geometric mean of a symbol's probability over its frames; 0 for none
    score: Tensor  # B: log-probability of the whole path; -inf where the transcript does not fit


@torch.no_grad()
def align(log_probabilities: Tensor, frames: Tensor, target: Tensor, lengths: Tensor) -> Alignment:
    """The likeliest way to stretch each transcript over its frames (Viterbi over CTC's states), all rows at once.

    States are blank, first symbol, blank, second symbol, ..., blank. From one frame to the next a path stays, goes on by
    one, or by two from a symbol to a different one. `log_probabilities` B S V, `target` B L padded with anything.
    """
    rows, steps, _ = log_probabilities.shape
    most = target.shape[1]
    states = torch.full((rows, 2 * most + 1), BLANK, device=target.device)
    states[:, 1::2] = target.where(torch.arange(most, device=target.device) < lengths[:, None], BLANK)
    skips = torch.zeros_like(states, dtype=torch.bool)
    skips[:, 2:] = (states[:, 2:] != BLANK) & (states[:, 2:] != states[:, :-2])
    heard = log_probabilities.gather(2, states[:, None].expand(-1, steps, -1))  # B S 2L+1
    best = heard.new_full(states.shape, LOG_ZERO)
    best[:, 0] = 0.0  # before the first frame, so that it may enter states 0 and 1
    moves = torch.zeros(steps, *states.shape, dtype=torch.int64, device=target.device)
    for t in range(steps):
        one = torch.nn.functional.pad(best[:, :-1], (1, 0), value=LOG_ZERO)
        two = torch.nn.functional.pad(best[:, :-2], (2, 0), value=LOG_ZERO)[:, : best.shape[1]]
        two = two.masked_fill(~skips, LOG_ZERO)
        top, moves[t] = torch.stack([best, one, two]).max(0)
        best = (top + heard[:, t]).where((t < frames)[:, None], best)
    last = 2 * lengths[:, None]  # a path ends in the last symbol or the blank after it
    ends = torch.cat([last, (last - 1).clamp(min=0)], 1)
    score, which = best.gather(1, ends).max(1)
    state = ends.gather(1, which[:, None])
    path = torch.full((rows, steps), -1, device=target.device)
    for t in reversed(range(steps)):
        real = (t < frames)[:, None]
        path[:, t : t + 1] = state.where(real, -1)
        state = (state - moves[t].gather(1, state)).where(real, state).clamp(min=0)
    symbol = ((path - 1) // 2).where((path > 0) & (path % 2 == 1) & score.isfinite()[:, None], most)  # others: spare
    place = torch.arange(steps, device=target.device).expand(rows, -1)
    spare = lambda value: torch.full((rows, most + 1), value, device=target.device)
    first = spare(steps).scatter_reduce(1, symbol, place, "amin")[:, :most]
    end = spare(-1).scatter_reduce(1, symbol, place, "amax")[:, :most] + 1
    none = end == 0
    along = heard.gather(2, path.clamp(min=0)[..., None])[..., 0]
    sure = along.new_zeros(rows, most + 1).scatter_add(1, symbol, along)[:, :most] / (end - first).clamp(min=1)
    spans = torch.stack([first, end], -1).masked_fill(none[..., None], -1)
    return Alignment(spans, sure.exp().masked_fill(none, 0.0), score)


def stitch_chunks(chunks: Tensor, overlap: int, total: int) -> Tensor:  # C S V -> total V
    """One answer from those of chunks that each begin S - overlap frames after the one before.

    Of what two have in common, each gives the half that is farther from its cut; `overlap` is even.
    """
    _, steps, vocab = chunks.shape
    half = overlap // 2
    middle = chunks[:, half : steps - half].reshape(-1, vocab)
    return torch.cat([chunks[0, :half], middle, chunks[-1, steps - half :]])[:total]


@torch.no_grad()
def compute_logits_in_chunks(
    model: nn.Module, signal: Tensor, *, size: int, overlap: int, batch: int = 8
) -> Tensor:  # T * -> S V
    """Logits of one long recording, heard in overlapping chunks of `size` steps, `batch` of them at a time.

    Equal to those of the whole wherever the network looks less than half of the overlap around; attention looks
    further, and hears each chunk as a recording of its own. `size` and half of `overlap` must be multiples of
    `model.stride`, so that frames fall together. Memory no longer grows with the square of the recording.
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
    answers = torch.cat([model(chunks[i : i + batch], lengths[i : i + batch]) for i in range(0, count, batch)])
    answers = torch.nn.functional.pad(answers, (0, 0, 0, size // stride - answers.shape[1]))
    return stitch_chunks(answers, overlap // stride, total)

"""Denoising: texts are damaged, and an encoder-decoder writes what was there: spans of T5 (Raffel et al. 2019,
arXiv:1910.10683, section 3.1.4) and text infilling of BART (Lewis et al. 2019, arXiv:1910.13461, section 2.2).

Rows are whole batches of tokens, N L int64, with the number of real ones at the front of each; nothing here goes row by row.
"""

from __future__ import annotations

import numpy as np

T5_CORRUPTED_FRACTION, T5_MEAN_SPAN_LENGTH = 0.15, 3.0  # of T5: part of the tokens that is cut out, and tokens of a span on the average
BART_INFILLING = (0.30, 3.0)  # of BART: the same, where spans are drawn from a Poisson distribution


def sample_partitions(total: np.ndarray, parts: np.ndarray, rng: np.random.Generator) -> np.ndarray:  # N, N -> N max(parts)
    """Each total as a sum of that many parts of 1 or more, all sums equally likely; 0 behind the last part."""
    width, most = int(parts.max(initial=1)), int(total.max(initial=1))
    # The ends of parts are `parts - 1` different places among the first total - 1, and the total.
    lot = rng.random((len(total), max(most - 1, 1)))
    lot[np.arange(lot.shape[1])[None] >= (total - 1)[:, None]] = 2.0
    place = np.argsort(lot, 1)[:, : width - 1] + 1 if width > 1 else np.zeros((len(total), 0), dtype=np.int64)
    place = np.pad(place, ((0, 0), (0, width - 1 - place.shape[1])), constant_values=0)
    unused = np.arange(width - 1)[None] >= (parts - 1)[:, None]
    ends = np.sort(np.where(unused, total[:, None], place), 1)
    ends = np.concatenate([ends, total[:, None]], 1)
    return np.diff(ends, axis=1, prepend=0)


def sample_spans(
    lengths: np.ndarray, width: int, rng: np.random.Generator, share: float = T5_CORRUPTED_FRACTION, mean: float = T5_MEAN_SPAN_LENGTH
) -> np.ndarray:  # N -> N width int64
    """Number of the span that each token lies in, from 1; 0 where it stays, and behind the end.

    Of each row `share` of the tokens are cut out, one at least where there are two, in spans of `mean` tokens on the average;
    what stays before, between and behind them is drawn as they are. Rows begin with a part that stays, and end with a span,
    as in the authors' `random_spans_noise_mask`.
    """
    cut = np.clip(np.round(lengths * share), 1, np.maximum(lengths - 1, 0)).astype(np.int64)
    count = np.clip(np.round(cut / mean), 1, np.maximum(np.minimum(cut, lengths - cut), 1)).astype(np.int64)
    fine = cut > 0  # rows of two tokens or more
    gone, kept = (sample_partitions(np.where(fine, x, 1), np.where(fine, count, 1), rng) for x in (cut, lengths - cut))
    ends = np.stack([kept, gone], 2).reshape(len(lengths), -1).cumsum(1)  # stays, goes, stays, goes, ...
    at = np.arange(width)
    run = (at[None, :, None] >= ends[:, None]).sum(2)  # which of these runs a token lies in
    return np.where((run % 2 == 1) & (at < lengths[:, None]) & fine[:, None], run // 2 + 1, 0)


def pack_kept(tokens: np.ndarray, keep: np.ndarray, pad: int) -> tuple[np.ndarray, np.ndarray]:  # N L, N L bool -> N M, N M
    """The tokens that are kept, moved to the front of their rows; which places of the result are filled."""
    counts = keep.sum(1)
    filled = np.arange(counts.max(initial=1))[None] < counts[:, None]
    out = np.full(filled.shape, pad, dtype=np.int64)
    out[filled] = tokens[keep]
    return out, filled


def corrupt_spans(
    tokens: np.ndarray, span: np.ndarray, lengths: np.ndarray, sentinels: np.ndarray, end: int, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # N L, N L, N -> N S, N S bool, N T
    """Source, its mask, and target (padded with -1): each span is one sentinel in the source; the target is every sentinel
    and what it stands for, then one more sentinel; an `end` closes both (figure 2 of T5, and its section 3.1.4).

    `sentinels` are their tokens in the order of use. Raises `ValueError` where a row has more spans than there are.
    """
    if (most := int(span.max(initial=0))) + 1 > len(sentinels):
        raise ValueError(f"{most} spans in a row need {most + 1} sentinels, and the tokenizer has {len(sentinels)}")
    rows, width = tokens.shape
    real = np.arange(width)[None] < lengths[:, None]
    first = (span > 0) & (span != np.pad(span, ((0, 0), (1, 0)))[:, :-1])
    mark = sentinels[np.maximum(span - 1, 0)]
    ends = np.full((rows, 1), end)
    every = np.ones((rows, 1), dtype=bool)
    source, mask = pack_kept(
        np.concatenate([np.where(first, mark, tokens), ends], 1), np.concatenate([real & ((span == 0) | first), every], 1), pad
    )
    # Two places a token: its span's sentinel where that begins, then itself.
    said = np.stack([mark, tokens], 2).reshape(rows, -1)
    keep = np.stack([first, span > 0], 2).reshape(rows, -1)
    last = sentinels[span.max(1, initial=0)][:, None]
    target, _ = pack_kept(np.concatenate([said, last, ends], 1), np.concatenate([keep, every, every], 1), -1)
    return source, mask, target


def sample_infill_masks(
    lengths: np.ndarray, width: int, rng: np.random.Generator, share: float = BART_INFILLING[0], mean: float = BART_INFILLING[1]
) -> tuple[np.ndarray, np.ndarray]:  # N -> N width bool, N width bool
    """Before which tokens BART puts a mask, and which tokens are gone: spans of Poisson lengths, together about `share` of the
    tokens; a span of length 0 is a mask in between.

    Spans are drawn until the share is reached; where one begins inside another, that ends there.
    """
    rows = len(lengths)
    at, real = np.arange(width), np.arange(width)[None] < lengths[:, None]
    budget = np.round(lengths * share).astype(np.int64)
    most = max(int(budget.max(initial=0)), 1)
    length = rng.poisson(mean, (rows, most))
    # So many spans as together reach the share, the last of them cut to it.
    before = np.cumsum(length, 1) - length
    length = np.where(before < budget[:, None], np.minimum(length, budget[:, None] - before), -1)
    # They begin at different places, drawn alike.
    lot = np.where(real, rng.random((rows, width)), 2.0)
    start = np.argsort(lot, 1)[:, :most]
    start, length = start[:, : length.shape[1]], length[:, : start.shape[1]]
    begins = np.full((rows, width), -1)
    np.put_along_axis(begins, start, length, 1)
    begins = np.where(real, begins, -1)
    # A token is gone where a span that began at or before it reaches beyond it, and none began since.
    opened = np.maximum.accumulate(np.where(begins >= 0, at, -1), 1)
    reach = opened + np.take_along_axis(begins, np.maximum(opened, 0), 1)
    return begins >= 0, (opened >= 0) & (at < reach) & real


def apply_infilling(
    tokens: np.ndarray, lengths: np.ndarray, hidden: int, pad: int, begins: np.ndarray, gone: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # N L, N, N L bool, N L bool -> N S, N S bool
    """BART's source and its mask: each of the `holes` is one mask token. What is to be written is the whole row as it was."""
    real = np.arange(tokens.shape[1])[None] < lengths[:, None]
    both = np.stack([np.full_like(tokens, hidden), tokens], 2).reshape(len(tokens), -1)
    keep = np.stack([begins, real & ~gone], 2).reshape(len(tokens), -1)
    return pack_kept(both, keep, pad)

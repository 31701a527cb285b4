"""Corruption of texts for denoising pretraining of encoder-decoders: span corruption of T5 (Raffel et al. 2019,
arXiv:1910.10683, section 3.1.4) and text infilling of BART (Lewis et al. 2019, arXiv:1910.13461, section 2.2).

All functions are vectorized over batches of tokens, N L int64, with the number of real tokens at the front of each row.
"""

from __future__ import annotations

import numpy as np

T5_CORRUPTED_FRACTION, T5_MEAN_SPAN_LENGTH = 0.15, 3.0  # fraction of the tokens; tokens per span
BART_INFILLING = (0.30, 3.0)  # fraction of the tokens, mean of the Poisson distribution of span lengths


def sample_partitions(total: np.ndarray, parts: np.ndarray, rng: np.random.Generator) -> np.ndarray:  # N, N -> N max(parts)
    """Split each total into the given number of parts of at least 1, uniformly at random. Rows are padded with 0."""
    width, largest = int(parts.max(initial=1)), int(total.max(initial=1))
    # The ends of the parts are `parts - 1` distinct positions among the first total - 1, and the total itself.
    lot = rng.random((len(total), max(largest - 1, 1)))
    lot[np.arange(lot.shape[1])[None] >= (total - 1)[:, None]] = 2.0
    place = np.argsort(lot, 1)[:, : width - 1] + 1 if width > 1 else np.zeros((len(total), 0), dtype=np.int64)
    place = np.pad(place, ((0, 0), (0, width - 1 - place.shape[1])), constant_values=0)
    unused = np.arange(width - 1)[None] >= (parts - 1)[:, None]
    ends = np.sort(np.where(unused, total[:, None], place), 1)
    ends = np.concatenate([ends, total[:, None]], 1)
    return np.diff(ends, axis=1, prepend=0)


def sample_spans(
    lengths: np.ndarray,
    width: int,
    rng: np.random.Generator,
    share: float = T5_CORRUPTED_FRACTION,
    mean: float = T5_MEAN_SPAN_LENGTH,
) -> np.ndarray:  # N -> N width int64
    """Return the 1-based number of the span that each token belongs to; 0 for kept tokens and padding.

    In each row a fraction `share` of the tokens is removed, at least one if there are two, in spans of `mean` tokens on
    average. The lengths of the kept parts are sampled in the same way. Rows begin with a kept part and end with a span,
    as in the authors' `random_spans_noise_mask`.
    """
    cut = np.clip(np.round(lengths * share), 1, np.maximum(lengths - 1, 0)).astype(np.int64)
    count = np.clip(np.round(cut / mean), 1, np.maximum(np.minimum(cut, lengths - cut), 1)).astype(np.int64)
    valid = cut > 0  # rows of two tokens or more
    removed, kept = (sample_partitions(np.where(valid, x, 1), np.where(valid, count, 1), rng) for x in (cut, lengths - cut))
    ends = np.stack([kept, removed], 2).reshape(len(lengths), -1).cumsum(1)  # kept, removed, kept, removed, ...
    at = np.arange(width)
    run = (at[None, :, None] >= ends[:, None]).sum(2)  # index of the run that a token belongs to
    return np.where((run % 2 == 1) & (at < lengths[:, None]) & valid[:, None], run // 2 + 1, 0)


def pack_kept(tokens: np.ndarray, keep: np.ndarray, pad: int) -> tuple[np.ndarray, np.ndarray]:  # N L, N L bool -> N M, N M
    """Move the kept tokens to the front of their rows. Return them and the mask of filled positions."""
    counts = keep.sum(1)
    filled = np.arange(counts.max(initial=1))[None] < counts[:, None]
    out = np.full(filled.shape, pad, dtype=np.int64)
    out[filled] = tokens[keep]
    return out, filled


def corrupt_spans(
    tokens: np.ndarray, span: np.ndarray, lengths: np.ndarray, sentinels: np.ndarray, end: int, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # N L, N L, N -> N S, N S bool, N T
    """Return the source of T5, its mask, and the target, padded with -1.

    Each span is replaced by one sentinel in the source. The target lists each sentinel followed by the tokens of its
    span, then one more sentinel. Both end with the token `end` (T5, figure 2 and section 3.1.4).

    `sentinels` are the sentinel tokens in their order of use. Raises `ValueError` if a row has more spans than the
    tokenizer has sentinels for.
    """
    if (count := int(span.max(initial=0))) + 1 > len(sentinels):
        raise ValueError(f"{count} spans in a row need {count + 1} sentinels, but the tokenizer has {len(sentinels)}")
    rows, width = tokens.shape
    real = np.arange(width)[None] < lengths[:, None]
    first = (span > 0) & (span != np.pad(span, ((0, 0), (1, 0)))[:, :-1])
    mark = sentinels[np.maximum(span - 1, 0)]
    ends = np.full((rows, 1), end)
    every = np.ones((rows, 1), dtype=bool)
    source, mask = pack_kept(
        np.concatenate([np.where(first, mark, tokens), ends], 1), np.concatenate([real & ((span == 0) | first), every], 1), pad
    )
    # Two positions per token: the sentinel of its span, kept if the span begins there, then the token.
    pairs = np.stack([mark, tokens], 2).reshape(rows, -1)
    keep = np.stack([first, span > 0], 2).reshape(rows, -1)
    last = sentinels[span.max(1, initial=0)][:, None]
    target, _ = pack_kept(np.concatenate([pairs, last, ends], 1), np.concatenate([keep, every, every], 1), -1)
    return source, mask, target


def sample_infill_masks(
    lengths: np.ndarray, width: int, rng: np.random.Generator, share: float = BART_INFILLING[0], mean: float = BART_INFILLING[1]
) -> tuple[np.ndarray, np.ndarray]:  # N -> N width bool, N width bool
    """Return the positions before which BART inserts a mask token, and the tokens that are removed.

    Span lengths are sampled from a Poisson distribution with mean `mean` until a fraction `share` of the tokens is
    reached. A span of length 0 inserts a mask without removing a token. A span that begins inside another one ends it.
    """
    rows = len(lengths)
    at, real = np.arange(width), np.arange(width)[None] < lengths[:, None]
    budget = np.round(lengths * share).astype(np.int64)
    max_spans = max(int(budget.max(initial=0)), 1)
    length = rng.poisson(mean, (rows, max_spans))
    # Keep spans until the budget is used up, and cut the last one to fit.
    before = np.cumsum(length, 1) - length
    length = np.where(before < budget[:, None], np.minimum(length, budget[:, None] - before), -1)
    # Distinct start positions, uniformly at random.
    lot = np.where(real, rng.random((rows, width)), 2.0)
    start = np.argsort(lot, 1)[:, :max_spans]
    start, length = start[:, : length.shape[1]], length[:, : start.shape[1]]
    begins = np.full((rows, width), -1)
    np.put_along_axis(begins, start, length, 1)
    begins = np.where(real, begins, -1)
    # A token is removed if the last span that began at or before it reaches beyond it.
    opened = np.maximum.accumulate(np.where(begins >= 0, at, -1), 1)
    reach = opened + np.take_along_axis(begins, np.maximum(opened, 0), 1)
    return begins >= 0, (opened >= 0) & (at < reach) & real


def apply_infilling(
    tokens: np.ndarray, lengths: np.ndarray, hidden: int, pad: int, begins: np.ndarray, gone: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # N L, N, N L bool, N L bool -> N S, N S bool
    """Return the source of BART and its mask, with one token `hidden` per span. The target is the original row."""
    real = np.arange(tokens.shape[1])[None] < lengths[:, None]
    both = np.stack([np.full_like(tokens, hidden), tokens], 2).reshape(len(tokens), -1)
    keep = np.stack([begins, real & ~gone], 2).reshape(len(tokens), -1)
    return pack_kept(both, keep, pad)

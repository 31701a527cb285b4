"""n-grams with backoff: the honest thing for a language model to beat (Witten & Bell 1991, doi:10.1109/18.87000)."""

from __future__ import annotations

import numpy as np


class NGram:
    """Counts of up to `order` tokens in a row, mixed from the longest context down to chance:

        p_n(w | c) = (count(c w) + kinds(c) p_{n-1}(w | c')) / (count(c) + kinds(c))

    where kinds(c) is how many different tokens follow c (Chen & Goodman 1999, equation 12 and section 2.5). Contexts
    are coded as numbers, so that all is done by sorting arrays.
    """

    def __init__(self, tokens: np.ndarray, vocab: int, order: int = 5):
        self.tokens, self.vocab, self.order = tokens.astype(np.int64), vocab, order

    def compute_nats(self, tokens: np.ndarray) -> np.ndarray:
        """-log p of each token given those before it (T float64)."""
        seen, asked = len(self.tokens), np.asarray(tokens, dtype=np.int64)
        every = np.concatenate([self.tokens, asked])
        ours = np.arange(len(every)) < seen
        p = np.full(len(every), 1 / self.vocab)
        context = np.zeros(len(every), dtype=np.int64)  # codes of the n - 1 tokens before each; 0 of none
        for n in range(1, self.order + 1):
            # The first tokens of either text lack such a context.
            whole = np.minimum(np.arange(len(every)), np.where(ours, len(every), np.arange(len(every)) - seen)) >= n - 1
            pair = to_dense_codes(context * (self.vocab + 1) + every)
            used = ours & whole
            of_context = np.bincount(context[used], minlength=context.max() + 1)
            of_pair = np.bincount(pair[used], minlength=pair.max() + 1)
            first = np.unique(pair[used], return_index=True)[1]  # one place of each pair: its context has one kind more
            kinds = np.bincount(context[used][first], minlength=len(of_context))
            total = of_context[context] + kinds[context]
            mixed = (of_pair[pair] + kinds[context] * p) / np.maximum(total, 1)
            p = np.where(whole & (total > 0), mixed, p)
            longer = np.zeros_like(every)
            longer[n:] = every[:-n]
            context = to_dense_codes(context * (self.vocab + 1) + longer + 1)
        return -np.log(p[seen:])


def to_dense_codes(codes: np.ndarray) -> np.ndarray:
    """Numbers from 0, equal for equal codes."""
    return np.unique(codes, return_inverse=True)[1]

"""n-gram language model with backoff, as a baseline (Witten & Bell 1991, doi:10.1109/18.87000)."""

from __future__ import annotations

import numpy as np


class NGram:
    """Witten-Bell n-gram model up to `order`, interpolated down to the uniform distribution:

        p_n(w | c) = (count(c w) + kinds(c) p_{n-1}(w | c')) / (count(c) + kinds(c))

    where kinds(c) is the number of distinct tokens that follow c (Chen & Goodman 1999, equation 12 and section 2.5).
    Contexts are encoded as integers, so that counting is done by sorting arrays.
    """

    def __init__(self, tokens: np.ndarray, vocab: int, order: int = 5):
        self.tokens, self.vocab, self.order = tokens.astype(np.int64), vocab, order

    def compute_nats(self, tokens: np.ndarray) -> np.ndarray:
        """Return -log p of each token given the previous ones (T float64)."""
        trained, evaluated = len(self.tokens), np.asarray(tokens, dtype=np.int64)
        every = np.concatenate([self.tokens, evaluated])
        is_training = np.arange(len(every)) < trained
        p = np.full(len(every), 1 / self.vocab)
        context = np.zeros(len(every), dtype=np.int64)  # codes of the n - 1 tokens before each; 0 without a context
        for n in range(1, self.order + 1):
            # The first n - 1 tokens of both texts have no such context.
            whole = (
                np.minimum(np.arange(len(every)), np.where(is_training, len(every), np.arange(len(every)) - trained)) >= n - 1
            )
            pair = to_dense_codes(context * (self.vocab + 1) + every)
            used = is_training & whole
            of_context = np.bincount(context[used], minlength=context.max() + 1)
            of_pair = np.bincount(pair[used], minlength=pair.max() + 1)
            first = np.unique(pair[used], return_index=True)[1]  # one position of each distinct pair
            kinds = np.bincount(context[used][first], minlength=len(of_context))
            total = of_context[context] + kinds[context]
            mixed = (of_pair[pair] + kinds[context] * p) / np.maximum(total, 1)
            p = np.where(whole & (total > 0), mixed, p)
            longer = np.zeros_like(every)
            longer[n:] = every[:-n]
            context = to_dense_codes(context * (self.vocab + 1) + longer + 1)
        return -np.log(p[trained:])


def to_dense_codes(codes: np.ndarray) -> np.ndarray:
    """Renumber codes from 0 without gaps."""
    return np.unique(codes, return_inverse=True)[1]

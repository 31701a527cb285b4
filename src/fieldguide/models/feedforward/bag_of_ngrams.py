"""Bag of n-grams: a linear model of the words and pairs of words of a text (Wang and Manning 2012).

New here: the order of words is ignored beyond pairs. Counts are weighted by how rare an n-gram is (tf-idf; Spärck Jones 1972) and
the vector is scaled to length 1. `fieldguide.training.solvers` collects the n-grams and fits the weights. For classifying texts it
is the baseline that is hardest to beat with little data.

Initialization: zeros, as fitting starts from there.
Shapes: B batch, T tokens, M n-grams of a row, F known n-grams.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size

MAX_NGRAMS = 200_000  # the most frequent ones are kept


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 1000
    ngrams: int = 1  # F
    longest: int = 2  # tokens of the longest n-gram
    num_classes: int = 2  # 1 for regression


class BagOfNgrams(nn.Module):
    """Tokens -> tf-idf of n-grams -> class logits.

    `keys` holds the known n-grams in order, each as a number in base `vocab_size + 1` whose digits are its tokens plus 1.
    """

    keys: Tensor  # F int64
    idf: Tensor  # F

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.register_buffer("keys", torch.arange(1, config.ngrams + 1))
        self.register_buffer("idf", torch.ones(config.ngrams))
        self.head = nn.Linear(config.ngrams, config.num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_inputs(cls, config: Config, inputs: Iterable[tuple[Tensor, Tensor]]) -> Self:
        """Return a model of the n-grams in `inputs` (tokens, mask). Those of several tokens must occur in two texts."""
        counts: dict[int, int] = {}
        rows = 0
        for tokens, mask in inputs:
            rows += len(tokens)
            keys, valid = compute_keys(tokens, mask, config)
            row = torch.arange(len(tokens)).repeat_interleave(keys.shape[1]).view_as(keys)
            pairs = torch.stack([row[valid], keys[valid]]).unique(dim=1)  # each n-gram once per text
            for key, count in zip(*(t.tolist() for t in pairs[1].unique(return_counts=True))):
                counts[key] = counts.get(key, 0) + count
        kept = [key for key, count in counts.items() if count > 1 or key <= config.vocab_size]
        kept = sorted(sorted(kept, key=lambda key: (-counts[key], key))[:MAX_NGRAMS]) or [1]
        model = cls(replace(config, ngrams=len(kept)))
        model.keys = torch.tensor(kept)
        document_counts = torch.tensor([float(counts.get(key, 0)) for key in kept])
        model.idf = torch.log((1 + rows) / (1 + document_counts)) + 1
        return model

    def weigh(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:  # B T, B T -> B M int64, B M
        """Return the n-grams of each row, and their weights; repetitions and unknown n-grams have the weight 0."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        keys, valid = compute_keys(tokens, mask, self.config)
        place = find_places(self.keys, keys).clamp(max=len(self.keys) - 1)
        place = torch.where(valid & (self.keys[place] == keys), place, len(self.keys)).sort(1).values  # unknown ones at the end
        if torch.compiler.is_exporting():  # `searchsorted` cannot be part of a graph
            first = (place[:, :, None] > place[:, None]).sum(2)
            count = (place[:, :, None] == place[:, None]).sum(2)
        else:
            first = torch.searchsorted(place, place)
            count = torch.searchsorted(place, place, right=True) - first
        known = (place < len(self.keys)) & (first == torch.arange(place.shape[1], device=place.device))
        place = place.clamp(max=len(self.keys) - 1)
        weight = torch.where(known, (1 + count.to(self.idf.dtype).log()) * self.idf[place], 0.0)
        return place, F.normalize(weight, dim=1)

    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # B T, B T -> B F sparse
        place, weight = self.weigh(tokens, mask)
        row, column = weight.nonzero(as_tuple=True)
        index = torch.stack([row, place[row, column]])
        return torch.sparse_coo_tensor(index, weight[row, column], (len(tokens), len(self.keys)), check_invariants=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # B T, B T -> B classes
        place, weight = self.weigh(tokens, mask)
        table = self.head.weight.t().contiguous()
        if torch.compiler.is_exporting():
            return (table[place] * weight.to(table.dtype)[:, :, None]).sum(1) + self.head.bias
        return F.embedding_bag(place, table, per_sample_weights=weight.to(table.dtype), mode="sum") + self.head.bias


def find_places(ordered: Tensor, values: Tensor) -> Tensor:
    """Return how many of the `ordered` numbers are smaller than each value, as `torch.searchsorted` does."""
    if not torch.compiler.is_exporting():
        return torch.searchsorted(ordered, values)
    place = torch.zeros_like(values)
    for bit in reversed(range(len(ordered).bit_length())):  # the largest place before which all numbers are smaller
        further = place + 2**bit
        is_smaller = ordered[further.clamp(max=len(ordered)) - 1] < values
        place = torch.where((further <= len(ordered)) & is_smaller, further, place)
    return place


def compute_keys(tokens: Tensor, mask: Tensor, config: Config) -> tuple[Tensor, Tensor]:  # B T, B T -> B M, B M
    """Return the n-grams of each row as numbers, and whether all their tokens are real."""
    keys, valid, last = [], [], tokens.shape[1]
    for n in range(1, min(config.longest, last) + 1):
        key, real = torch.zeros_like(tokens[:, n - 1 :]), torch.ones_like(mask[:, n - 1 :])
        for i in range(n):
            key = key * (config.vocab_size + 1) + tokens[:, i : last - n + 1 + i] + 1
            real = real & mask[:, i : last - n + 1 + i]
        keys.append(key)
        valid.append(real)
    return torch.cat(keys, 1), torch.cat(valid, 1)


CARD = Card(
    name="bag-of-ngrams",
    model=BagOfNgrams,
    config=Config,
    paper="ACL P12-2018",
    year=2012,
    input_type="tokens",
    output_type="label",
    solver="linear",
    sizes={
        "bag-of-ngrams": Size(
            params=4, source="one weight per n-gram and class, one bias per class; one n-gram before fitting"
        ),
        "bag-of-ngrams-test": Size(vocab_size=30, ngrams=20, num_classes=3),
    },
)

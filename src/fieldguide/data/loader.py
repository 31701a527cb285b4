"""Batches: which examples each step sees, and how they reach the network.

Order, augmentation and dropout are pure functions of (seed, step). So resuming at step k needs no saved loader, worker
or random state: it begins the plan at k, and everything after is bit for bit what it would have been.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

WINDOW = 32  # batches that are sorted by length together


@dataclass(frozen=True)
class Batches:
    """Prepared examples. `make(index, generator)` gives the batch of these rows; with a generator, augmented.

    `lengths`, where given (tokens, samples, frames), lets batches hold examples of similar length.
    """

    count: int
    make: Callable[[np.ndarray, torch.Generator | None], dict[str, Tensor]]
    lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return self.count


def steps_per_epoch(count: int, batch: int) -> int:
    return max(1, count // batch)


def plan(
    count: int, batch: int, seed: int, lengths: np.ndarray | None = None, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """(step, row numbers) from step `start` on. Each epoch is a fresh shuffle; its odd remainder is left out."""
    batch, each = min(batch, count), steps_per_epoch(count, batch)
    step = start
    while stop is None or step < stop:
        epoch = step // each
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(count)[: each * batch]
        if lengths is not None and each > 1:
            order = similar(order, lengths, batch, rng)
        for position in range(step - epoch * each, each):
            if step == stop:
                return
            yield step, order[position * batch : (position + 1) * batch]
            step += 1


def similar(order: np.ndarray, lengths: np.ndarray, batch: int, rng: np.random.Generator) -> np.ndarray:
    """The shuffled order with neighbours of similar length: sorted within windows, whole batches shuffled again."""
    windows = np.arange(len(order)) // (WINDOW * batch)
    order = order[np.lexsort((lengths[order], windows))]
    return order.reshape(-1, batch)[rng.permutation(len(order) // batch)].ravel()


def typical(batches: Batches, batch: int) -> np.ndarray:
    """Rows of one batch as a step sees it: of similar length, and that the mean."""
    rows = np.arange(len(batches))
    if batches.lengths is not None:
        rows = np.argsort(np.abs(batches.lengths - batches.lengths.mean()), kind="stable")
    return rows[:batch]


def share(index: np.ndarray, part: int, parts: int) -> np.ndarray:
    """The part of a batch that one process, or one accumulation, works through."""
    return np.array_split(index, parts)[part]


def generator(seed: int, *numbers: int) -> torch.Generator:
    """A random generator that depends on these numbers alone."""
    return torch.Generator().manual_seed(mix(seed, *numbers))


def mix(*numbers: int) -> int:
    """One 63-bit seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Fetch(Dataset):
    """Makes whole batches, in the main process or a worker: no example is handled alone."""

    def __init__(self, batches: Batches, seed: int, augment: bool):
        self.batches, self.seed, self.augment = batches, seed, augment

    def __getitem__(self, asked: tuple[int, int, np.ndarray]) -> tuple[int, dict[str, Tensor]]:
        step, part, index = asked
        return step, self.batches.make(index, generator(self.seed, step, part) if self.augment else None)


@dataclass(frozen=True)
class Asked:
    """The order in which a process fetches: (step, part, rows), for a `DataLoader` to walk as its sampler."""

    batches: Batches
    batch: int
    parts: int
    mine: range
    seed: int
    start: int
    stop: int

    def __iter__(self) -> Iterator[tuple[int, int, np.ndarray]]:
        b = self.batches
        for step, whole in plan(len(b), self.batch, self.seed, b.lengths, self.start, self.stop):
            yield from ((step, part, share(whole, part, self.parts)) for part in self.mine)


def training(
    batches: Batches,
    *,
    batch: int,
    parts: int = 1,
    mine: range = range(1),
    seed: int,
    start: int = 0,
    stop: int,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(step, augmented batch) for steps start .. stop. Each step's batch is cut into `parts`, of which this
    process's (`mine`) are given one after another."""
    asked, fetch = Asked(batches, batch, parts, mine, seed, start, stop), Fetch(batches, seed, augment=True)
    if workers == 0:
        return (fetch[one] for one in asked)
    return iter(DataLoader(fetch, sampler=asked, batch_size=None, num_workers=workers, pin_memory=pin))


def in_order(batches: Batches, batch: int, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Every example once, unaugmented, with its row numbers; similar lengths together, so not in row order."""
    rows = np.arange(len(batches)) if rows is None else rows
    if batches.lengths is not None:
        rows = rows[np.argsort(batches.lengths[rows], kind="stable")]
    for first in range(0, len(rows), batch):
        index = rows[first : first + batch]
        yield index, batches.make(index, None)

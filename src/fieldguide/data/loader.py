"""Batches: which examples each training step uses, and how batches are loaded.

Order, augmentation and dropout are pure functions of (seed, step). Resuming at step k therefore needs no saved loader,
worker or random state: the plan starts at k, and all later steps are bitwise identical to an uninterrupted run.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SORT_WINDOW_BATCHES = 32  # batches per window; examples are sorted by length within a window


@dataclass(frozen=True)
class Batches:
    """Prepared examples. `make(index, generator)` returns the batch of these rows, augmented if a generator is passed.

    `lengths` (tokens, samples or frames per example), if given, lets batches hold examples of similar length. `meta` holds
    what else belongs to each example and is no tensor, such as the path of its file; predictions receive it with the outputs.
    """

    count: int
    make: Callable[[np.ndarray, torch.Generator | None], dict[str, Tensor]]
    lengths: np.ndarray | None = None
    meta: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.count


def steps_per_epoch(count: int, batch: int) -> int:
    """Return the number of full batches per epoch, at least 1."""
    return max(1, count // batch)


def plan_batches(
    count: int, batch: int, seed: int, lengths: np.ndarray | None = None, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (step, row indices) from step `start` on. Each epoch is reshuffled and drops its last incomplete batch."""
    batch, each = min(batch, count), steps_per_epoch(count, batch)
    step = start
    while stop is None or step < stop:
        epoch = step // each
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(count)[: each * batch]
        if lengths is not None and each > 1:
            order = sort_by_length(order, lengths, batch, rng)
        for position in range(step - epoch * each, each):
            if step == stop:
                return
            yield step, order[position * batch : (position + 1) * batch]
            step += 1


def sort_by_length(order: np.ndarray, lengths: np.ndarray, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Sort the shuffled order by length within windows, then shuffle whole batches again."""
    windows = np.arange(len(order)) // (SORT_WINDOW_BATCHES * batch)
    order = order[np.lexsort((lengths[order], windows))]
    return order.reshape(-1, batch)[rng.permutation(len(order) // batch)].ravel()


def representative_rows(batches: Batches, batch: int) -> np.ndarray:
    """Return the rows of one representative batch: examples with lengths closest to the mean."""
    rows = np.arange(len(batches))
    if batches.lengths is not None:
        rows = np.argsort(np.abs(batches.lengths - batches.lengths.mean()), kind="stable")
    return rows[:batch]


def select_part(index: np.ndarray, part: int, parts: int) -> np.ndarray:
    """Return the part of a batch that one process or one accumulation step handles."""
    return np.array_split(index, parts)[part]


def make_generator(seed: int, *numbers: int) -> torch.Generator:
    """Return a random generator that depends only on these numbers."""
    return torch.Generator().manual_seed(mix_seeds(seed, *numbers))


def mix_seeds(*numbers: int) -> int:
    """Combine several numbers into one 63-bit seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class BatchDataset(Dataset[tuple[int, dict[str, Tensor]]]):
    """A dataset whose items are whole batches, built in the main process or in a worker."""

    def __init__(self, batches: Batches, seed: int, augment: bool):
        self.batches, self.seed, self.augment = batches, seed, augment

    def __getitem__(self, item: tuple[int, int, np.ndarray]) -> tuple[int, dict[str, Tensor]]:
        step, part, index = item
        return step, self.batches.make(index, make_generator(self.seed, step, part) if self.augment else None)


@dataclass(frozen=True)
class BatchSampler:
    """A `DataLoader` sampler that yields (step, part, row indices) in the order in which a process loads them."""

    batches: Batches
    batch: int
    parts: int
    mine: range
    seed: int
    start: int
    stop: int

    def __iter__(self) -> Iterator[tuple[int, int, np.ndarray]]:
        b = self.batches
        for step, whole in plan_batches(len(b), self.batch, self.seed, b.lengths, self.start, self.stop):
            yield from ((step, part, select_part(whole, part, self.parts)) for part in self.mine)


def iterate_training_batches(
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
    """Yield (step, augmented batch) for steps `start` to `stop` - 1.

    Each step's batch is divided into `parts`; the parts in `mine` are yielded one after another.
    """
    sampler, fetch = BatchSampler(batches, batch, parts, mine, seed, start, stop), BatchDataset(batches, seed, augment=True)
    if workers == 0:
        return (fetch[one] for one in sampler)
    return iter(
        DataLoader(
            fetch, sampler=sampler, batch_size=None, num_workers=workers, pin_memory=pin, worker_init_fn=leave_signals_to_parent
        )
    )


def leave_signals_to_parent(worker: int) -> None:
    """Let a worker outlive Ctrl-C and a closed terminal, which reach it too, so that its parent can finish the step and save.

    SIGTERM ends a worker as if its work was done, since torch would raise an error at any place of the parent otherwise.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))


def iterate_in_order(
    batches: Batches, batch: int, rows: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Yield (row indices, batch) for every example once, without augmentation, sorted by length if lengths are known."""
    rows = np.arange(len(batches)) if rows is None else rows
    if batches.lengths is not None:
        rows = rows[np.argsort(batches.lengths[rows], kind="stable")]
    for first in range(0, len(rows), batch):
        index = rows[first : first + batch]
        yield index, batches.make(index, None)

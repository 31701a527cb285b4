"""Splits: assignment of rows to training, validation and test. Equal data and seed give equal splits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import Data
from fieldguide.data.validation.duplicates import same_inputs


@dataclass(frozen=True)
class Splits:
    """Sorted row indices for training, validation and test, and a description of how they were chosen."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    description: str


def split(data: Data, *, seed: int = 0, test: float = 0.2, validation: float | None = None) -> Splits:
    """Split rows into training, validation and test.

    Splits given by the source are kept; missing ones are taken from its training rows. `test` and `validation` are
    fractions of those rows; by default validation is 0.1 to 0.2, larger for small data. If a column has the role
    `time`, the latest rows become the test set. Rows of the same `group`, and rows that are equal in all features,
    are always in the same split. Otherwise the split is stratified by class, and every class with at least two rows
    has a row in the training set.

    Raises DataError if there are too few rows to split.
    """
    n = len(data)
    if validation is None:
        validation = 0.2 if n < 2000 else 0.15 if n < 10_000 else 0.1
    if not (0 <= test < 1 and 0 <= validation < 1 and test + validation < 1):
        raise DataError(f"test={test} and validation={validation} leave no rows for training.")
    side = np.zeros(n, dtype=np.int8)  # 0 train, 1 validation, 2 test
    notes = []
    if data.splits is not None:
        side[data.splits == "val"], side[data.splits == "test"] = 1, 2
        given = [name for code, name in enumerate(("train", "validation", "test")) if (side == code).any()]
        notes.append(data.split_description or f"{' and '.join(given)} as given by the source")
        if not (side == 0).any():
            raise DataError(f"{data.source}: the source defines splits but has no training rows.")
    pool = np.flatnonzero(side == 0)
    needed = pool.size
    for name, code, share in (("test", 2, test), ("validation", 1, validation)):
        if (side == code).any() or share == 0:
            continue
        want = max(1, round(share * needed))
        pool = np.flatnonzero(side == 0)
        if pool.size < 3 or want >= pool.size:
            raise DataError(f"{data.source}: {n} usable rows are too few for training, validation and test sets.")
        chosen, how = _choose_rows(data, pool, want, seed + code)
        side[chosen] = code
        notes.append(f"{name}: {chosen.size:,} rows, {how}")
    rows = [np.flatnonzero(side == code) for code in (0, 1, 2)]
    by_chance = f" (seed {seed})" if len(notes) > bool(data.split_description) else ""
    return Splits(rows[0], rows[1], rows[2], "; ".join(notes) + by_chance)


def _choose_rows(data: Data, pool: np.ndarray, want: int, seed: int) -> tuple[np.ndarray, str]:
    """Select about `want` rows of `pool`, in whole blocks; return them and a description of the method."""
    if data.columns_with_role("time"):
        return _select_latest(data, pool, want)
    blocks, why = _assign_blocks(data)
    blocks = np.unique(blocks[pool], return_inverse=True)[1]
    sizes = np.bincount(blocks)
    codes, method = np.zeros(sizes.size, dtype=np.int64), "at random"
    target = data.target
    if target is not None and target.kind in ("category", "boolean"):
        classes = data.rows[target.name].cast(pl.String).fill_null("").to_numpy()[pool]
        # A block gets the class of its first row: assigned in reverse order, so the first row is written last.
        codes[blocks[::-1]] = np.unique(classes, return_inverse=True)[1][::-1]
        method = "stratified by class"
    taken = _systematic_sample(codes, sizes, want, np.random.default_rng(seed))
    if not taken.any():
        raise DataError(f"{data.source}: cannot split: {why or 'too few rows'} leaves no rows for one of the splits.")
    return pool[taken[blocks]], f"{method}{', ' + why if why else ''}"


def _systematic_sample(codes: np.ndarray, sizes: np.ndarray, want: int, random: np.random.Generator) -> np.ndarray:
    """Return a mask of the blocks to take for about `want` rows: every k-th in random order, sorted by class and size.

    Systematic sampling keeps the proportions of classes and block sizes. One block of each class stays in training.
    """
    order = np.lexsort((random.random(sizes.size), sizes, codes))
    last = np.r_[np.diff(codes[order]) != 0, True]
    order = order[~last]
    share = min(1.0, want / max(1, int(sizes[order].sum())))
    steps = np.floor(np.arange(order.size + 1) * share + random.random())
    taken = np.zeros(sizes.size, dtype=bool)
    taken[order[np.diff(steps) > 0]] = True
    return taken


def _assign_blocks(data: Data) -> tuple[np.ndarray, str]:
    """Return a block number per row; rows in a block stay together (equal groups, equal inputs, or connected by both)."""
    n = len(data)
    groups = [data.rows[c.name].cast(pl.String) for c in data.columns_with_role("group")]
    same = same_inputs(data)
    labels, why = np.arange(n), []
    if same is not None:
        labels = same
        count = n - np.unique(same).size
        if count:
            why.append(f"{count:,} duplicates kept in the same split as their originals")
    for group in groups:
        codes = np.unique(group.fill_null("").to_numpy(), return_inverse=True)[1]
        labels = _connect_labels(labels, codes)
        why.append(f"groups by {group.name!r} kept whole")
    return labels, ", ".join(why)


def _connect_labels(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the connected components of rows that share a number in either labeling."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    shift = int(first.max()) + 1
    size = shift + int(second.max()) + 1
    graph = coo_matrix((np.ones(first.size, dtype=np.int8), (first, second + shift)), shape=(size, size))
    return connected_components(graph, directed=False)[1][first]


def _select_latest(data: Data, pool: np.ndarray, want: int) -> tuple[np.ndarray, str]:
    """Select the rows with the latest times; rows with equal times stay together."""
    name = data.columns_with_role("time")[0].name
    times = data.rows[name][pool]
    if times.dtype == pl.String:
        raise DataError(f"{data.source}: the time column {name!r} contains neither dates nor numbers.")
    floats = times.cast(pl.Float64) if times.dtype.is_numeric() else times.cast(pl.Int64).cast(pl.Float64)
    values = floats.fill_null(-np.inf).to_numpy()
    cut = np.sort(values)[-want]
    chosen = values >= cut
    if chosen.all():
        chosen = values > cut
    if not chosen.any():
        raise DataError(f"{data.source}: all rows have the same value in {name!r}, so they cannot be split by time.")
    return pool[chosen], f"the latest by {name!r}"


def sample_rows(rows: np.ndarray, most: int | None, seed: int) -> np.ndarray:
    """Return at most `most` rows, sampled at random without replacement; all rows if `most` is None."""
    return rows if most is None or len(rows) <= most else np.sort(np.random.default_rng(seed).permutation(rows)[:most])

"""Splits: assignment of rows to training, validation and test. Equal data and seed give equal splits.

Rows are drawn without regard to their features, so that runs that ignore different columns are tested on the same rows. Only
rows that are equal in all features move, to the split of the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import Data
from fieldguide.data.validation.duplicates import same_inputs

MAX_SIZE_ERROR = 0.25  # relative change of a split by its duplicates, above which they are drawn as blocks instead


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
    wanted = {
        code: max(1, round(share * pool.size))
        for code, share in ((2, test), (1, validation))
        if share and not (side == code).any()
    }
    groups, why = _number_groups(data)
    same = None if data.columns_with_role("time") else same_inputs(data)
    drawn, methods = _draw(data, side, wanted, groups, why, seed)
    if same is not None and (copies := n - np.unique(same).size):
        blocks = _connect_labels(groups, same)
        why = ", ".join(filter(None, (f"{copies:,} duplicates kept in the same split as their originals", why)))
        joined = _join_blocks(data, drawn, blocks, side == 0)
        if _has_sizes(joined, wanted):
            drawn, methods = joined, {code: ", ".join((how.partition(",")[0], why)) for code, how in methods.items()}
        else:  # few distinct rows
            drawn, methods = _draw(data, side, wanted, blocks, why, seed)
    side = drawn
    notes += [f"{'test' if code == 2 else 'validation'}: {(side == code).sum():,} rows, {how}" for code, how in methods.items()]
    rows = [np.flatnonzero(side == code) for code in (0, 1, 2)]
    by_chance = f" (seed {seed})" if len(notes) > bool(data.split_description) else ""
    return Splits(rows[0], rows[1], rows[2], "; ".join(notes) + by_chance)


def _draw(
    data: Data, side: np.ndarray, wanted: Mapping[int, int], blocks: np.ndarray, why: str, seed: int
) -> tuple[np.ndarray, dict[int, str]]:
    """Return the split of each row, with `wanted` rows drawn from training for each code, and how they were drawn."""
    side, methods = side.copy(), {}
    for code, want in wanted.items():
        pool = np.flatnonzero(side == 0)
        if pool.size < 3 or want >= pool.size:
            raise DataError(f"{data.source}: {len(data)} usable rows are too few for training, validation and test sets.")
        chosen, methods[code] = _choose_rows(data, pool, want, blocks[pool], why, seed + code)
        side[chosen] = code
    return side, methods


def _choose_rows(data: Data, pool: np.ndarray, want: int, blocks: np.ndarray, why: str, seed: int) -> tuple[np.ndarray, str]:
    """Select about `want` rows of `pool`, in whole blocks; return them and a description of the method."""
    if data.columns_with_role("time"):
        return _select_latest(data, pool, want)
    blocks = np.unique(blocks, return_inverse=True)[1]
    sizes = np.bincount(blocks)
    codes, method = np.zeros(sizes.size, dtype=np.int64), "at random"
    if (classes := _get_classes(data)) is not None:
        # A block gets the class of its first row: assigned in reverse order, so the first row is written last.
        codes[blocks[::-1]] = np.unique(classes[pool], return_inverse=True)[1][::-1]
        method = "stratified by class"
    taken = _systematic_sample(codes, sizes, want, np.random.default_rng(seed))
    if not taken.any():
        raise DataError(f"{data.source}: cannot split: {why or 'too few rows'} leaves no rows for one of the splits.")
    return pool[taken[blocks]], f"{method}{', ' + why if why else ''}"


def _get_classes(data: Data) -> np.ndarray | None:
    """Return the class of each row, or None if the target has no classes."""
    target = data.target
    if target is None or target.kind not in ("category", "boolean"):
        return None
    return data.rows[target.name].cast(pl.String).fill_null("").to_numpy()


def _join_blocks(data: Data, side: np.ndarray, blocks: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Return the splits with the `free` rows of each block in the split of the first of them.

    A class without training rows gets its first block back.
    """
    side, rows = side.copy(), np.flatnonzero(free)
    _, first, number = np.unique(blocks[rows], return_index=True, return_inverse=True)
    side[rows] = side[rows[first]][number]
    if (classes := _get_classes(data)) is not None:
        for name in np.setdiff1d(classes[rows], classes[side == 0]):
            block = number[np.flatnonzero(classes[rows] == name)[0]]
            side[rows[number == block]] = 0
    return side


def _has_sizes(side: np.ndarray, wanted: Mapping[int, int]) -> bool:
    """Return whether no split is empty, and those that were drawn have about the wanted sizes."""
    counts = np.bincount(side, minlength=3)
    return bool(counts[0]) and all(
        counts[code] and abs(counts[code] - want) <= max(1, MAX_SIZE_ERROR * want) for code, want in wanted.items()
    )


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


def _number_groups(data: Data) -> tuple[np.ndarray, str]:
    """Return a number per row that is equal for rows of the same group, and a description of the groups."""
    labels, why = np.arange(len(data)), list[str]()
    for column in data.columns_with_role("group"):
        values = data.rows[column.name].cast(pl.String).fill_null("").to_numpy()
        codes = np.unique(values, return_inverse=True)[1]
        labels = _connect_labels(labels, codes) if why else codes
        why.append(f"groups by {column.name!r} kept whole")
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

"""Traces of other batches and lengths from a few that were made.

If two traces have the same operations and storages in the same order, only the sizes differ. A size is a product of axes, so it
is a polynomial in the number of rows (of degree 1) or in the length (of degree 2, because attention compares all positions).
The polynomial through enough traces gives the sizes of any other. Whether the operations stay the same there is not known
before the answer is traced itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fieldguide.planning.records import Trace

Make = Callable[[int], Trace]


def get_structure(trace: Trace) -> tuple[Any, ...]:
    """Return all of a trace but its sizes."""
    events = tuple(storage if size > 0 else -storage for storage, size in trace.events)
    work = tuple((each.name, each.kind, each.dtype, each.phase) for each in trace.work)
    return events, tuple(trace.initial), work


def get_sizes(trace: Trace) -> list[float]:
    sizes: list[float] = [abs(size) for _, size in trace.events]
    sizes += trace.initial.values()
    for each in trace.work:
        sizes += (each.flops, each.bytes)
    return sizes


def order_releases(trace: Trace) -> Trace:
    """Return the trace with storages that are released one directly after the other in ascending order.

    Python's order of some of them depends on addresses, such as of the weights that autocast has converted.
    """
    events: list[tuple[int, int]] = []
    run: list[tuple[int, int]] = []
    for event in trace.events:
        if event[1] < 0:
            run.append(event)
            continue
        events += sorted(run)
        events.append(event)
        run.clear()
    return replace(trace, events=events + sorted(run))


def interpolate(traces: Mapping[int, Trace], degree: int) -> Make | None:
    """Return a function from a number to its trace, through `degree + 1` traces; None if their operations differ."""
    numbers = sorted(traces)[: degree + 1]
    if len(numbers) <= degree:
        return None
    chosen = [traces[number] for number in numbers]
    structure = get_structure(chosen[0])
    if any(get_structure(other) != structure for other in chosen[1:]):
        return None
    table = np.array([get_sizes(trace) for trace in chosen])
    first = chosen[0]
    signs = np.array([1 if size > 0 else -1 for _, size in first.events], dtype=np.int64)
    at = np.array(numbers, dtype=float)

    def make(number: int) -> Trace:
        weights = [np.prod((number - np.delete(at, i)) / (at[i] - np.delete(at, i))) for i in range(len(at))]
        sizes = np.array(weights) @ table
        count, before = len(first.events), len(first.events) + len(first.initial)
        whole = np.maximum(np.rint(sizes[:before]), 1).astype(np.int64)
        events = list(zip((storage for storage, _ in first.events), (signs * whole[:count]).tolist()))
        initial = dict(zip(first.initial, whole[count:].tolist()))
        work = [
            replace(each, flops=flops, bytes=moved)
            for each, flops, moved in zip(first.work, sizes[before::2].tolist(), sizes[before + 1 :: 2].tolist())
        ]
        return Trace(events, first.parts, initial, work)

    return make

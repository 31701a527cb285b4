"""Calls of a function in threads, for work that releases the interpreter's lock, such as reading and decoding files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
THREADS = min(16, (os.cpu_count() or 2) * 2)
BLOCK = 2048  # items for which it is decided anew whether threads are used: files that are not in memory yet take longer
MAX_ITEMS_AT_ONCE = 32  # that a thread gets
MIN_SECONDS = 3e-4  # of a call, as for JPEG files of 150 pixels; shorter ones wait for the interpreter's lock in threads
GRACE_SECONDS = 0.003  # before the mean time of the calls counts


def map_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return the results of `function` for all items, in order. Threads are used where calls turn out to be long enough.

    The first error of a call, or an interruption, is raised when the calls that have begun end; the others are not made.
    """
    todo = list(items)
    done = [function(item) for item in todo[:1]]  # which may include imports, and is not timed
    for first in range(1, len(todo), BLOCK):
        done += map_block(function, todo[first : first + BLOCK])
    return done


def map_block(function: Callable[[Item], Result], todo: Sequence[Item]) -> list[Result]:
    """Return the results for some items: of a loop as long as its calls are short, of threads for the rest."""
    done: list[Result] = []
    begun = time.perf_counter()
    while len(done) < len(todo) and time.perf_counter() - begun < len(done) * MIN_SECONDS + GRACE_SECONDS:
        done.append(function(todo[len(done)]))
    left = todo[len(done) :]
    if not left:
        return done
    size = max(1, min(MAX_ITEMS_AT_ONCE, len(left) // (4 * THREADS)))
    with ThreadPoolExecutor(min(THREADS, len(left))) as pool:
        try:
            parts = [
                pool.submit(lambda part: [function(item) for item in part], left[i : i + size])
                for i in range(0, len(left), size)
            ]
            return done + [result for part in parts for result in part.result()]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise

"""Calls of a function in threads, for work that releases the interpreter's lock, such as reading and decoding files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
THREADS = min(16, (os.cpu_count() or 2) * 2)
MAX_ITEMS_AT_ONCE = 32  # that a thread gets
MIN_SECONDS = (
    3e-4  # of a call; threads make shorter ones slower, because they wait for the interpreter's lock: JPEG files of 150 pixels
)
GRACE_SECONDS = 0.003  # before the mean time of the calls counts


def map_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return the results of `function` for all items, in order. Threads are used as soon as calls turn out to be long enough.

    The first error of a call, or an interruption, is raised when the calls that have begun end; the others are not made.
    """
    todo = list(items)
    done = [function(item) for item in todo[:1]]  # which may include imports, and is not timed
    begun = time.perf_counter()
    while len(done) < len(todo) and time.perf_counter() - begun < (len(done) - 1) * MIN_SECONDS + GRACE_SECONDS:
        done.append(function(todo[len(done)]))
    todo = todo[len(done) :]
    if not todo:
        return done
    size = max(1, min(MAX_ITEMS_AT_ONCE, len(todo) // (4 * THREADS)))
    with ThreadPoolExecutor(min(THREADS, len(todo))) as pool:
        try:
            parts = [
                pool.submit(lambda part: [function(item) for item in part], todo[i : i + size])
                for i in range(0, len(todo), size)
            ]
            return done + [result for part in parts for result in part.result()]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise

"""Calls of a function in threads."""

from __future__ import annotations

import threading
import time

import pytest

from fieldguide.core.threads import GRACE_SECONDS, map_threads


def pause_and_return(i: int) -> int:
    time.sleep(0.002 * (i % 3))
    return i


def name_thread_late(i: int) -> int:
    time.sleep(2 * GRACE_SECONDS)
    return threading.get_ident()


def test_results_come_in_the_order_of_the_items():
    assert map_threads(pause_and_return, range(200)) == list(range(200))


def test_short_calls_use_no_threads():
    assert set(map_threads(lambda i: threading.get_ident(), range(2000))) == {threading.get_ident()}


def test_long_calls_use_threads():
    assert len(set(map_threads(name_thread_late, range(50)))) > 2


def test_after_an_error_no_further_calls_are_made():
    made = []

    def call(i: int) -> None:
        time.sleep(0.002)
        made.append(i)
        if i == 5:
            raise ValueError("5 fails")

    with pytest.raises(ValueError, match="5 fails"):
        map_threads(call, range(3000))
    assert len(made) < 1000


def test_without_items_there_are_no_results():
    assert map_threads(str, []) == []

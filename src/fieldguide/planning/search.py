"""The largest batch or length whose upper bound of memory is within a limit."""

from __future__ import annotations

from collections.abc import Callable

from fieldguide.planning.records import Trace
from fieldguide.planning.scaling import interpolate

MAX_TRIALS = 12  # sizes that are tried
MOST_GROWTH = 64  # of the number from one trial to the next, when traces do not tell the slope
CLOSE_ENOUGH = 0.97  # of the limit, at which the search ends
TOLERANCE = 0.01  # of the bound, by which a trace may differ from what was interpolated
GROWING = 1.2  # operations per operation of half the size, above which a network is unrolled over time or rows

Bound = Callable[[int], int]


def find_largest(bound: Bound, limit: int, tried: dict[int, int], most: int, growth: float = float("inf")) -> int:
    """Return the largest number whose bound is within the limit, 0 if none is.

    A line through the closest sizes below and above the limit gives the next size to try. `tried` holds bounds that are known.
    """

    def bound_of(number: int) -> int:
        if number not in tried:
            tried[number] = bound(number)
        return tried[number]

    if not any(value <= limit for value in tried.values()) and bound_of(1) > limit:
        return 0
    for _ in range(MAX_TRIALS):
        below = max(n for n in tried if tried[n] <= limit)
        above = min((n for n in tried if tried[n] > limit), default=None)
        if (
            below >= most
            or tried[below] >= CLOSE_ENOUGH * limit
            or (above is not None and above - below <= max(1, below // 50))
        ):
            break
        points = sorted(tried.items())
        if above is None and len(points) == 1:
            guess = min(2 * below, most)
        else:
            (a, at_a), (b, at_b) = points[-2:] if above is None else ((below, tried[below]), (above, tried[above]))
            slope = max((at_b - at_a) / (b - a), 1.0)
            guess = int(below + 0.99 * (limit - tried[below]) / slope)
        guess = int(min(max(guess, below + 1), most, above - 1 if above else growth * below))
        if guess in tried:
            break
        bound_of(guess)
    return max((n for n in tried if tried[n] <= limit), default=0)


def search(
    trace: Callable[[int], Trace],
    bound: Callable[[Trace, int], int],
    limit: int,
    start: int,
    most: int,
    degree: int,
    checkable: int,
) -> int:
    """Return the largest number, up to `most`, for which the bound of its trace is within the limit; 0 if none is.

    Two or three traces give all others if their operations are the same, and the answer is traced to check it. Numbers above
    `checkable` are checked there instead. If the check fails, sizes are traced one by one.
    """
    most = max(most, 1)
    traces: dict[int, Trace] = {}

    def trace_of(number: int) -> Trace:
        if number not in traces:
            traces[number] = trace(number)
        return traces[number]

    start = min(start, most)
    if sum(trace_of(start).later_steps().initial.values()) > limit:
        return 0
    points = [start, max(1, start // 2)] if degree > 1 or 2 * start > most else [start, 2 * start]
    if len(set(points)) == 1:
        points = [start, min(start + 1, most)]
    counts = [len(trace_of(number).work) for number in points]
    exact: dict[int, int] = {}

    def exact_bound(number: int) -> int:
        if number not in exact:
            exact[number] = bound(trace_of(number), number)
        return exact[number]

    def extend_line(*numbers: int) -> int:
        (a, at_a), (b, at_b) = sorted((number, exact_bound(number)) for number in numbers)
        line = int(a + (limit - at_a) / max((at_b - at_a) / (b - a), 1e-9)) if b > a else a
        return max(0, min(line, most))

    if max(counts) > GROWING * min(counts):  # unrolled over time or rows: memory grows with the number of operations
        return extend_line(*points)
    if degree > 1:
        third = most if most <= checkable else 2 * start
        if third not in points:
            if third == most and exact_bound(most) <= limit:
                return most
            trace_of(third)
    make = interpolate(traces, degree)
    if make is None:
        for number in list(traces):
            exact_bound(number)
        return find_largest(exact_bound, limit, exact, most, MOST_GROWTH)
    found = find_largest(
        lambda number: bound(make(number), number), limit, {number: exact_bound(number) for number in traces}, most
    )
    if found in exact:
        return found
    check = max(1, min(found, checkable))
    expected = bound(make(check), check)
    if abs(exact_bound(check) / expected - 1) <= TOLERANCE and (check < found or exact[check] <= limit):
        return found
    if len(trace_of(check).work) > GROWING * max(counts):  # computed in chunks of rows: traces of larger numbers take long
        return extend_line(check // 2, check)
    return find_largest(exact_bound, limit, exact, most, MOST_GROWTH)

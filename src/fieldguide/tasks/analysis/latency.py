"""The time of a prediction, for one example and for a batch."""

from __future__ import annotations

import time

import numpy as np

from fieldguide.tasks.analysis.context import Deadline, ReportContext

BATCH_EXAMPLES = 64
MAX_REPEATS = 20
TIME_FRACTION = 0.15  # of the time of all analyses


def measure_latency(context: ReportContext) -> dict[str, float]:
    """Return the median seconds of predicting one example and a batch, from rows to post-processed outputs.

    Files are read, the network is loaded and warm. The first call of each size is not counted, unless it alone takes too long.
    """
    deadline = context.deadline.part(TIME_FRACTION)
    found: dict[str, float] = {}
    batch = min(BATCH_EXAMPLES, len(context.test))
    for name, count, fraction in (("one", 1, 0.4), ("batch", batch, 1.0)):
        if context.seconds_per_example * count > deadline.left and found:
            break
        found[name] = time_prediction(context, count, Deadline(fraction * deadline.left))
        found[f"{name}_examples"] = count
    return found


def time_prediction(context: ReportContext, count: int, deadline: Deadline) -> float:
    """Return the median time of predicting the first `count` test rows."""
    data = context.test.take(np.arange(count))
    times: list[float] = []
    while len(times) < 2 or (len(times) <= MAX_REPEATS and not deadline.is_over):
        started = time.perf_counter()
        context.predict(data)
        times.append(time.perf_counter() - started)
        if len(times) == 1 and deadline.is_over:
            return times[0]
    return float(np.median(times[1:]))

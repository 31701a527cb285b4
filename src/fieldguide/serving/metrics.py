"""Counters of the server in the text format of Prometheus (version 0.0.4)."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fieldguide.serving.models import ModelPool

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds


class Metrics:
    """Counts responses by route and status, and their times."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.responses: Counter[tuple[str, int]] = Counter()
        self.seconds: Counter[str] = Counter()
        self.buckets: Counter[tuple[str, float]] = Counter()
        self.disconnects = 0
        self.in_progress = 0

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count a response."""
        with self.lock:
            self.responses[route, status] += 1
            self.seconds[route] += seconds  # type: ignore[assignment]  # a Counter of floats
            for bound in BOUNDS:
                if seconds <= bound:
                    self.buckets[route, bound] += 1

    def to_text(self, pool: ModelPool) -> str:
        """Return all counters as text."""
        lines: list[str] = []

        def add(name: str, kind: str, about: str, values: dict[str, float]) -> None:
            lines.extend((f"# HELP fieldguide_{name} {about}", f"# TYPE fieldguide_{name} {kind}"))
            lines.extend(f"fieldguide_{name}{labels} {value:g}" for labels, value in values.items())

        with self.lock:
            responses, buckets, seconds = dict(self.responses), dict(self.buckets), dict(self.seconds)
        totals: Counter[str] = Counter()
        for (route, _), count in responses.items():
            totals[route] += count
        counted = {write_labels(route=route, status=status): float(n) for (route, status), n in responses.items()}
        add("responses_total", "counter", "Responses by route and status.", counted)
        times: dict[str, float] = {}
        lines.extend(
            (
                "# HELP fieldguide_response_seconds Time until the end of a response.",
                "# TYPE fieldguide_response_seconds histogram",
            )
        )
        for route, total in totals.items():
            for bound in BOUNDS:
                times["_bucket" + write_labels(route=route, le=f"{bound:g}")] = buckets.get((route, bound), 0)
            times["_bucket" + write_labels(route=route, le="+Inf")] = total
            times["_sum" + write_labels(route=route)] = seconds[route]
            times["_count" + write_labels(route=route)] = total
        lines.extend(f"fieldguide_response_seconds{name} {value:g}" for name, value in times.items())
        add("requests_in_progress", "gauge", "Requests whose answers have not ended, this one too.", {"": self.in_progress})
        add("disconnects_total", "counter", "Clients that left before the answer.", {"": self.disconnects})
        models = {write_labels(model=name): served for name, served in pool.served.items()}
        for name, kind, about, get in (
            ("queue_depth", "gauge", "Requests that wait.", lambda s: s.worker.depth),
            ("batches_total", "counter", "Batches computed.", lambda s: s.worker.batches),
            ("batch_rows_total", "counter", "Rows in these batches.", lambda s: s.worker.batched),
            ("busy_seconds_total", "counter", "Time in which the model computed.", lambda s: s.worker.busy),
            ("slots_in_use", "gauge", "Texts that are generated now.", lambda s: sum(len(e.rows) for e in s.worker.engines)),
            ("tokens_total", "counter", "Tokens generated.", lambda s: sum(e.generated for e in s.worker.engines)),
            ("reloads_total", "counter", "Newer runs that replaced the model.", lambda s: s.reloads),
        ):
            add(name, kind, about, {labels: float(get(served)) for labels, served in models.items()})
        return "\n".join(lines) + "\n"


def write_labels(**labels: object) -> str:
    """Return labels in braces."""
    escaped = {name: str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for name, value in labels.items()}
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"

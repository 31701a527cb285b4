"""The measured errors of plans: corrections and upper bounds by family, from the table that benchmarks/plan_errors.py writes."""

from __future__ import annotations

import csv
import functools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("errors.csv")
NUMBERS = (
    "base",
    "measured",
    "allocated",
    "resident",
    "best",
    "median",
    "ops",
    "flops",
    "moved",
    "planned",
    "plan_seconds",
    "idle",
)
UPPER_SHARE = 0.99  # of the measured cells that the upper bound must cover
UPPER_MARGIN, FEW_CELLS_MARGIN = 1.02, 2.0  # the second is divided by the number of cells: few cells may miss the worst
DEFAULT_UPPER = 1.4  # for a family without measurements
PROCESS_BYTES = 350 << 20  # of a process that has loaded torch and this library, if nothing was measured
MIN_CELLS = 8  # below this number, a family takes the corrections of all families


@dataclass(frozen=True)
class Correction:
    """Corrections of a family and mode, and its errors after them.

    `memory` and `seconds` are factors; `extra` are bytes that do not depend on the network. `upper` is the factor from the
    corrected memory to its upper bound. Errors are relative: medians and 95th percentiles of the absolute value.
    """

    cells: int
    memory: float = 1.0
    extra: int = 0
    upper: float = DEFAULT_UPPER
    seconds: float = 1.0
    memory_median: float = float("nan")
    memory_p95: float = float("nan")
    seconds_median: float = float("nan")
    seconds_p95: float = float("nan")

    def correct(self, resident: float) -> int:
        return int(self.memory * resident) + self.extra


@functools.cache
def read_table(path: Path = TABLE) -> tuple[dict[str, Any], ...]:
    """Return the measured cells, or none if there is no table."""
    if not path.exists():
        return ()
    with open(path, encoding="utf-8", newline="") as file:
        return tuple({k: float(v) if k in NUMBERS else v for k, v in row.items()} for row in csv.DictReader(file))


def get_process_bytes(mode: str, path: Path = TABLE) -> int:
    """Return the memory of a process that has trained or predicted something tiny."""
    bases = [row["base"] for row in read_table(path) if row["mode"] == mode]
    return int(statistics.median(bases)) if bases else PROCESS_BYTES


def quantile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


@functools.cache
def get_correction(family: str, mode: str, path: Path = TABLE, without: str = "") -> Correction:
    """Return the corrections for a family, learnt from its cells; `without` leaves out an architecture."""
    rows = [row for row in read_table(path) if row["mode"] == mode and row["architecture"] != without]
    own = [row for row in rows if row["family"] == family]
    chosen = own if len(own) >= MIN_CELLS else rows
    if len(chosen) < MIN_CELLS:
        return Correction(len(chosen))
    return learn(chosen)


def learn(rows: list[dict[str, Any]]) -> Correction:
    """Fit a factor and a constant to the memory of cells, and a factor to their seconds, by medians (Theil and Sen)."""
    points = sorted((row["resident"], row["measured"]) for row in rows)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(points) for b in points[i + 1 :] if b[0] > 1.2 * a[0]]
    memory = min(max(statistics.median(slopes), 0.8), 1.3) if slopes else 1.0
    extra = max(statistics.median(row["measured"] - memory * row["resident"] for row in rows), 0.0)
    timed = [row for row in rows if row["idle"] and row["planned"] > 0]  # times on a busy machine say nothing
    seconds = statistics.median(row["best"] / row["planned"] for row in timed) if timed else 1.0
    correct: Callable[[dict[str, Any]], float] = lambda row: memory * row["resident"] + extra
    misses = [abs(correct(row) / row["measured"] - 1) for row in rows]
    late = [abs(seconds * row["planned"] / row["best"] - 1) for row in timed]
    return Correction(
        len(rows),
        memory,
        int(extra),
        max(
            (UPPER_MARGIN + FEW_CELLS_MARGIN / len(rows))
            * quantile((row["measured"] / correct(row) for row in rows), UPPER_SHARE),
            1.0,
        ),
        seconds,
        statistics.median(misses),
        quantile(misses, 0.95),
        statistics.median(late) if late else float("nan"),
        quantile(late, 0.95),
    )


def judge(path: Path = TABLE) -> list[dict[str, Any]]:
    """Return the cells with the errors of plans that were corrected without the cells of the same architecture."""
    judged = []
    for row in read_table(path):
        rule = get_correction(row["family"], row["mode"], path, row["architecture"])
        planned, total = rule.correct(row["resident"]), row["base"] + row["measured"]
        judged.append(
            {
                **row,
                "net": planned / row["measured"] - 1,
                "total": (row["base"] + planned) / total - 1,
                "over": row["measured"] > rule.upper * planned,
                "time": rule.seconds * row["planned"] / row["best"] - 1,
            }
        )
    return judged


def describe(path: Path = TABLE) -> str:
    """Return the errors by family and mode as a table in Markdown."""
    read_table.cache_clear()
    get_correction.cache_clear()
    rows = judge(path)
    lines = [
        "| family | mode | cells | peak, whole process: median, p95 | peak above the idle process: median, p95 | above the upper "
        "bound | time of a step: median, p95 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    keys = sorted({(row["family"], row["mode"]) for row in rows})
    for family, mode in [*keys, ("all", "train"), ("all", "predict"), ("all", "both")]:
        chosen = [r for r in rows if family in (r["family"], "all") and mode in (r["mode"], "both")]
        if not chosen:
            continue
        cells = []
        for key in ("total", "net", "time"):
            misses = [abs(row[key]) for row in chosen if row["idle"] or key != "time"]
            cells.append(f"{statistics.median(misses):.1%}, {quantile(misses, 0.95):.1%}" if misses else "not measured")
        over = sum(row["over"] for row in chosen) / len(chosen)
        lines.append(f"| {family} | {mode} | {len(chosen)} | {cells[0]} | {cells[1]} | {over:.1%} | {cells[2]} |")
    return "\n".join(lines)

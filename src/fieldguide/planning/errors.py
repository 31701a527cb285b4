"""The measured errors of plans: corrections and upper bounds by family, from the table that benchmarks/plan_errors.py writes."""

from __future__ import annotations

import csv
import functools
import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

from fieldguide.planning.timing import TERMS

TABLE = Path(__file__).with_name("errors.csv")
NUMBERS = (
    "base",
    "measured",
    "allocated",
    "resident",
    "fixed",
    "best",
    "median",
    "ops",
    "flops",
    "moved",
    "plan_seconds",
    "idle",
)
UPPER_SHARE = 0.99  # of the measured cells that the upper bound must cover
UPPER_MARGIN, FEW_CELLS_MARGIN = 1.05, 2.0  # the second is divided by the number of cells: few cells may miss the worst
DEFAULT_UPPER, DEFAULT_EXTRA = 1.5, 100 << 20  # for a family without measurements
FACTORS = np.arange(0.8, 1.31, 0.02)  # of what is planned, among which the best is chosen
PROCESS_BYTES = 350 << 20  # of a process that has loaded torch and this library, if nothing was measured
PRIOR_WEIGHT = 0.00003  # of a factor of 1, relative to all cells
MAX_FACTOR = 10.0
ROUNDS = 20  # of reweighting
MIN_CELLS = 16  # below this number, a family takes the corrections of all families


@dataclass(frozen=True)
class Correction:
    """Corrections of a family and mode, and its errors after them.

    What lasts, such as weights and the state of the optimizer (`fixed`), is known. `memory` is a factor for the rest, and `extra`
    are bytes that do not depend on the network. The upper bound has `upper` times the rest, and `upper_extra`. `factors` are those
    of the terms of a step's time.
    Errors are relative, of the whole process: medians and 95th percentiles of the absolute value.
    """

    cells: int
    memory: float = 1.0
    extra: int = 0
    upper: float = DEFAULT_UPPER
    upper_extra: int = DEFAULT_EXTRA
    factors: Mapping[str, float] = field(default_factory=dict)
    memory_median: float = float("nan")
    memory_p95: float = float("nan")
    seconds_median: float = float("nan")
    seconds_p95: float = float("nan")

    def correct(self, resident: float, fixed: float) -> int:
        """Return the memory above that of the idle process."""
        return int(fixed + self.memory * max(resident - fixed, 0)) + self.extra

    def bound(self, resident: float, fixed: float) -> int:
        """Return the upper bound of `correct`."""
        return max(int(fixed + self.upper * max(resident - fixed, 0)) + self.upper_extra, self.correct(resident, fixed))


@functools.cache
def read_table(path: Path = TABLE) -> tuple[dict[str, Any], ...]:
    """Return the measured cells, or none if there is no table."""
    if not path.exists():
        return ()
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["resident"]]  # planned ones
        typed = ({k: float(v or 0) if k in NUMBERS else v for k, v in row.items()} for row in rows)
        return tuple({**row, "terms": json.loads(str(row.get("terms") or "{}"))} for row in typed)


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
    """Fit the corrections of memory and of seconds to cells, and the bound that covers `UPPER_SHARE` of them."""
    memory, extra = fit_memory(rows)
    timed = [row for row in rows if row["idle"]]  # times on a busy machine say nothing
    factors = fit_seconds(timed)
    rule = Correction(len(rows), memory, extra, factors=factors)
    misses = [abs(get_error(row, rule)) for row in rows]
    late = [abs(get_time_error(row, rule)) for row in timed]
    upper, upper_extra = fit_bound(rows, memory, extra)
    return replace(
        rule,
        upper=upper,
        upper_extra=upper_extra,
        memory_median=statistics.median(misses),
        memory_p95=quantile(misses, 0.95),
        seconds_median=statistics.median(late) if late else float("nan"),
        seconds_p95=quantile(late, 0.95),
    )


def fit_memory(rows: list[dict[str, Any]]) -> tuple[float, int]:
    """Return the factor and the constant with the least sum of absolute errors relative to the whole process."""
    rest = np.array([max(row["resident"] - row["fixed"], 0.0) for row in rows])
    over = np.array([row["measured"] - row["fixed"] for row in rows])
    weight = 1 / np.array([row["base"] + row["measured"] for row in rows])
    best = (float("inf"), 1.0, 0)
    for factor in FACTORS:
        left = over - factor * rest
        order = np.argsort(left)
        middle = np.searchsorted(np.cumsum(weight[order]), weight.sum() / 2)  # a weighted median
        extra = max(float(left[order][min(middle, len(left) - 1)]), 0.0)
        best = min(best, (float((np.abs(left - extra) * weight).sum()), float(factor), int(extra)))
    return best[1], best[2]


def fit_seconds(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the factors of the terms of a step's time, by least squares of the relative error.

    Rows whose error stays large count less, as those of steps that were disturbed do. A term that is a small part of all these steps
    keeps a factor near 1, and none exceeds `MAX_FACTOR`: other shapes may consist of it.
    """
    used = [name for name in TERMS if any(name in row["terms"] for row in rows)]
    if len(rows) < 2 * len(used) or not used:
        return {}
    table = np.array([[row["terms"].get(name, 0.0) / row["best"] for name in used] for row in rows])
    weight = np.ones(len(rows))
    factors = np.ones(len(used))
    for _ in range(ROUNDS):
        prior = np.sqrt(PRIOR_WEIGHT * (weight**2).sum()) * np.eye(len(used))
        system = np.concatenate([table * weight[:, None], prior])
        factors = lsq_linear(system, np.concatenate([weight, prior.sum(1)]), (1 / MAX_FACTOR, MAX_FACTOR)).x
        weight = 1 / np.sqrt(np.maximum(np.abs(table @ factors - 1), 0.05))  # towards the least sum of absolute errors
    return dict(zip(used, factors.tolist()))


def get_time_error(row: dict[str, Any], rule: Correction) -> float:
    """Return the relative error of the planned time of a step."""
    return sum(rule.factors.get(name, 1.0) * seconds for name, seconds in row["terms"].items()) / row["best"] - 1


def fit_bound(rows: list[dict[str, Any]], memory: float, extra: int) -> tuple[float, int]:
    """Return the factor and constant of the lowest bound, on the average, that covers `UPPER_SHARE` of the cells.

    With few cells, the worst one is probably not among them, so the bound is wider.
    """
    rest = np.array([max(row["resident"] - row["fixed"], 0.0) for row in rows])
    over = np.array([row["measured"] - row["fixed"] for row in rows])
    weight = 1 / np.array([row["base"] + row["measured"] for row in rows])
    wider = UPPER_MARGIN + FEW_CELLS_MARGIN / len(rows)
    best = (float("inf"), DEFAULT_UPPER, DEFAULT_EXTRA)
    for factor in np.arange(memory, 3.0, 0.05):
        left = np.sort(over - factor * rest)
        constant = max(float(left[min(len(left) - 1, int(UPPER_SHARE * len(left)))]), extra)
        best = min(best, (float(((factor * rest + constant) * weight).sum()), float(factor), int(constant)))
    return wider * best[1], int(wider * best[2])


def get_error(row: dict[str, Any], rule: Correction) -> float:
    """Return the relative error of the planned memory of the whole process."""
    return (row["base"] + rule.correct(row["resident"], row["fixed"])) / (row["base"] + row["measured"]) - 1


def judge(path: Path = TABLE) -> list[dict[str, Any]]:
    """Return the cells with the errors of plans that were corrected without the cells of the same architecture."""
    judged = []
    for row in read_table(path):
        rule = get_correction(row["family"], row["mode"], path, row["architecture"])
        judged.append(
            {
                **row,
                "net": rule.correct(row["resident"], row["fixed"]) / row["measured"] - 1,
                "total": get_error(row, rule),
                "over": row["measured"] > rule.bound(row["resident"], row["fixed"]),
                "slack": (row["base"] + rule.bound(row["resident"], row["fixed"])) / (row["base"] + row["measured"]) - 1,
                "time": get_time_error(row, rule),
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

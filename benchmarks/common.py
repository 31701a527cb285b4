"""What all benchmarks share: the machine in words, timing side by side, tables, and the book of results.

Ours and the peer take turns in one process, so that a busy machine is unfair to both alike; each keeps its best round.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"


def machine() -> str:
    """Cores, processor, memory and accelerator in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")] \
        if cpu.exists() else []
    flags = " with AMX" if cpu.exists() and "amx_bf16" in cpu.read_text() else ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores {names[0] if names else platform.machine()}{flags}, {memory:.0f} GB, {gpu}"


def commit() -> str:
    """The commit that is measured, marked where files differ from it."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "../src") else "")


def race(runs: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, list[float]]:
    """Seconds of every round of each; they take turns, after one round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        names = list(runs) if turn % 2 else list(reversed(runs))
        for name in names:
            started = time.perf_counter()
            runs[name]()
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def ratio(times: Mapping[str, Sequence[float]], ours: str, peer: str) -> tuple[float, float, float]:
    """How many times faster ours is, by the best round of each, and the range over pairs of rounds."""
    pairs = sorted(p / o for o, p in zip(times[ours], times[peer]))
    return min(times[peer]) / min(times[ours]), pairs[0], pairs[-1]


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, its columns aligned."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(columns), *cells]) for i in range(len(columns))]
    line = lambda row: "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |"        # noqa: E731
    return "\n".join([line(columns), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, cells)])


def report(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], save: bool, note: str = "") -> None:
    """Prints a table and, where asked, adds it to the book of results with date, commit and machine."""
    text = table(columns, rows) + (f"\n\n{note}" if note else "")
    print(text)
    if save:
        head = f"\n## {title}\n\n{datetime.date.today()}, commit {commit()}, {machine()}, torch {torch.__version__}\n\n"
        with RESULTS.open("a") as book:
            book.write(head + text + "\n")


def arguments(about: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--save", action="store_true", help="add the result to RESULTS.md")
    parser.add_argument("--threads", type=int, help="threads of torch; default: all cores")
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    return options

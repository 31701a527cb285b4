"""Shared parts of all benchmarks: timing, memory, tables, and RESULTS.md.

Ours and the peer take turns in one process, so that a busy machine slows both; the best round of each counts. The memory of each side
is measured in its own process.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

Run = Callable[[int], object]  # runs a number of steps

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
sys.path.append(str(HERE.parent / "tests"))  # its module `tv` imports peers if torchvision lacks its operators


def describe_machine() -> str:
    """Return cores, processor, memory and accelerator in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
        if cpu.exists()
        else []
    )
    flags = " with AMX" if cpu.exists() and "amx_bf16" in cpu.read_text() else ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores {names[0] if names else platform.machine()}{flags}, {memory:.0f} GB, {gpu}"


def read_commit() -> str:
    """Return the measured commit, with a + if files under src differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "../src") else "")


def time_in_turns(
    runs: Mapping[str, Callable[[], object]], rounds: int = 7, limit: float = math.inf, warm: bool = True
) -> dict[str, list[float]]:
    """Return the seconds of every round of each run.

    The runs take turns, after one round that does not count if `warm`. No round starts after `limit` seconds, except the first three.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for turn in range(0 if warm else 1, rounds + 1):
        if turn > 3 and time.perf_counter() - began > limit:
            break
        names = list(runs) if turn % 2 else list(reversed(runs))
        for name in names:
            started = time.perf_counter()
            runs[name]()
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def compute_ratio(times: Mapping[str, Sequence[float]], ours: str, peer: str) -> tuple[float, float, float]:
    """Return how many times faster ours is by the best round of each, and the range over pairs of rounds."""
    pairs = sorted(p / o for o, p in zip(times[ours], times[peer]))
    return min(times[peer]) / min(times[ours]), pairs[0], pairs[-1]


@dataclass(frozen=True)
class Pair:
    """One line of a comparison.

    Attributes:
        ours, peer: build what they need, and return a function that runs a number of steps.
        amount: work of one step, in the unit of the table.
        others: work of one step of the peer, if that differs.
        steps: steps of a round, if the options' number does not suit.
        room: GB that both sides need together; with less free memory, the line is not run and says so.
    """

    what: str
    ours: Callable[[], Run]
    peer: Callable[[], Run]
    amount: float
    others: float | None = None
    steps: int | None = None
    room: float = 0.0


def read_free_memory() -> float:
    """Return the available memory in GB."""
    path = Path("/proc/meminfo")
    line = (
        next((line for line in path.read_text().splitlines() if line.startswith("MemAvailable")), None)
        if path.exists()
        else None
    )
    return int(line.split()[1]) / 2**20 if line else float("inf")


def compare(
    title: str, unit: str, peer: str, pairs: Sequence[Pair], options: argparse.Namespace, check: Callable[[], str] = str
) -> None:
    """Measure the memory of each side, run `check`, then measure the time.

    `check` raises if the sides differ, and returns a note about how close they are. Memory comes first, because a process must be
    forked before it has threads.
    """
    pairs = [pair for pair in pairs if options.only in pair.what]
    too_large = [
        [pair.what, *["-"] * 5, f"not run: {pair.room:.0f} GB of memory are needed, {read_free_memory():.0f} free"]
        for pair in pairs
        if pair.room > read_free_memory()
    ]
    pairs = [pair for pair in pairs if pair.room <= read_free_memory()]
    memory = [(measure_peak(pair.ours), measure_peak(pair.peer)) for pair in pairs]
    note = check()
    print(note)
    rows = []
    for pair, (mine, theirs) in zip(pairs, memory):
        steps = pair.steps or options.steps
        runs = {"ours": pair.ours(), "peer": pair.peer()}
        times = time_in_turns(
            {side: lambda run=run, steps=steps: run(steps) for side, run in runs.items()}, options.rounds, options.seconds
        )
        amounts = (pair.amount, pair.others or pair.amount)
        speed = [amount * steps / min(times[side]) for side, amount in zip(("ours", "peer"), amounts)]
        best, low, high = (amounts[0] / amounts[1] * x for x in compute_ratio(times, "ours", "peer"))
        rows.append(
            [
                pair.what,
                *map(format_figure, speed),
                f"{best:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{mine:.0f} / {theirs:.0f}",
                f"{theirs / mine:.2f}" if mine > 0 else "-",
            ]
        )
        print(" | ".join(rows[-1]), flush=True)  # shown at once, since all lines may take long
        del runs
        gc.collect()
    report(
        title,
        ["", f"ours, {unit}/s", f"{peer}, {unit}/s", "ratio", "rounds", "MB, ours / peer", "ratio"],
        rows + too_large,
        options.save,
        note,
    )


def format_figure(x: float) -> str:
    """Return a number with three digits, or with thousands separated."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def measure_peak(make: Callable[[], Run]) -> float:
    """Return the peak memory of building a side and two of its steps in MB, without that of imports; NaN on systems without /proc.

    The side runs in a fork of this process, whose peak starts at its current memory (VmHWM; `ru_maxrss` would start at the parent's
    peak).
    """
    if not Path("/proc/self/status").exists():
        return float("nan")
    import torch._dynamo  # noqa: F401  imported by the first step of any optimizer

    from fieldguide.models.registry import cards

    cards()  # imports all model files

    def child(pipe) -> None:
        before = read_peak()
        make()(2)
        pipe.send(read_peak() - before)

    gc.collect()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender,))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit("a process failed while its memory was measured: see above") from None
    finally:
        process.join()


def read_peak() -> float:
    """Return the peak memory of this process in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def describe_sizes(*models: nn.Module) -> str:
    """Return a sentence with the numbers of parameters of ours and the peer."""
    ours, peer = (sum(p.numel() for p in model.parameters()) for model in models)
    return f"Parameters: {ours:,} ours, {peer:,} the peer's."


def check_equal(what: str, ours: torch.Tensor, peer: torch.Tensor, within: float = 1e-4) -> str:
    """Return a sentence about the largest difference of two outputs.

    Raises `AssertionError` if it exceeds a fraction `within` of their standard deviation.
    """
    gap, size = (ours - peer).abs().max().item(), peer.std().item()
    assert ours.shape == peer.shape and gap < within * size, (
        f"{what} differ by {gap:.1e}, their standard deviation is {size:.1e}"
    )
    return f"Same weights, same {what}: largest difference {gap:.1e}, standard deviation {size:.2g}."


def format_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table with aligned columns."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(columns), *cells]) for i in range(len(columns))]
    line = lambda row: "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |"
    return "\n".join([line(columns), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, cells)])


def report(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], save: bool, note: str = "") -> None:
    """Print a table and, with `save`, append it to RESULTS.md with date, commit and machine."""
    text = format_table(columns, rows) + (f"\n\n{note}" if note else "")
    print(text)
    if save:
        head = f"\n## {title}\n\n{datetime.date.today()}, commit {read_commit()}, {describe_machine()}, torch {torch.__version__}\n\n"
        with RESULTS.open("a") as file:
            file.write(head + text + "\n")


def make_parser(about: str, steps: int | None = None, rounds: int = 5) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark and, if `steps` is given, those of `compare`."""
    parser = argparse.ArgumentParser(description=about)
    if steps:
        parser.add_argument("--steps", type=int, default=steps, help="steps of a round")
        parser.add_argument("--rounds", type=int, default=rounds)
        parser.add_argument("--seconds", type=float, default=40, help="after which no round starts, except the first three")
        parser.add_argument("--only", default="", help="run only lines that contain this text")
    parser.add_argument("--save", action="store_true", help="add the result to RESULTS.md")
    parser.add_argument("--threads", type=int, help="threads of torch; default: all cores")
    return parser


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, and set the number of threads."""
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    return options

"""What all benchmarks share: the machine in words, timing side by side, memory, tables, and the book of results.

Ours and the peer take turns in one process, so that a busy machine is unfair to both alike; each keeps its best round.
Memory is measured of each side in a process of its own.
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

Run = Callable[[int], object]  # does so many steps of something

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
sys.path.append(str(HERE.parent / "tests"))  # its `tv` imports peers where torchvision is not whole


def machine() -> str:
    """Cores, processor, memory and accelerator in one line."""
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


def commit() -> str:
    """The commit that is measured, marked where files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "../src") else "")


def race(
    runs: Mapping[str, Callable[[], object]], rounds: int = 7, limit: float = math.inf, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of every round of each; they take turns, after one round that warms up, if `warm`. After `limit` seconds no
    round begins, but three are made."""
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


def ratio(times: Mapping[str, Sequence[float]], ours: str, peer: str) -> tuple[float, float, float]:
    """How many times faster ours is, by the best round of each, and the range over pairs of rounds."""
    pairs = sorted(p / o for o, p in zip(times[ours], times[peer]))
    return min(times[peer]) / min(times[ours]), pairs[0], pairs[-1]


@dataclass(frozen=True)
class Pair:
    """One line of a comparison. `ours` and `peer` make what they need and return what does so many steps; `amount` is the
    work of one step, in the unit of the table, `others` that of the peer's where it does less; `steps` of a round, where
    the options' are too many or few; `room` in GB that both sides need together: where less is free, the line says so."""

    what: str
    ours: Callable[[], Run]
    peer: Callable[[], Run]
    amount: float
    others: float | None = None
    steps: int | None = None
    room: float = 0.0


def free() -> float:
    """GB of memory that nothing uses, or could be made so."""
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
    """Memory of each side, then `check` (raises where the two do not agree, else says how they do), then time.

    Memory comes first: a child must begin before its parent has threads.
    """
    pairs = [pair for pair in pairs if options.only in pair.what]
    short = [
        [pair.what, *["-"] * 5, f"not run: {pair.room:.0f} GB of memory are needed, {free():.0f} free"]
        for pair in pairs
        if pair.room > free()
    ]
    pairs = [pair for pair in pairs if pair.room <= free()]
    memory = [(peak(pair.ours), peak(pair.peer)) for pair in pairs]
    note = check()
    print(note)
    rows = []
    for pair, (mine, theirs) in zip(pairs, memory):
        steps = pair.steps or options.steps
        runs = {"ours": pair.ours(), "peer": pair.peer()}
        times = race(
            {side: lambda run=run, steps=steps: run(steps) for side, run in runs.items()}, options.rounds, options.seconds
        )
        amounts = (pair.amount, pair.others or pair.amount)
        speed = [amount * steps / min(times[side]) for side, amount in zip(("ours", "peer"), amounts)]
        best, low, high = (amounts[0] / amounts[1] * x for x in ratio(times, "ours", "peer"))
        rows.append(
            [
                pair.what,
                *map(figure, speed),
                f"{best:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{mine:.0f} / {theirs:.0f}",
                f"{theirs / mine:.2f}" if mine > 0 else "-",
            ]
        )
        print(" | ".join(rows[-1]), flush=True)  # who has not the time for all of them sees what there is
        del runs
        gc.collect()
    report(
        title,
        ["", f"ours, {unit}/s", f"{peer}, {unit}/s", "ratio", "rounds", "MB, ours / peer", "ratio"],
        rows + short,
        options.save,
        note,
    )


def figure(x: float) -> str:
    """Three digits, thousands apart."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def peak(make: Callable[[], Run]) -> float:
    """Megabytes that making something and two steps of it take at most, beyond what the imports of the script take; NaN
    where the system does not say.

    In a fork of this process, whose own peak the kernel counts anew (VmHWM; `ru_maxrss` would begin at the parent's).
    """
    if not Path("/proc/self/status").exists():
        return float("nan")
    import torch._dynamo  # noqa: F401   the first step of any optimiser imports it, in either side

    from fieldguide.models.registry import cards

    cards()  # imports all model files

    def child(pipe) -> None:
        before = resident()
        make()(2)
        pipe.send(resident() - before)

    gc.collect()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender,))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit("a side failed while its memory was measured: see above") from None
    finally:
        process.join()


def resident() -> float:
    """Most megabytes that this process has held in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def count(*models: nn.Module) -> str:
    """Parameters of ours and of the peer."""
    ours, peer = (sum(p.numel() for p in model.parameters()) for model in models)
    return f"Parameters: {ours:,} ours, {peer:,} the peer's."


def agree(what: str, ours: torch.Tensor, peer: torch.Tensor, within: float = 1e-4) -> str:
    """Asserts that two answers are the same but for rounding, in parts of their deviation; says so."""
    gap, size = (ours - peer).abs().max().item(), peer.std().item()
    assert ours.shape == peer.shape and gap < within * size, f"{what} differ by {gap:.1e}, their deviation is {size:.1e}"
    return f"Same weights, same {what}: largest difference {gap:.1e}, deviation {size:.2g}."


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, its columns aligned."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(columns), *cells]) for i in range(len(columns))]
    line = lambda row: "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |"
    return "\n".join([line(columns), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, cells)])


def report(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], save: bool, note: str = "") -> None:
    """Prints a table and, where asked, adds it to the book of results with date, commit and machine."""
    text = table(columns, rows) + (f"\n\n{note}" if note else "")
    print(text)
    if save:
        head = f"\n## {title}\n\n{datetime.date.today()}, commit {commit()}, {machine()}, torch {torch.__version__}\n\n"
        with RESULTS.open("a") as book:
            book.write(head + text + "\n")


def arguments(about: str, steps: int | None = None, rounds: int = 5) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes; with `steps`, also what `compare` does."""
    parser = argparse.ArgumentParser(description=about)
    if steps:
        parser.add_argument("--steps", type=int, default=steps, help="steps of a round")
        parser.add_argument("--rounds", type=int, default=rounds)
        parser.add_argument("--seconds", type=float, default=40, help="after which a line begins no third round")
        parser.add_argument("--only", default="", help="lines with these words alone")
    parser.add_argument("--save", action="store_true", help="add the result to RESULTS.md")
    parser.add_argument("--threads", type=int, help="threads of torch; default: all cores")
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    return options

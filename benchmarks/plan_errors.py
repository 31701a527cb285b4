"""Errors of the planned memory and time: `make plan-errors`.

Each cell trains or predicts in a fresh process and compares the largest resident memory above that of the idle process, and the
time of a step, with the plan. The table is src/fieldguide/planning/errors.csv, from which plans take their own error.
Cells that are in the table already are not measured again; `--all` starts anew, for step times on an idle machine.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import fcntl
import gc
import importlib
import io
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fieldguide.core.card import Card
from fieldguide.core.errors import FieldguideError
from fieldguide.core.files import write_atomically
from fieldguide.core.hardware import keep_memory
from fieldguide.core.settings import Settings
from fieldguide.models import registry
from fieldguide.planning import allocator, errors, machines
from fieldguide.planning.stepping import Silent, trace_prediction, trace_training
from fieldguide.planning.timing import plan_terms
from fieldguide.planning.workload import Shape, Workload, build_workload
from fieldguide.training.precision import autocast
from fieldguide.training.trainer import Trainer

TABLE = Path(errors.__file__).with_name("errors.csv")
KEY = ("architecture", "family", "size", "mode", "batch", "length", "side", "precision", "optimizer")
MEASURED = ("base", "measured", "best", "median", "idle")
PLANNED = ("allocated", "resident", "fixed", "ops", "flops", "moved", "terms", "plan_seconds")
FIELDS = [*KEY, *MEASURED, *PLANNED]
TARGET_BYTES, TARGET_FLOPS = 200 << 20, 20e9  # of a step with the smaller batch
MOST_PARAMETERS, LARGEST_PARAMETERS = 25e6, 150e6
STEPS = 3
PRIORITY = -15  # of a process that holds the lock
LOCK_SECONDS = 10.0  # that a cell waits for the lock before it runs without
BUSY_LOAD = 1.5  # load average above which other work runs, so that the times of a cell are not used
MOST_FLOPS = 150e9  # of a step; cells that take more are left out
SMALL = {  # fields of architectures whose published sizes are all too large
    **{"vocab_size": 8192, "length": 256, "dim": 256, "depth": 4, "heads": 4, "kv_heads": 2, "hidden": 768, "experts": 4},
    **{"vision_dim": 128, "vision_depth": 4, "vision_heads": 4, "vision_hidden": 512, "image": 112, "picture": 8000},
    **{"head_dim": 64, "axes": (16, 24, 24)},
}
LENGTH, FRAMES, SIDES = 96, 400, (96, 224, 256, 192)
PREDICTED_ROWS = 3  # times the rows of training


def count_parameters(card: Card, config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in card.make(config).parameters())


def choose_config(card: Card) -> tuple[str, Any]:
    """Return the largest size of at most `MOST_PARAMETERS`, or the smallest one, made smaller if it is too large, or the size for tests."""
    sized = sorted((count_parameters(card, card.resolve_config(s)), s) for s in card.sizes if s != card.tiny)
    able = [entry for entry in sized if entry[0] <= MOST_PARAMETERS]
    parameters, size = able[-1] if able else sized[0]
    if parameters <= LARGEST_PARAMETERS:
        return size, card.resolve_config(size)
    published = card.resolve_config(size)
    fits = lambda k, v: np.shape(getattr(published, k, None) or "") == np.shape(v)  # in some, heads differ by stage
    smaller = {k: v for k, v in SMALL.items() if k in published.__dataclass_fields__ and fits(k, v)}
    try:
        config = card.resolve_config(size, **smaller)
        if count_parameters(card, config) <= LARGEST_PARAMETERS:
            return f"{size}*", config
    except FieldguideError:
        pass  # the fields depend on each other
    return card.tiny, card.resolve_config(card.tiny)


def choose_shape(card: Card, config: Any) -> tuple[Shape, float]:
    """Return a batch for training of about `TARGET_BYTES` and at most `TARGET_FLOPS`, and the operations per row."""
    length = FRAMES if card.input_type == "speech" else LENGTH
    attempts = [
        (rows, side) for side in SIDES for rows in (1, 2)
    ]  # some networks take only certain sizes, or several rows at once
    for rows, side in attempts:
        try:
            one, two = (
                make_trace(card, config, Shape(count, length, side), "train", "float32", "adamw").later_steps()
                for count in (rows, 2 * rows)
            )
            break
        except (FieldguideError, RuntimeError, ValueError):
            if (rows, side) == attempts[-1]:
                raise
    fixed = sum(one.initial.values())
    by_row = max((two.find_peak()[0] - one.find_peak()[0]) / 2, (two.find_peak()[0] - fixed) / 16, 1) / rows
    flops = max(sum(work.flops for work in two.work) / (2 * rows), 1)
    return Shape(max(rows, int(min(TARGET_BYTES / by_row, TARGET_FLOPS / flops, 4096))), length, side), flops


def build_settings(batch: int, precision: str, optimizer: str) -> Settings:
    changes = {"optimizer": optimizer, "precision": precision, "batch_size": batch, "steps": 100, "eval_steps": 100}
    return Settings().with_({**changes, "channels_last": False})


def make_trace(card: Card, config: Any, shape: Shape, mode: str, precision: str, optimizer: str) -> Any:
    workload = build_workload(card, config, shape)
    if mode == "train":
        return trace_training(workload, build_settings(shape.batch, precision, optimizer))
    return trace_prediction(workload, precision)


def read_status(key: str) -> int:
    """Return a line of /proc/self/status in bytes. `ru_maxrss` would include the peak of the parent."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


@contextmanager
def hold_lock(lock: Path | None, seconds: float = LOCK_SECONDS) -> Iterator[bool]:
    """Hold the lock, and run with the highest priority that is allowed; say whether both were possible."""
    if lock is None:
        yield os.getloadavg()[0] < BUSY_LOAD
        return
    with open(lock, "w", encoding="utf-8") as file:
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    yield False
                    return
                time.sleep(0.2)
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
        yield True


def run_steps(workload: Workload, mode: str, settings: Settings, count: int, keep: bool = False) -> list[float]:
    """Run real steps and return the seconds of each."""
    taken = []
    batches = ({name: tensor.clone() for name, tensor in workload.batch.items()} for _ in itertools.count())
    if mode == "train":
        trainer = Trainer(workload.objective, None, settings, device=torch.device("cpu"), callback=Silent())  # type: ignore[arg-type]
        trainer.set_train_mode()
        if keep:
            keep_memory()
        stream = ((0, batch) for batch in batches)  # zip would keep the last one
        for _ in range(count):
            started = time.perf_counter()
            trainer.train_step(stream)
            taken.append(time.perf_counter() - started)
        return taken
    workload.objective.eval()
    with torch.inference_mode():
        for _ in range(count):
            started = time.perf_counter()
            batch = next(batches)
            for name in workload.labels:
                del batch[name]
            with autocast(torch.device("cpu"), settings.precision):
                outputs = workload.predict(workload.objective, batch)
            taken.append(time.perf_counter() - started)
            del outputs, batch
    return taken


def warm_up(mode: str, settings: Settings) -> None:
    """Run tiny networks, so that libraries and kernels are loaded before memory is measured."""
    for name in ("fnn", "resnet", "bert"):
        card = registry.card(name)
        workload = build_workload(card, card.resolve_config(card.tiny), Shape(2, 9, 33, "cpu"))
        run_steps(workload, mode, settings, 1)


def reset_peak() -> None:
    """Give free memory back to the system, and let the peak of this process start from what it has now."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measure(
    card: Card, config: Any, shape: Shape, mode: str, precision: str, optimizer: str, lock: Path | None
) -> dict[str, Any]:
    """Run the steps of a cell. Call it in a fresh process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = build_settings(shape.batch, precision, optimizer)
    warm_up(mode, settings)
    reset_peak()
    base = read_status("VmRSS")
    workload = build_workload(card, config, Shape(shape.batch, shape.length, shape.side, "cpu"))
    source = sum(t.nbytes for t in workload.batch.values())  # the batch that each step copies is not part of a step
    first = run_steps(workload, mode, settings, 1)[0] if mode == "predict" else 0.0
    with hold_lock(lock) as idle:
        count = STEPS if first < 1 else 2
        later = run_steps(workload, mode, settings, count if mode == "predict" else STEPS, True)[mode == "train" :]
    return {
        "measured": read_status("VmHWM") - base - source,
        "best": round(min(later), 5),
        "median": round(statistics.median(later), 5),
        "idle": int(idle),
    }


def plan(card: Card, config: Any, shape: Shape, mode: str, precision: str, optimizer: str) -> dict[str, Any]:
    """Return what is planned for a cell, before corrections that are learnt from the table."""
    started = time.perf_counter()
    trace = make_trace(card, config, shape, mode, precision, optimizer)
    resident = sum(trace.initial.values()) + allocator.replay(trace, allocator.Glibc(mode == "train"))
    return {
        "allocated": max(trace.find_peak()[0], trace.later_steps().find_peak()[0]),
        "resident": resident,
        "fixed": sum(trace.initial.values()) + sum(trace.lasting.values()),
        "ops": len(trace.work),
        "flops": sum(work.flops for work in trace.work),
        "moved": sum(work.bytes for work in trace.work),
        "terms": json.dumps({k: round(v, 6) for k, v in plan_terms(trace.work, machines.get_machine("cpu")).items() if v}),
        "plan_seconds": round(time.perf_counter() - started, 2),
    }


def in_fresh_process(function: Any, *args: Any) -> dict[str, Any]:
    """Return the result of a function that runs in a fork of this process, which has only imported modules."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = function(*args)
        except BaseException as error:  # noqa: BLE001  # told to the parent
            result = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"failed": "the process was killed"}


def measure_machine() -> dict[str, Any]:
    torch.set_num_threads(1)
    return machines.probe().to_dict()


def choose(card: Card) -> dict[str, Any]:
    """Return the size and the batches of an architecture. Call it in a fresh process, since it traces."""
    size, config = choose_config(card)
    shape, flops = choose_shape(card, config)
    sizes = {"train": shape.batch, "predict": PREDICTED_ROWS * shape.batch}
    return {"size": size, "flops": flops, **{mode: [rows, shape.length, shape.side] for mode, rows in sizes.items()}}


def list_cells(card: Card, chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the cells of an architecture whose steps do not take too long."""
    for mode in ("train", "predict"):
        batch, length, side = chosen[mode]
        for rows in (batch, 2 * batch):
            if rows * chosen["flops"] / (1 if mode == "train" else 3) > MOST_FLOPS:
                continue
            for precision in ("float32", "bfloat16"):
                for optimizer in ("adamw", "muon") if mode == "train" else ("",):
                    cell = {"architecture": card.name, "family": card.family, "size": chosen["size"], "mode": mode}
                    cell |= {"batch": rows, "length": length, "side": side, "precision": precision, "optimizer": optimizer}
                    yield cell


def find_arguments(cell: dict[str, Any]) -> tuple[Any, ...]:
    card = registry.card(cell["architecture"])
    shape = Shape(int(cell["batch"]), int(cell["length"]), int(cell["side"]))
    return card, choose_config(card)[1], shape, cell["mode"], cell["precision"], cell["optimizer"] or "adamw"


def run_cell(cell: dict[str, Any], lock: Path | None, bases: dict[str, int]) -> dict[str, Any] | None:
    """Return a row of the table with what was measured, or None if the cell failed."""
    measured = in_fresh_process(measure, *find_arguments(cell), lock)
    if failed := measured.get("failed"):
        print(*(cell[key] for key in ("architecture", "mode", "precision", "optimizer")), failed, flush=True)
        return None
    return cell | measured | {"base": bases[cell["mode"]]}


def plan_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the table with what is planned."""
    planned = in_fresh_process(plan, *find_arguments(cell))
    if failed := planned.pop("failed", None):
        print(*(cell[key] for key in ("architecture", "mode", "precision", "optimizer")), failed, flush=True)
    return cell | planned


def measure_base(mode: str) -> int:
    """Return the memory of a process of its own after tiny steps."""
    command = [sys.executable, __file__, "--base", mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def get_key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in KEY)


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, FIELDS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=get_key))
    write_atomically(path, text.getvalue().encode())


def order_cells(cards: list[Card], shapes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all cells, one of each architecture after the other, so that an interrupted run is representative."""
    columns = []
    for number, card in enumerate(cards):
        cells = list(list_cells(card, shapes[card.name]))
        random.Random(number).shuffle(cells)
        columns.append(cells)
    return [cell for row in itertools.zip_longest(*columns) for cell in row if cell is not None]


def choose_shapes(cards: list[Card], path: Path | None, pool: ThreadPoolExecutor) -> dict[str, Any]:
    shapes: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    missing = [card for card in cards if card.name not in shapes]
    for card, chosen in zip(missing, pool.map(lambda card: in_fresh_process(choose, card), missing)):
        if "failed" in chosen:
            print(f"{card.name}: {chosen['failed']}", flush=True)
            continue
        shapes[card.name] = chosen
        if path:
            path.write_text(json.dumps(shapes), encoding="utf-8")
    return shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; all by default")
    parser.add_argument("--all", action="store_true", help="measure cells again that are in the table")
    parser.add_argument("--times", action="store_true", help="measure cells again whose times are not those of an idle machine")
    parser.add_argument("--replan", action="store_true", help="measure nothing, and plan all cells of the table again")
    parser.add_argument("--jobs", type=int, default=1, help="plans at a time")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--shapes", type=Path, help="file that keeps the chosen batches between runs")
    parser.add_argument("--machine", type=Path, help="file of `fieldguide probe` with one thread; measured by default")
    parser.add_argument("--lock", type=Path, help="file to lock while steps are timed; they then run with high priority")
    parser.add_argument("--base", choices=("train", "predict"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.base:
        torch.set_num_threads(1)
        warm_up(options.base, build_settings(2, "float32", "adamw"))
        reset_peak()
        print(read_status("VmRSS"))
        return
    importlib.import_module("torch._dynamo")  # the optimizers load it; here once for all cells

    cards = [
        card for name, card in registry.cards().items() if not card.solver and (not options.names or name in options.names)
    ]
    rows = [] if options.all else read_rows(options.table)
    with ThreadPoolExecutor(options.jobs) as pool:
        if not options.replan:
            known = {get_key(row) for row in rows if not options.times or row["idle"] == "1"}
            bases = {mode: measure_base(mode) for mode in ("train", "predict")}
            shapes = choose_shapes(cards, options.shapes, pool)
            for cell in order_cells([card for card in cards if card.name in shapes], shapes):
                if get_key(cell) in known or (row := run_cell(cell, options.lock, bases)) is None:
                    continue
                rows = [other for other in rows if get_key(other) != get_key(row)] + [row]
                write_table(options.table, rows)
        machine = machines.get_machine(options.machine) if options.machine else None
        machines.use_probe(machine or machines.from_dict(in_fresh_process(measure_machine)))
        unplanned = [row for row in rows if options.replan or not row.get("terms")]
        for row, planned in zip(unplanned, pool.map(plan_cell, unplanned)):
            row.update(planned)
            write_table(options.table, rows)
        write_table(options.table, rows)
    print(errors.describe(options.table))


if __name__ == "__main__":
    main()

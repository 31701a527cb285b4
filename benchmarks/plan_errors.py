"""Errors of the planned memory and time: `make plan-errors`.

Each cell trains or predicts in a fresh process and compares the largest resident memory above that of the idle process, and the
time of a step, with the plan. The table is src/fieldguide/planning/errors.csv, from which plans take their own error.
Cells that are in the table already are not measured again; `--all` starts anew, for step times on an idle machine.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fieldguide.core.card import Card
from fieldguide.core.errors import FieldguideError
from fieldguide.core.hardware import keep_memory
from fieldguide.core.settings import Settings
from fieldguide.models import registry
from fieldguide.planning import allocator, errors, machines
from fieldguide.planning.stepping import Silent, trace_prediction, trace_training
from fieldguide.planning.workload import Shape, Workload, build_workload
from fieldguide.training.precision import autocast
from fieldguide.training.trainer import Trainer

TABLE = Path(errors.__file__).with_name("errors.csv")
FIELDS = [
    *("architecture", "family", "size", "mode", "batch", "length", "side", "precision", "optimizer"),
    *(
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
    ),
]
TARGET_BYTES, TARGET_FLOPS = 200 << 20, 20e9  # of a step with the smaller batch
MOST_PARAMETERS, LARGEST_PARAMETERS = 25e6, 150e6
STEPS = 3
BUSY_LOAD = 1.5  # load average above which other work runs, so that the times of a cell are not used
MOST_FLOPS = 150e9  # of a step; cells that take more are left out
SMALL = {  # fields of architectures whose published sizes are all too large
    **{"vocab_size": 8192, "length": 256, "dim": 256, "depth": 4, "heads": 4, "kv_heads": 2, "hidden": 768, "experts": 4},
    **{
        "vision_dim": 128,
        "vision_depth": 4,
        "vision_heads": 4,
        "vision_hidden": 512,
        "image": 112,
        "picture": 8000,
        "head_dim": 64,
    },
}
LENGTH, FRAMES, SIDES = 96, 400, (96, 224, 256, 192)
PREDICTED_ROWS = 3  # times the rows of training


def count_parameters(card: Card, config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in card.make(config).parameters())


def choose_config(card: Card) -> tuple[str, Any]:
    """Return the largest size of at most `MOST_PARAMETERS`, or the smallest one, made smaller if it is still too large."""
    sized = sorted((count_parameters(card, card.resolve_config(s)), s) for s in card.sizes if s != card.tiny)
    able = [entry for entry in sized if entry[0] <= MOST_PARAMETERS]
    parameters, size = able[-1] if able else sized[0]
    if parameters <= LARGEST_PARAMETERS:
        return size, card.resolve_config(size)
    known = set(card.config.__dataclass_fields__)
    return f"{size}*", card.resolve_config(size, **{k: v for k, v in SMALL.items() if k in known})


def choose_shape(card: Card, config: Any) -> Shape:
    """Return a batch for training of about `TARGET_BYTES` and at most `TARGET_FLOPS`."""
    length = FRAMES if card.input_type == "speech" else LENGTH
    for side in SIDES:  # some networks take only certain sizes
        try:
            one, two = (
                make_trace(card, config, Shape(rows, length, side), "train", "float32", "adamw").later_steps()
                for rows in (1, 2)
            )
            break
        except (FieldguideError, RuntimeError):
            if side == SIDES[-1]:
                raise
    fixed = sum(one.initial.values())
    by_row = max((two.find_peak()[0] - one.find_peak()[0]) / 2, (two.find_peak()[0] - fixed) / 16, 1)
    flops = max(sum(work.flops for work in two.work) / 4, 1)
    return Shape(max(1, int(min(TARGET_BYTES / by_row, TARGET_FLOPS / flops, 4096))), length, side)


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


def run_steps(workload: Workload, mode: str, settings: Settings, count: int, keep: bool) -> list[float]:
    """Run real steps and return the seconds of each."""
    taken = []
    if mode == "train":
        trainer = Trainer(workload.objective, None, settings, device=torch.device("cpu"), callback=Silent())  # type: ignore[arg-type]
        trainer.set_train_mode()
        if keep:
            keep_memory()

        def stream() -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
            while True:
                yield 0, {name: tensor.clone() for name, tensor in workload.batch.items()}

        batches = stream()
        for _ in range(count):
            started = time.perf_counter()
            trainer.train_step(batches)
            taken.append(time.perf_counter() - started)
        return taken
    workload.objective.eval()
    with torch.inference_mode():
        for _ in range(count):
            started = time.perf_counter()
            batch = {name: tensor.clone() for name, tensor in workload.batch.items() if name not in workload.labels}
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
        run_steps(workload, mode, settings, 1, False)


def measure(card: Card, config: Any, shape: Shape, mode: str, precision: str, optimizer: str) -> dict[str, Any]:
    """Run the steps of a cell. Call it in a fresh process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = build_settings(shape.batch, precision, optimizer)
    warm_up(mode, settings)
    base = read_status("VmRSS")
    workload = build_workload(card, config, Shape(shape.batch, shape.length, shape.side, "cpu"))
    taken = run_steps(workload, mode, settings, STEPS, True)
    source = sum(t.nbytes for t in workload.batch.values())  # the batch that each step copies is not part of a step
    later = taken[1:]
    return {
        "measured": read_status("VmHWM") - base - source,
        "best": round(min(later), 5),
        "median": round(statistics.median(later), 5),
    }


def plan(card: Card, config: Any, shape: Shape, mode: str, precision: str, optimizer: str) -> dict[str, Any]:
    """Return what is planned for a cell, before corrections that are learnt from the table."""
    from fieldguide.planning.timing import plan_seconds

    started = time.perf_counter()
    trace = make_trace(card, config, shape, mode, precision, optimizer)
    resident = sum(trace.initial.values()) + allocator.replay(trace, allocator.Glibc(mode == "train"))
    return {
        "allocated": max(trace.find_peak()[0], trace.later_steps().find_peak()[0]),
        "resident": resident,
        "ops": len(trace.work),
        "flops": sum(work.flops for work in trace.work),
        "moved": sum(work.bytes for work in trace.work),
        "planned": round(plan_seconds(trace.work), 5),
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
    shape = choose_shape(card, config)
    sizes = {"train": shape.batch, "predict": PREDICTED_ROWS * shape.batch}
    return {"size": size, **{mode: [rows, shape.length, shape.side] for mode, rows in sizes.items()}}


def list_cells(shapes: dict[str, list[int]]) -> Iterator[tuple[str, Shape, str, str]]:
    for mode, (batch, length, side) in shapes.items():
        for rows in (batch, 2 * batch):
            for precision in ("float32", "bfloat16"):
                for optimizer in ("adamw", "muon") if mode == "train" else ("",):
                    yield mode, Shape(rows, length, side), precision, optimizer


def run_cell(card: Card, cell: dict[str, Any]) -> dict[str, Any] | None:
    """Return a row of the table, or None if the cell failed."""
    shape = Shape(cell["batch"], cell["length"], cell["side"])
    config = choose_config(card)[1]
    args = (card, config, shape, cell["mode"], cell["precision"], cell["optimizer"] or "adamw")
    planned = in_fresh_process(plan, *args)
    if planned.get("flops", 0.0) > MOST_FLOPS:
        print(f"{card.name} {cell['mode']} {cell['precision']} {cell['optimizer']}: left out, it takes too long", flush=True)
        return None
    measured = in_fresh_process(measure, *args) if "failed" not in planned else {}
    if failed := measured.get("failed") or planned.get("failed"):
        print(f"{card.name} {cell['mode']} {cell['precision']} {cell['optimizer']}: {failed}", flush=True)
        return None
    return cell | measured | planned


def measure_base(mode: str) -> int:
    """Return the memory of a process of its own after tiny steps."""
    command = [sys.executable, __file__, "--base", mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    rows.sort(key=lambda row: tuple(str(row[key]) for key in FIELDS[:9]))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def order_cells(cards: list[Card], shapes: dict[str, Any]) -> list[tuple[Card, dict[str, Any]]]:
    """Return all cells, one of each architecture after the other, so that an interrupted run is representative."""
    columns = []
    for number, card in enumerate(cards):
        chosen = shapes[card.name]
        cells = []
        for mode in ("train", "predict"):
            for mode_, shape, precision, optimizer in list_cells({mode: chosen[mode]}):
                cell = {"architecture": card.name, "family": card.family, "size": chosen["size"], "mode": mode_}
                cell |= {"batch": shape.batch, "length": shape.length, "side": shape.side}
                cells.append((card, cell | {"precision": precision, "optimizer": optimizer}))
        random.Random(number).shuffle(cells)
        columns.append(cells)
    return [cell for row in zip(*columns) for cell in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; all by default")
    parser.add_argument("--all", action="store_true", help="measure cells again that are in the table")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time; with more than one, times are not reliable")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--shapes", type=Path, help="file that keeps the chosen batches between runs")
    parser.add_argument("--base", choices=("train", "predict"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.base:
        torch.set_num_threads(1)
        warm_up(options.base, build_settings(2, "float32", "adamw"))
        print(read_status("VmRSS"))
        return
    importlib.import_module("torch._dynamo")  # the optimizers load it; here once for all cells

    cards = [
        card for name, card in registry.cards().items() if not card.solver and (not options.names or name in options.names)
    ]
    old: list[dict[str, Any]] = []
    if options.table.exists() and not options.all:
        with open(options.table, encoding="utf-8", newline="") as file:
            old = list(csv.DictReader(file))
    known = {tuple(row[key] for key in FIELDS[:9]) for row in old}
    bases = {mode: measure_base(mode) for mode in ("train", "predict")}
    machines.use_probe(machines.from_dict(in_fresh_process(measure_machine)))
    shapes = json.loads(options.shapes.read_text(encoding="utf-8")) if options.shapes and options.shapes.exists() else {}
    with ThreadPoolExecutor(options.jobs) as pool:
        missing = [card for card in cards if card.name not in shapes]
        for card, chosen in zip(missing, pool.map(lambda card: in_fresh_process(choose, card), missing)):
            if "failed" in chosen:
                print(f"{card.name}: {chosen['failed']}", flush=True)
                continue
            shapes[card.name] = chosen
            if options.shapes:
                options.shapes.write_text(json.dumps(shapes), encoding="utf-8")
        cells = order_cells([card for card in cards if card.name in shapes], shapes)
        cells = [(card, cell) for card, cell in cells if tuple(str(cell[key]) for key in FIELDS[:9]) not in known]
        for row in pool.map(lambda entry: run_cell(*entry), cells):
            if row is not None:
                old.append(
                    row | {"base": bases[row["mode"]], "idle": int(options.jobs == 1 and os.getloadavg()[0] < BUSY_LOAD)}
                )
                write_table(options.table, old)
    print(errors.describe(options.table))


if __name__ == "__main__":
    main()

"""Do Muon and weight averaging earn their time? Six small tasks, three seeds: the time to a given validation score.

    python benchmarks/defaults.py --folder build/defaults [--only language] [--tune] [--save]

Each task is trained with Muon and with AdamW, for the same number of steps. The weights and their moving averages are scored at the
same steps of the same training, since an average does not change what is trained. Times do not depend on other load: a step is
timed in CPU seconds of one thread, apart from training. The goal is the worst final score of the four variants of a seed; the time
to it is the number of steps until a variant first reaches it (interpolated), times the time of its step. The ratio is that of plain
AdamW to the variant: above 1, the variant is faster.

Every training and timing is a line of `results.jsonl` in the folder, and is not repeated. `--tune` trains the first seed with all
rates of the table first; without it, the rates are those marked below. Data: samples, and archives in FIELDGUIDE_DATA.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import make_parser, read_commit, report

from fieldguide import read
from fieldguide.automl.build_plan import Plan, build_plan
from fieldguide.automl.callbacks import NullCallback
from fieldguide.core import distributed
from fieldguide.data import samples
from fieldguide.objectives import Objective
from fieldguide.training.ema import ExponentialMovingAverage
from fieldguide.training.inference_loop import collect
from fieldguide.training.trainer import Trainer

DATA = Path(os.environ.get("FIELDGUIDE_DATA", Path(__file__).parents[2] / "shared" / "data"))
SEEDS = (0, 1, 2)
EVALUATIONS = 12  # of a training, evenly over its steps
TIMED_STEPS = 12  # of each variant, after two that warm up; the fastest third counts


@dataclass(frozen=True)
class Case:
    """A task. `rates` are the learning rates of each optimizer, the chosen one first; `decay` is that of the average."""

    name: str
    source: str  # a sample, or a file as `unpack` writes it
    model: str
    steps: int
    batch: int
    rates: dict[str, tuple[float, ...]]
    decay: float
    settings: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    rows: int = 800  # validation rows that are scored (passages, of a long text)


CASES = (
    Case(
        "language",
        "shakespeare",
        "gpt2-nano",
        300,
        16,
        {"muon": (1e-2,), "adamw": (4e-3, 8e-3, 2e-3)},
        0.98,
        {"task.tokenizer": "characters", "task.length": 64},
        rows=8,  # of 2,000 characters
    ),
    Case(
        "translation",
        "multi30k",
        "transformer-mini",
        200,
        32,
        {"muon": (4e-3,), "adamw": (1e-3, 2e-3)},
        0.98,
        rows=128,
    ),
    Case("images", "cifar10", "resnet20", 250, 32, {"muon": (1e-2, 4e-3), "adamw": (2e-3, 4e-3)}, 0.98, rows=400),
    Case(
        "diffusion",
        "figures",
        "ddpm-8",
        300,
        32,
        {"muon": (1e-2,), "adamw": (4e-3, 2e-3)},
        0.99,
        task="image-generation",
        rows=200,
    ),
    Case("table", "adult", "tabm-s", 300, 256, {"muon": (4e-3, 1e-2), "adamw": (2e-3, 4e-3)}, 0.98),
    Case("detection", "scattered", "yolov8-pico", 250, 16, {"muon": (1e-2,), "adamw": (4e-3, 2e-3)}, 0.98, rows=60),
)


def unpack(name: str, folder: Path) -> Path:
    """Return the path of the data of a case, unpacked from its archive or generated as a sample."""
    if name in samples.SAMPLES:
        return samples.path(name)
    made = folder / "data" / name
    if made.exists():
        return next(made.iterdir()) if name != "cifar10" else made
    work = made.with_name(f".{name}")
    work.mkdir(parents=True, exist_ok=True)
    archive = {"shakespeare": "texts.zip", "multi30k": "texts.zip", "cifar10": "cifar10.zip", "adult": "tables.zip"}[name]
    with zipfile.ZipFile(DATA / archive) as packed:
        if name == "shakespeare":
            (work / "input.txt").write_bytes(packed.read("tinyshakespeare/input.txt"))
        elif name == "multi30k":
            sides = [packed.read(f"multi30k/train.{side}").decode().splitlines()[:8000] for side in ("de", "en")]
            lines = [json.dumps({"source": a, "target": b}) for a, b in zip(*sides)]
            (work / "pairs.jsonl").write_text("\n".join(lines) + "\n")
        elif name == "adult":
            (work / "adult.csv").write_bytes(packed.read("adult/adult-train.csv"))
        else:
            for split, most in (("train", 400), ("val", 100), ("test", 20)):
                source, first = ("train", 400) if split == "val" else (split, 0)
                for entry in packed.namelist():
                    parts = entry.split("/")
                    if len(parts) != 3 or parts[0] != source or not parts[2]:
                        continue
                    if first <= int(Path(parts[2]).stem) < first + most:
                        target = work / split / parts[1] / parts[2]
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(packed.read(entry))
    work.rename(made)
    return unpack(name, folder)


def build(case: Case, optimizer: str, rate: float, seed: int, folder: Path) -> Plan:
    """Return the plan of a training with fixed steps, in float32, without averages."""
    changes = {
        **{"steps": case.steps, "batch_size": case.batch, "precision": "float32", "optimizer": optimizer, "lr": rate},
        **{"momentum": 0.95, "ema": 0.0, "patience": 0, "minutes": 0, "eval_steps": case.steps // EVALUATIONS},
        **case.settings,
    }
    return build_plan(read(unpack(case.source, folder)), task=case.task, model=case.model, seed=seed, settings=changes)


class Watch(NullCallback):
    """Updates an average of the weights after each step."""

    def __init__(self, decay: float):
        self.decay, self.average = decay, None

    def on_step(self, step: int, losses: dict[str, float]) -> None:
        if self.average is not None:
            self.average.update(step - 1)


def train(case: Case, optimizer: str, rate: float, seed: int, folder: Path) -> dict[str, Any]:
    """Train once; return the validation scores of the weights and of their average at each evaluation."""
    plan = build(case, optimizer, rate, seed, folder)
    task, metric, watch = plan.task, plan.task.monitored_metric(), Watch(case.decay)
    rows = plan.validation_rows[: case.rows]
    batches, targets = task.batches(plan.source.take(rows), plan.card, plan.settings), task.targets(plan.source.take(rows))
    curves: dict[str, list[tuple[int, float]]] = {"last": [], "average": []}

    def score(objective: Objective) -> float:
        outputs = collect(objective, batches, batch=64, device=distributed.device())
        return task.score(outputs, targets)[metric.name]

    def evaluate(objective: Objective) -> dict[str, float]:
        assert watch.average is not None
        curves["last"].append((loop.state.step, score(objective)))
        with watch.average.average_parameters():
            curves["average"].append((loop.state.step, score(objective)))
        return {metric.name: curves["last"][-1][1]}

    loop = Trainer(
        plan.objective,
        plan.train_batches,
        plan.settings,
        device=distributed.device(),
        callback=watch,
        evaluate=evaluate,
        metric=(metric.name, metric.better),
    )
    watch.average = ExponentialMovingAverage(loop.kept, case.decay)
    loop.train()
    return {"metric": metric.name, "better": metric.better, "curves": curves}


def measure(case: Case, optimizer: str, average: bool, folder: Path) -> float:
    """Return the CPU seconds of a training step on one thread: the mean of the fastest third."""
    plan = build(case, optimizer, 1e-4, 0, folder)
    settings = plan.settings.with_({"steps": TIMED_STEPS + 2, "ema": case.decay if average else 0.0})
    marks: list[float] = []

    class Timer(NullCallback):
        def on_step(self, step: int, losses: dict[str, float]) -> None:
            marks.append(time.process_time())

    Trainer(plan.objective, plan.train_batches, settings, device=distributed.device(), callback=Timer()).train()
    taken = sorted(np.diff(marks)[1:])
    return float(np.mean(taken[: max(1, len(taken) // 3)]))


class Book:
    """The results so far, one JSON object per line."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.entries = {self.key(entry): entry for entry in map(json.loads, lines)}

    @staticmethod
    def key(entry: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(entry.get(name) for name in ("case", "kind", "optimizer", "rate", "seed", "average"))

    def find(self, make: Any, **what: Any) -> dict[str, Any]:
        """Return the entry, which `make` computes if it is not there yet."""
        if self.key(what) not in self.entries:
            started = time.process_time()
            entry = {**what, **make(), "cpu_seconds": round(time.process_time() - started, 1), "commit": read_commit()}
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            self.entries[self.key(what)] = entry
            print({k: v for k, v in entry.items() if k != "curves"}, *describe_final(entry), flush=True)
        return self.entries[self.key(what)]


def describe_final(entry: dict[str, Any]) -> Iterator[str]:
    for name, curve in entry.get("curves", {}).items():
        yield f"{name} {curve[-1][1]:.4f}"


def find_steps(curve: list[tuple[int, float]], goal: float, sign: int) -> float:
    """Return the steps until a curve first reaches a goal, interpolated between evaluations; infinite if it does not."""
    before = (0, None)
    for step, score in curve:
        if sign * score >= sign * goal:
            if before[1] is None or score == before[1]:
                return float(step)
            return before[0] + (step - before[0]) * (goal - before[1]) / (score - before[1])
        before = (step, score)
    return float("inf")


def choose_rate(case: Case, optimizer: str, book: Book, options: Any) -> float:
    """Return the learning rate of an optimizer: with `--tune`, the one with the best final score of the first seed."""
    rates = case.rates[optimizer]
    if not options.tune or len(rates) == 1:
        return rates[0]

    def final(rate: float) -> float:
        entry = fit(case, optimizer, rate, SEEDS[0], book, options)
        sign = 1 if entry["better"] == "max" else -1
        return max(sign * curve[-1][1] for curve in entry["curves"].values())

    return max(rates, key=final)


def fit(case: Case, optimizer: str, rate: float, seed: int, book: Book, options: Any) -> dict[str, Any]:
    make = lambda: train(case, optimizer, rate, seed, options.folder)
    return book.find(make, case=case.name, kind="fit", optimizer=optimizer, rate=rate, seed=seed)


def time_step(*arguments: Any) -> dict[str, float]:
    return {"seconds": measure(*arguments)}


def compare(case: Case, book: Book, options: Any) -> list[list[str]]:
    """Return the rows of a task: each variant's step time, final score, time to the goal, and ratio to plain AdamW."""
    seconds, fits, rates = {}, {}, {}
    for optimizer in ("adamw", "muon"):
        rates[optimizer] = rate = choose_rate(case, optimizer, book, options)
        for average in (False, True):
            make = partial(time_step, case, optimizer, average, options.folder)
            entry = book.find(make, case=case.name, kind="time", optimizer=optimizer, average=average)
            seconds[optimizer, average] = entry["seconds"]
        fits[optimizer] = [fit(case, optimizer, rate, seed, book, options) for seed in SEEDS[: options.seeds]]
    metric, sign = fits["adamw"][0]["metric"], 1 if fits["adamw"][0]["better"] == "max" else -1
    variants = [(o, a) for o in ("adamw", "muon") for a in (False, True)]
    times: dict[Any, list[float]] = {v: [] for v in variants}
    finals: dict[Any, list[float]] = {v: [] for v in variants}
    for number in range(options.seeds):
        curves = {v: fits[v[0]][number]["curves"]["average" if v[1] else "last"] for v in variants}
        goal = min((curves[v][-1][1] for v in variants), key=lambda score: sign * score)
        for v in variants:
            times[v].append(find_steps(curves[v], goal, sign) * seconds[v])
            finals[v].append(curves[v][-1][1])
    rows = []
    for v in variants:
        ratios = sorted(base / own for base, own in zip(times["adamw", False], times[v]))
        rows.append(
            [
                f"{case.name}, {case.model}" if v == variants[0] else "",
                f"{v[0]} {rates[v[0]]:g}{', average' if v[1] else ''}",
                f"{1000 * seconds[v]:.1f}",
                f"{metric} {statistics.mean(finals[v]):.3f} ± {np.std(finals[v]):.3f}",
                f"{statistics.mean(times[v]):.1f}",
                f"{statistics.median(ratios):.2f}",
                f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            ]
        )
    return rows


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("build/defaults"), help="of the results so far, and of unpacked data"
    )
    parser.add_argument("--only", default="", help="tasks with these words alone, parted by commas")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of them")
    parser.add_argument("--tune", action="store_true", help="choose the learning rates among those of the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or 1)
    book = Book(options.folder)
    chosen = [case for case in CASES if any(word in case.name for word in options.only.split(","))]
    for seed in SEEDS[: options.seeds]:  # so that all tasks have a first seed early
        for case in chosen:
            for optimizer in ("adamw", "muon"):
                fit(case, optimizer, choose_rate(case, optimizer, book, options), seed, book, options)
    rows = [row for case in chosen for row in compare(case, book, options)]
    report(
        "What the optimizer and averaging bring: time to a validation score",
        ["task", "variant", "ms a step", "final score", "s to goal", "ratio", "seeds"],
        rows,
        options.save,
        f"{options.seeds} seeds, one thread, float32, CPU seconds. The goal is the worst final score of the four variants of a seed; "
        "the ratio is the time of plain AdamW to it by that of the variant.",
    )


if __name__ == "__main__":
    main()

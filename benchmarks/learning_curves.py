"""Record learning curves: the validation score of networks over the seconds of training, for several data sets and sizes.

    python benchmarks/learning_curves.py --out src/fieldguide/automl/curves.jsonl [--only digits,adult] [--budgets 3,9,27]

Each line of the result is one training: data set, number of training rows, network, budget in seconds, scores at each evaluation.
The advisor's weights are fitted to these lines (`benchmarks/fit_rules.py`), `fieldguide advise` predicts scores from them, and
policies of the race are replayed on them (`benchmarks/replay_race.py`).

Seconds are CPU time of one thread, so the result does not depend on other load. Lines that exist are not computed again.
"""

from __future__ import annotations

from cpu_clock import time  # isort: skip  # before anything else can take a reference to the clock

import argparse
import functools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import real_data
import torch

from fieldguide.automl import profile
from fieldguide.automl.build_plan import Plan, build_plan
from fieldguide.automl.callbacks import NullCallback
from fieldguide.automl.request import build_request, read_for
from fieldguide.automl.training import build_trainer
from fieldguide.core.errors import FieldguideError
from fieldguide.data.splits import Splits
from fieldguide.tasks.evaluator import bootstrap_intervals
from fieldguide.training.inference_loop import collect
from fieldguide.training.state import Interrupted

BUDGETS = (3.0, 9.0, 27.0)  # seconds of training
MAX_CANDIDATES = 5  # networks for each data set, of different architectures but for the first
MIN_ROWS = 200  # training rows of a subset
SUBSETS = (1.0, 0.25)  # fractions of the training rows


@dataclass
class Source:
    """A data set: a sample or a file, and how it is read."""

    name: str
    path: str = ""
    target: str | None = None
    task: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    max_rows: int = 10_000  # training rows; more are left out


def list_sources(folder: Path) -> list[Source]:
    """Return samples and, where `folder` has them, real data sets."""
    samples = (
        "digits breast-cancer diabetes docstrings clicks demand phrases inked scattered series questions manual captions spoken "
        "wine parameters reports figures"
    )
    real = [
        Source("adult", "adult.csv", "income"),
        Source("california", "california.csv", "median_house_value"),
        Source("cifar10", "cifar10/train"),
        Source("trec", "trec.csv", "label"),
        Source("clinc", "clinc.csv", "label"),
        Source("imdb", "imdb.csv", "sentiment"),
        Source("shakespeare", "tinyshakespeare.txt", None, "text-generation"),
        Source("etth1", "etth1.csv", None, "time-series-forecasting", {"task.horizon": 96}),
        Source("camvid", "camvid/train", None, "image-segmentation"),
        Source("bccd", "bccd", None, "object-detection"),
        Source("beauty", "beauty.csv", None, "recommendation"),
        Source("multi30k", "multi30k.csv", None, "translation"),
    ]
    found = [s for s in real if (folder / s.path).exists()]
    named = [Source(name) for name in samples.split()]
    return [source for pair in zip_longest(found, named) for source in pair if source]  # so that a part covers both


@functools.lru_cache(maxsize=2)
def read_source(name: str, path: str, target: str | None, task: str | None) -> tuple[Any, str | None]:
    """Return the data of a source, and its task if that is set."""
    request = build_request(path or name, target=target, task=task, allow_bad=True)
    data, _, _ = read_for(request, request["data"])
    return data, request["task"]


def plan_for(source: Source, folder: Path, splits: Splits | None = None, **more: Any) -> Plan:
    """Return the plan of a network for a data set."""
    path = str(folder / source.path) if source.path else ""
    data, task = read_source(source.name, path, source.target, source.task)
    return build_plan(data, task=task, settings=dict(source.settings), splits=splits, **more)


def take_fraction(source: Source, splits: Splits, fraction: float) -> Splits:
    """Return splits with a fraction of the training rows, at most `max_rows` of them."""
    rows = len(splits.train)
    keep = min(int(fraction * rows), source.max_rows)
    kept = np.sort(np.random.default_rng(0).permutation(splits.train)[:keep])
    return splits if keep >= rows else Splits(**{**vars(splits), "train": kept})


def choose_candidates(plan: Plan) -> list[str]:
    """Return the networks to train: the best size of each architecture, and a second size of the first."""
    chosen, seen = [], {}
    for option in [*plan.advice.options, *(o for o in plan.advice.rejected if o.parameters and o.multiply_adds)]:
        count = seen.get(option.architecture, 0)
        if count == 0 or (count == 1 and option.architecture == plan.advice.options[0].architecture):
            chosen.append(option.name)
        seen[option.architecture] = count + 1
    return chosen[:MAX_CANDIDATES]


def measure_trivial(plan: Plan) -> dict[str, float]:
    """Return the validation scores of the references that are no models."""
    task, metric = plan.task, plan.task.monitored_metric()
    train, held = plan.source.take(plan.splits.train), plan.source.take(plan.validation_rows)
    task.prepare_test(train, held)
    targets = task.targets(held)
    return {b.name: float(task.score(b.outputs, targets)[metric.name]) for b in task.baselines(train, held) if not b.bound}


def train(plan: Plan, budget: float) -> dict[str, Any]:
    """Train for a budget of seconds and return the record of the training."""
    plan.training_seconds = budget
    loop: Any = build_trainer(plan, NullCallback())
    started = time.monotonic()
    state = loop.train()
    metric, task = plan.task.monitored_metric(), plan.task
    history = [(line["seconds"], line["scores"][metric.name]) for line in getattr(loop, "unwritten", ()) if "scores" in line]
    rows = plan.source.take(plan.validation_rows)
    outputs = collect(plan.objective, task.batches(rows, plan.card), batch=256, device=torch.device("cpu"), shared=False)
    intervals = bootstrap_intervals(task, outputs, task.targets(rows), repeats=30, level=0.68)
    low, high = intervals[metric.name]
    return {
        "score": state.best,
        "error": (high - low) / 2,
        "steps": state.step,
        "batch": loop.settings.batch_size,
        "seconds": round(time.monotonic() - started, 2),
        "curve": [(round(s, 2), round(v, 5)) for s, v in history],
    }


def record(
    source: Source, folder: Path, budgets: list[float], fractions: list[float], known: set[tuple]
) -> Iterator[dict[str, Any]]:
    """Yield the lines of a data set that are not known yet."""
    whole = plan_for(source, folder, minutes=2)
    for fraction in fractions:
        splits = take_fraction(source, whole.splits, fraction)
        base = plan_for(source, folder, splits, minutes=2)
        rows = len(base.splits.train)
        if fraction < 1 and rows < MIN_ROWS:
            continue
        common = {
            "data": source.name,
            "task": base.task.name,
            "rows": rows,
            "metric": base.task.monitored_metric().name,
            "better": base.task.monitored_metric().better,
            "facts": {k: v for k, v in base.task.data_facts().items() if isinstance(v, int | float | str | bool)},
        }
        names = [*choose_candidates(base), *base.task.baseline_models]
        trivial = None
        for name in names:
            for budget in budgets:
                key = (source.name, rows, name, budget)
                if key in known:
                    continue
                if trivial is None:
                    trivial = measure_trivial(base)
                try:
                    plan = plan_for(source, folder, splits, model=name, minutes=budget / 60)
                    line = train(plan, budget)
                except Interrupted:
                    raise
                except (FieldguideError, ValueError, RuntimeError) as error:
                    line = {"failed": str(error).splitlines()[0][:200]}
                    plan = None
                option = next((o for o in [*base.advice.options, *base.advice.rejected] if o.name == name), None)
                size = {} if plan is None else {"parameters": profile.count_parameters(plan.objective.model)}
                yield common | {
                    "trivial": trivial,
                    "model": name,
                    "solver": bool(plan and plan.card.solver),
                    "multiply_adds": option.multiply_adds if option else 0,
                    "budget": budget,
                    **size,
                    **line,
                }
                if "failed" in line or (plan and plan.card.solver):
                    break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--fractions", default=",".join(f"{f:g}" for f in SUBSETS), help="of the training rows")
    parser.add_argument("--part", default="0/1", help="K/N: only every Nth data set from the Kth on, for N processes")
    parser.add_argument("--budgets", default=",".join(f"{b:g}" for b in BUDGETS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = real_data.prepare()
    part, parts = map(int, arguments.part.split("/"))
    lines = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    known = {(line["data"], line["rows"], line["model"], line["budget"]) for line in lines}
    wanted = set(arguments.only.split(",")) - {""}
    for source in list_sources(folder):
        if (wanted and source.name not in wanted) or (not wanted and zlib.crc32(source.name.encode()) % parts != part):
            continue
        try:
            budgets, fractions = ([float(v) for v in text.split(",")] for text in (arguments.budgets, arguments.fractions))
            for line in record(source, folder, budgets, fractions, known):
                with open(arguments.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(
                    f"{line['data']:14} {line['rows']:6} {line['model']:22} {line['budget']:5.0f} s  "
                    f"{line.get('score', float('nan')) or float('nan'):.4f}  {line.get('steps', 0):6} steps  {line.get('failed', '')}",
                    flush=True,
                )
        except Interrupted:
            raise SystemExit(130) from None
        except FieldguideError as error:
            print(f"{source.name}: {error}", flush=True)


if __name__ == "__main__":
    main()

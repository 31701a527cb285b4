"""Writing the run folder of `fit`: the plan before training, the trained model, and the results of the test."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fieldguide.automl import config_file, frozen_features, profile
from fieldguide.automl.baselines import Baseline, predict
from fieldguide.automl.build_plan import Plan
from fieldguide.automl.clock import Clock
from fieldguide.checkpoints import lora_files
from fieldguide.core import distributed
from fieldguide.core.errors import RunError
from fieldguide.core.files import make_folder, report_write_errors
from fieldguide.core.hardware import peak_memory
from fieldguide.core.run_files import is_empty, update_run
from fieldguide.core.run_record import SCHEMA, write_record
from fieldguide.core.version import __version__
from fieldguide.data import row_digests
from fieldguide.data.dataset import Data
from fieldguide.data.splits import sample_rows
from fieldguide.inference.predictor import TaskPredictor
from fieldguide.inference.run import open_run
from fieldguide.training.checkpoint import copy_to_cpu
from fieldguide.training.state import State

MIN_TEST_ROWS = 200  # that are predicted even if the time is over
TIMED_TEST_ROWS = 16
TEST_TIME_FRACTION = (
    0.6  # of the time that is left, for the predictions of the test; baselines, intervals and report take the rest
)
MIN_TEST_FRACTION = 0.03  # of the minutes, that the test may take if there is no time left
WRITING_SECONDS = 1.5  # of the time for the report, for what is no analysis


def save_plan(path: Path, record: dict[str, Any], plan: Plan) -> None:
    """Write the run folder as it is before training."""
    splits = plan.splits
    with update_run(path, record) as staging:
        plan.task.save(staging / "preprocess")
        np.savez(staging / "splits.npz", train=splits.train, validation=splits.validation, test=splits.test)
        if plan.task.has_own_rows:
            used = plan.source.take(np.concatenate([splits.train, splits.validation]))
            if (digests := row_digests.compute_digests(used, plan.task.columns)) is not None:
                row_digests.save_digests(staging, digests)
        files = json.dumps([asdict(f) for f in plan.source.manifest.files])
        (staging / "manifest.json").write_text(files, encoding="utf-8")
    config_file.write_config(path, record)


def build_record(plan: Plan, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return run.json as it is before training."""
    source, splits, best = plan.source, plan.splits, plan.advice.best
    return {
        "schema": SCHEMA,
        "status": "training",
        "task": plan.task.name,
        "request": request,
        "model": plan.describe_model(),
        "settings": plan.settings.to_dict(),
        "choice": {
            "why": plan.why,
            "first": plan.size,
            "reasons": best.reasons,
            "against": best.against,
            "others": [asdict(o) for o in (plan.advice.options[1:] + plan.advice.rejected)][:20],
            "is_open": request["model"] == "auto" and request["weights"] is None,
            "frozen_features": frozen_features.is_possible(plan),
        },
        "data": {
            **source.manifest.summary(),
            "source": source.source,
            "rows": len(source),
            "columns": source.schema(),
            "findings": [asdict(f) for f in source.findings],
            "notes": plan.task.notes,
            "split": {
                "how": splits.description,
                "train": len(splits.train),
                "validation": len(splits.validation),
                "test": len(splits.test),
            },
        },
        "cost": {
            "parameters": profile.count_parameters(plan.objective.model),
            "multiply_adds": best.multiply_adds,
            "seconds_per_step": plan.seconds_per_step,
            "max_steps": plan.max_steps,
            "processes": distributed.get_world_size(),
        },
        "machine": {**profile.measure_machine(), "threads": torch.get_num_threads()},
        "versions": get_versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def save_trained(path: Path, record: dict[str, Any], plan: Plan, state: State) -> None:
    """Write weights, preprocessing and record of a trained network, so that it can be used whatever happens in the test."""
    from safetensors.torch import save as pack

    record["cost"] |= {
        "seconds": round(state.seconds, 2),
        "steps": state.step,
        "best_step": state.best_step,
        "stopped": state.stopped,
        "repeatable": state.repeatable,
        "peak_memory": peak_memory(),
    }
    with update_run(path, record, status="trained") as staging:
        for name in plan.objective.keep:
            content = pack(copy_to_cpu(getattr(plan.objective, name).state_dict()), metadata={"format": "pt"})
            (staging / f"{name}.safetensors").write_bytes(content)
        if plan.updates and lora_files.is_writable(plan.card):
            lora_files.write_updates(staging / lora_files.FILE, plan.card, plan.config, plan.updates)
        plan.task.save(staging / "preprocess")
    config_file.write_config(path, record)


def evaluate_and_save(path: Path, record: dict[str, Any], plan: Plan, callback: Clock, rivals: Sequence[Baseline] = ()) -> None:
    """Score the test rows next to the baselines, and write record, report and model card."""
    from fieldguide.report.build import write_report

    task, splits = plan.task, plan.splits
    predictor = TaskPredictor(task, plan.card, plan.objective, batch_size=max(64, plan.settings.resolved_batch_size))
    rows = sample_rows(splits.test, choose_test_rows(plan, predictor, callback), plan.settings.seed)
    test, training = plan.source.take(rows), plan.source.take(splits.train)
    sampled = "" if len(rows) == len(splits.test) else f" of {len(splits.test):,}, a random sample,"
    callback.on_phase(f"testing on {len(test):,} examples{sampled} that were not used in training", len(test))
    known_notes = len(task.notes)
    task.prepare_test(training, test)
    task.prepare_scoring(len(test))
    started = time.perf_counter()
    outputs = predictor.run_batches(task, task.batches(test, plan.card), callback.on_progress)
    seconds = time.perf_counter() - started
    if distributed.rank() == 0:
        targets = task.targets(test)
        callback.on_phase("computing scores, intervals and baselines")
        references = [*task.baselines(training, test), *(predict(plan, rival, test) for rival in rivals)]
        record["scores"] = {
            "test": task.score(outputs, targets),
            "intervals": task.intervals(outputs, targets),
            "baselines": [
                {"name": b.name, "what": b.what, "bound": b.bound, "scores": task.score(b.outputs, targets)} for b in references
            ],
            "tested": len(test),
        }
        for doubt in task.find_doubts(targets):
            task.add_note(f"test rows: {doubt}")
        for text in task.notes[known_notes:]:
            callback.log(f"note: {text}")
        record["cost"]["peak_memory"] = peak_memory()
        with update_run(path, record) as staging:
            task.save(staging / "preprocess")
        run = open_run(path)
        run.record = record
        callback.on_phase("analyzing the network and writing the report")
        left = 60 * plan.settings.minutes - callback.elapsed if plan.settings.minutes else math.inf
        write_report(run, predictor, training, test, outputs, targets, seconds, callback.log, max(left - WRITING_SECONDS, 1.0))
        record["cost"]["parts"] = callback.summarize()
        callback.log(callback.describe())
        record["status"] = "done"  # last, so that a run that is killed before is tested again when it is resumed
        write_record(path, record)
    if distributed.get_world_size() > 1:
        torch.distributed.barrier()


def choose_test_rows(plan: Plan, predictor: TaskPredictor, callback: Clock) -> int | None:
    """Return how many test rows are predicted; None for all.

    Fewer than the task's own number, at least `MIN_TEST_ROWS`, if generating takes so long that the minutes would not do: a few rows
    are timed.
    """
    task, minutes = plan.task, plan.settings.minutes
    most = min(len(plan.splits.test), task.max_test_examples or len(plan.splits.test))
    if not minutes or plan.settings.deterministic or most <= MIN_TEST_ROWS:
        return task.max_test_examples
    trial = plan.source.take(sample_rows(plan.splits.test, TIMED_TEST_ROWS, plan.settings.seed))
    trial_task = task.for_request(task.predict_options)  # its notes are not those of the run
    started = time.perf_counter()
    predictor.run_batches(trial_task, trial_task.batches(trial, plan.card))
    seconds = (time.perf_counter() - started) / len(trial)
    left = 60 * minutes - callback.elapsed
    count = distributed.broadcast(int(TEST_TIME_FRACTION * max(left, MIN_TEST_FRACTION * 60 * minutes) / seconds))
    return max(MIN_TEST_ROWS, count) if count < most else task.max_test_examples


def check_available(path: Path) -> None:
    """Raise `RunError` if `path` cannot become a new run folder."""
    if path.is_dir() and is_empty(path):
        return
    if (path / "run.json").exists():
        raise RunError(
            f"{path} exists and is not empty. Choose another --out, or continue it with `fieldguide fit --resume {path}`."
        )
    if path.exists():
        raise RunError(f"{path} exists and is {'not empty' if path.is_dir() else 'a file'}. Choose another --out.")


def create_folder(out: str | Path | None, source: Data) -> Path:
    """Create and return the run folder: `out`, or the next free number under runs/. Raises `RunError` if it is taken."""
    if out is not None:
        path = Path(out)
        check_available(path)
        make_folder(path)
        return path
    name = Path(source.source).stem or "data"
    make_folder(Path("runs"))
    for number in range(1, 1_000_000):
        path = Path("runs") / f"{name}-{number}"
        with report_write_errors(path):
            try:
                path.mkdir()
                return path
            except FileExistsError:
                continue
    raise RunError("runs/ has no free name left: choose one with --out.")


def get_versions() -> dict[str, str]:
    """Return the versions of fieldguide, torch, numpy and Python."""
    return {
        "fieldguide": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }

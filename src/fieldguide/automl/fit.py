"""`fit`, `resume` and `finish`: from data to a trained and tested network in a run folder.

The steps are: read the data, build a plan (`build_plan`), train, calibrate, test, write the run folder. A run folder is locked
while a process works in it. Its status becomes "trained" when the weights are complete, and "done" when everything is written.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fieldguide.automl import config_file, frozen_features, pretrained, profile
from fieldguide.automl.baselines import Baseline, SolverLoop, find_better, fit_baselines, predict
from fieldguide.automl.build_plan import Plan, build_plan
from fieldguide.automl.callbacks import NullCallback
from fieldguide.automl.clock import Clock, get_training_seconds
from fieldguide.automl.progress import make_default_callback
from fieldguide.automl.race import Race, is_possible
from fieldguide.automl.refit import TIME_FRACTION, refit
from fieldguide.automl.request import get_location, group_settings, read_for, read_request
from fieldguide.core import distributed
from fieldguide.core.deprecation import accept_renamed
from fieldguide.core.errors import RunError, SettingsError
from fieldguide.core.files import check_writable, make_folder, report_write_errors
from fieldguide.core.hardware import peak_memory
from fieldguide.core.lock import lock_folder
from fieldguide.core.run_files import is_empty, remove_leftovers, update_run
from fieldguide.core.run_record import SCHEMA, write_record
from fieldguide.core.settings import Settings, canonical
from fieldguide.core.version import __version__
from fieldguide.data import row_digests
from fieldguide.data.dataset import Data
from fieldguide.data.samples import SAMPLES
from fieldguide.data.splits import sample_rows
from fieldguide.inference.predictor import TaskPredictor
from fieldguide.inference.run import Run, open_run
from fieldguide.objectives import Objective
from fieldguide.training import peft, tracking
from fieldguide.training.checkpoint import copy_to_cpu, estimate_bytes
from fieldguide.training.inference_loop import collect
from fieldguide.training.precision import deterministic_kernels, use_threads
from fieldguide.training.trainer import Interrupted, State, Trainer
from fieldguide.training.validation_loss import ValidationLoss

WRITING_SECONDS = 1.5  # of the time for the report, for what is no analysis

# Settings that may change when a run is resumed; any other change would make it a different run.
RESUMABLE_SETTINGS = {
    "minutes",
    "lr",
    "weight_decay",
    "grad_clip",
    "patience",
    "checkpoint_seconds",
    "num_workers",
    "precision",
    "tracker",
    "subgroup",
}


@accept_renamed(watch="callback")
def fit(
    data: Any,
    target: str | None = None,
    *,
    task: str | None = None,
    model: str = "auto",
    minutes: float | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    group: str | None = None,
    time_column: str | None = None,
    allow_bad: bool = False,
    callback: NullCallback | None = None,
    settings: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
) -> Run:
    """Read data, choose a network, train and test it, and return the run.

    Parameters
    ----------
    data : a path, the name of a sample, or a data frame.
    target : the column to predict; inferred if omitted.
    task : a name from `fieldguide tasks`; inferred from the data if omitted.
    model : a name from `fieldguide models`, or "auto".
    minutes : training time; 10 by default.
    out : the new run folder; `runs/NAME-N` by default.
    seed : determines the splits, the initial weights and every batch.
    group : a column whose rows must not be split between training and test.
    time_column : a column of times; the latest rows become the test part.
    allow_bad : continue although more than 1 % of the examples are unusable.
    settings : training settings by name, fields of the network as `model.FIELD`, options of the task as `task.FIELD`,
        types of columns as `column.NAME`, and roles as `role.ROLE`.
    weights : a checkpoint to start from (see `fieldguide.load`), or "auto" for a public one that suits the data; it is downloaded.

    Raises
    ------
    DataError : the data cannot be used; the message says what to do.
    SettingsError : a setting is unknown or cannot work.
    """
    clock = Clock(callback or make_default_callback())
    callback = clock
    requested, _, _, kinds, roles = group_settings(settings or {})
    limits = {"seed": seed} if minutes is None else {"seed": seed, "minutes": minutes}
    chosen = Settings().with_(requested | limits)  # report wrong settings before reading the data
    tracking.check_installed(chosen.tracker)
    if minutes is None and not {"minutes", "steps"} & set(requested) and isinstance(data, str) and data in SAMPLES:
        minutes = SAMPLES[data].minutes
    request: dict[str, Any] = {
        "data": get_location(data),
        "target": target,
        "group": group,
        "time": time_column,
        "allow_bad": allow_bad,
        "kinds": kinds,
        "roles": roles,
        "task": task,
        "settings": {key: config_file.to_yaml_value(value) for key, value in (settings or {}).items() if "." in key},
        "weights": get_location(weights) if weights is not None else None,
        "model": model,
    }
    if out is not None:
        check_available(Path(out))
    check_writable(Path("runs" if out is None else out))
    with (
        closing(callback),
        distributed.join_process_group(),
        use_threads(chosen.threads),
        deterministic_kernels(chosen.deterministic),
    ):
        callback.on_phase(f"reading {describe_source(data)}")
        source, _, _ = read_for(request, data)
        plan = build_plan(
            source,
            task=request["task"],
            model=model,
            minutes=minutes,
            seed=seed,
            settings=settings,
            callback=callback,
            weights=weights,
            clock=clock,
        )
        if plan.weights is not None:  # resume uses the same one, whose config determines the network
            request |= {"weights": plan.weights, "model": "auto"}
        elif weights is None:
            limit = chosen.with_({"minutes": minutes or chosen.minutes})
            if hint := pretrained.suggest(plan.source, plan.task.name, limit, model):
                callback.log(hint)
        check_writable(Path("runs" if out is None else out), needed=estimate_bytes(plan.objective, plan.settings))
        path = distributed.broadcast(create_folder(out, source) if distributed.rank() == 0 else None)
        with lock_run(path):
            record = build_record(plan, request)
            if distributed.rank() == 0:
                check_available(path)  # again, since another process may have had the lock
                remove_leftovers(path)
                save_plan(path, record, plan)
            return train_and_test(path, record, plan, clock)


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


@accept_renamed(watch="callback")
def resume(
    path: str | Path,
    *,
    data: Any = None,
    callback: NullCallback | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Continue a run that was stopped. With a fixed number of steps the result is bit-identical to a run never stopped.

    `data` is needed only for a run whose data was in memory. Raises `RunError` if the data has changed or another process
    trains in the folder, and `SettingsError` for settings that cannot change.
    """
    return continue_run(path, data, callback or make_default_callback(), settings or {}, more_steps=True)


def finish(path: str | Path, *, data: Any = None, callback: NullCallback | None = None) -> Run:
    """Test a run that was stopped with the best weights so far and write its report, without further training.

    `data` is needed only for a run whose data was in memory. Raises `RunError` as `resume` does, and if the run was stopped
    before its first checkpoint.
    """
    return continue_run(path, data, callback or make_default_callback(), {}, more_steps=False)


def continue_run(path: str | Path, data: Any, callback: NullCallback, settings: Mapping[str, Any], more_steps: bool) -> Run:
    """Train, unless `more_steps` is False, and test a run that was stopped."""
    open_run(path)  # report a wrong path before anything else
    clock = Clock(callback)
    callback = clock
    with closing(callback), distributed.join_process_group(), lock_run(Path(path)):
        run = open_run(path)  # now that no other process writes it
        if run.status == "done":
            callback.log(f"{path} is finished already.")
            return run
        if distributed.rank() == 0:
            remove_leftovers(run.path)
            check_writable(run.path)
        chosen = change_settings(check_settings(run, settings), settings, callback)
        with use_threads(chosen.threads), deterministic_kernels(chosen.deterministic):
            note_differences(run.record, callback)
            if run.record["request"]["data"] is None and data is None:
                raise RunError(f"{path} was trained from data in memory; pass the same data to resume(data=...).")
            callback.on_phase(f"reading {describe_source(run.record['request']['data'])}")
            source = read_request(run.record["request"], data)
            if source.manifest.digest != run.record["data"]["digest"]:
                raise RunError(
                    f"{source.source} has changed since {path} was started (its digest differs), and a resumed run must see "
                    "the same data. Restore it, or start a new run."
                )
            plan = Plan.from_run(run, source, chosen, callback)
            if plan.training_seconds is not None:
                plan.training_seconds += 60 * (chosen.minutes - run.settings.minutes)
            run.record["settings"] = plan.settings.to_dict()
            return train_and_test(run.path, run.record, plan, clock, resume=True, more_steps=more_steps)


@contextmanager
def lock_run(path: Path) -> Iterator[None]:
    """Hold the lock of a run folder, in the first of several processes."""
    if distributed.rank() != 0:
        yield
        return
    with lock_folder(path):
        yield


def check_settings(run: Run, changes: Mapping[str, Any]) -> Settings:
    """Return the settings of a stopped run. Raises `RunError` if one that is not changed cannot work on this machine."""
    tracking.check_installed(str(canonical(changes).get("tracker", "none")))
    kept = {key: value for key, value in run.settings.to_dict().items() if key not in canonical(changes)}
    try:
        Settings().with_(kept)
    except SettingsError as error:
        raise RunError(f"{run.path / 'run.json'}: {error} Pass another value with --set.") from None
    return run.settings


def note_differences(record: Mapping[str, Any], callback: NullCallback) -> None:
    """Log differences between this process and the one that started the run, which change its results."""
    if (before := record["cost"]["processes"]) != distributed.get_world_size():
        callback.log(
            f"started with {before} processes, resumed with {distributed.get_world_size()}: each step sees the same examples, "
            "but dropout and augmentation differ"
        )
    if (threads := record["machine"].get("threads", torch.get_num_threads())) != torch.get_num_threads():
        callback.log(
            f"started with {threads} threads, resumed with {torch.get_num_threads()}: the last digits of sums differ, so the "
            "result is not bit-identical to that of a run never stopped"
        )


def change_settings(current: Settings, changes: Mapping[str, Any], callback: NullCallback) -> Settings:
    """Return the settings of a resumed run. Raises `SettingsError` for settings that cannot change."""
    names = canonical(changes)
    if "tracker" not in names and not tracking.is_local(current.tracker):
        callback.log(
            f"tracker={current.tracker} may contact a server, so name it again to use it: --set tracker={current.tracker}"
        )
        current = current.with_({"tracker": "none"})
    wanted = Settings().with_(names).to_dict()
    changed = {key: wanted[key] for key in names if wanted[key] != getattr(current, key)}
    if fixed := set(changed) - RESUMABLE_SETTINGS:
        raise SettingsError(
            f"{', '.join(sorted(fixed))} cannot change when a run is resumed, since it would be a different run. Start a "
            "new one with `fieldguide fit`."
        )
    for key, value in changed.items():
        callback.log(
            f"changed on resume: {key} {getattr(current, key)} -> {value}; from here the run differs from one that was "
            "never stopped"
        )
    return current.with_(changed)


def build_trainer(plan: Plan, callback: NullCallback, folder: Path | None = None) -> Trainer | SolverLoop:
    """Return the training loop of a plan, which scores its validation rows."""
    if plan.card.solver:
        return SolverLoop(plan, callback)
    task, metric, device = plan.task, plan.task.monitored_metric(), distributed.device()
    targets = task.targets(plan.source.take(plan.validation_rows))
    examples, plain = plan.settings.resolved_batch_size, plan.settings.with_({"augmentation": "none", "mixup": 0})
    validation_loss = ValidationLoss(
        lambda: task.loss_batches(plan.source.take(plan.validation_rows[:examples]), plan.card, plain),
        batch=examples,
        device=device,
        precision=plan.settings.precision,
        log=callback.log,
    )

    def evaluate(objective: Objective) -> dict[str, float]:
        if folder and distributed.rank() == 0:
            from fieldguide.report.eval_samples import EvalSamples

            EvalSamples(folder).sample(loop.state.step, loop.settings, lambda: task.log_eval_samples(objective))
        batch_size, precision = max(64, plan.settings.resolved_batch_size), plan.settings.precision
        outputs = collect(objective, plan.validation, batch=batch_size, device=device, precision=precision)
        scores = task.score(outputs, targets)
        return {metric.name: scores[metric.name], **scores, **validation_loss.compute(objective)}  # the main one first

    loop = Trainer(
        plan.objective,
        plan.train_batches,
        plan.settings,
        device=device,
        callback=callback,
        folder=folder,
        evaluate=evaluate,
        metric=(metric.name, metric.better),
        max_steps=plan.max_steps,
        time_limit=plan.training_seconds,
        batch_limit=plan.batch_limit,
    )
    return loop


def race(path: Path, record: dict[str, Any], plan: Plan, callback: Clock) -> Trainer | None:
    """Let networks race, and return the training loop of the winner, which is then in the plan; None without a race."""
    contest = Race(plan, build_trainer, callback)
    is_interrupted = False
    try:
        if not contest.run():
            return None
    except Interrupted:
        is_interrupted = True
    loop = contest.winner.loop
    loop.attach(path)
    record["model"], record["settings"] = plan.describe_model(), loop.settings.to_dict()
    record["cost"] |= {"training_seconds": plan.training_seconds, "max_steps": plan.max_steps}
    record["race"] = contest.to_record()
    with update_run(path, record):
        pass
    if is_interrupted:
        loop.save_and_stop()
    return loop


def estimate_test_seconds(plan: Plan) -> float:
    """Return the seconds of a forward pass over the test rows: a third of the time of a training step for each batch."""
    rows = min(len(plan.splits.test), plan.task.max_test_examples or len(plan.splits.test))
    seconds = plan.seconds_per_step if plan.seconds_per_step == plan.seconds_per_step else 0.0  # NaN if it was not measured
    return rows / plan.settings.resolved_batch_size * seconds / 3


def train(
    plan: Plan,
    loop: Trainer | SolverLoop,
    save: Callable[[State], None] | None = None,
    more_steps: bool = True,
    rivals: list[Baseline] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> State:
    """Train, unless `more_steps` is False, then calibrate on the validation rows. `save` is called in between.

    If one of the fitted `rivals` has a better validation score, it changes places with the network.
    """
    state = loop.train() if more_steps else loop.finish()
    peft.merge(plan.objective)
    if rivals and (better := find_better(plan, rivals, state.best)) is not None:
        metric = plan.task.monitored_metric()
        log(
            f"{better.name} becomes the model of this run: {metric.heading} {metric.text(better.score)} on the validation rows, "
            f"{plan.size} {metric.text(state.best)}"
        )
        rivals[rivals.index(better)] = plan.adopt(better, state.best)
        state.best = better.score
    if save is not None:
        save(state)
    rows = plan.source.take(plan.validation_rows)
    batches = plan.task.batches(rows, plan.card)
    # In float32, whatever the precision of training: the same on every machine.
    outputs = collect(plan.objective, batches, batch=max(64, plan.settings.resolved_batch_size), device=distributed.device())
    plan.task.calibrate(outputs, plan.task.targets(rows))
    return state


def train_and_test(
    path: Path, record: dict[str, Any], plan: Plan, callback: Clock, resume: bool = False, more_steps: bool = True
) -> Run:
    """Train a plan in its run folder, test it, and return the run."""
    baselines = fit_baselines(plan, callback)
    is_begun = resume and any((path / "checkpoints").glob("step-*.json"))
    wants_frozen = record["choice"].get("frozen_features", False) and more_steps and not is_begun
    frozen = frozen_features.fit_frozen(plan, callback) if wants_frozen else None
    if not resume and plan.settings.minutes:
        seconds = get_training_seconds(plan.settings.minutes, callback.elapsed, estimate_test_seconds(plan))
        plan.training_seconds = (1 - TIME_FRACTION) * seconds if plan.settings.refit else seconds
        record["cost"]["training_seconds"] = round(plan.training_seconds, 2)
        if distributed.rank() == 0:
            write_record(path, record)
    raced = race(path, record, plan, callback) if not resume and is_possible(plan, record["request"]) else None
    loop = raced or build_trainer(plan, callback, path)
    if resume and loop.resume():
        callback.log(f"resumed at step {loop.state.step} of {loop.settings.steps}")
    elif not more_steps and not plan.card.solver:
        raise RunError(f"{path} was stopped before its first checkpoint, so there is nothing to test. Resume it instead.")
    if frozen is not None and isinstance(loop, Trainer):
        record["choice"]["frozen"] = frozen.describe()
        loop.start_from_scored(frozen.score)
    if more_steps:
        callback.on_train_start(loop.settings, loop.state.step)

    def save(state: State) -> None:
        record["settings"] = loop.settings.to_dict()  # the number of steps may have been replanned
        record["model"] = plan.describe_model()  # it may be a baseline by now
        record["choice"]["validation"] = state.best
        record["choice"]["rivals"] = [rival.describe() for rival in baselines]
        record["cost"]["parameters"] = profile.count_parameters(plan.objective.model)
        if plan.card.solver:  # its lookups and sums are not counted
            record["cost"]["multiply_adds"] = 0
        if distributed.rank() == 0:
            save_trained(path, record, plan, state)

    finished = False
    try:
        is_free = record["request"]["model"] == "auto" and record["request"]["weights"] is None
        state = train(plan, loop, save, more_steps, baselines if is_free else None, callback.log)
        if state.stopped:
            callback.log(f"stopped at step {state.step}: {state.stopped}")
        if frozen is not None:
            callback.log(frozen_features.describe_outcome(plan, frozen, state))
        if plan.settings.refit:
            record["refit"] = refit(plan, state, record["request"]["weights"], callback)
        save(state)  # again, now calibrated
        try:
            evaluate_and_save(path, record, plan, callback, baselines)
        except Exception:
            callback.log(
                f"the test failed, but the trained network is saved: `fieldguide predict {path}` works, and "
                f"`fieldguide fit --resume {path}` repeats the test"
            )
            raise
        if loop.tracker:
            loop.tracker.log_metrics({"step": state.step, "test": record["scores"]["test"]})
        finished = True
    finally:
        if loop.tracker:
            loop.tracker.close(finished)
    run = open_run(path)
    callback.on_end(run)
    return run


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
        plan.task.save(staging / "preprocess")
    config_file.write_config(path, record)


def evaluate_and_save(path: Path, record: dict[str, Any], plan: Plan, callback: Clock, rivals: Sequence[Baseline] = ()) -> None:
    """Score the test rows next to the baselines, and write record, report and model card."""
    from fieldguide.report.build import write_report

    task, splits = plan.task, plan.splits
    rows = sample_rows(splits.test, task.max_test_examples, plan.settings.seed)
    test, training = plan.source.take(rows), plan.source.take(splits.train)
    sampled = "" if len(rows) == len(splits.test) else f" of {len(splits.test):,}, a random sample,"
    callback.on_phase(f"testing on {len(test):,} examples{sampled} that were not used in training", len(test))
    known_notes = len(task.notes)
    task.prepare_test(training, test)
    task.prepare_scoring(len(test))
    predictor = TaskPredictor(task, plan.card, plan.objective, batch_size=max(64, plan.settings.resolved_batch_size))
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


def describe_source(data: Any) -> str:
    """Return the name of a source, for messages."""
    return str(data) if isinstance(data, str | Path) else "the table in memory"


def get_versions() -> dict[str, str]:
    """Return the versions of fieldguide, torch, numpy and Python."""
    return {
        "fieldguide": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


__all__ = ["NullCallback", "Plan", "build_plan", "finish", "fit", "resume"]

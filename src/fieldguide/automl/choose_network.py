"""What is decided about data before a network is built: task, splits, preprocessing, and which networks suit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fieldguide.automl import distillation, finetune, pretrained, profile
from fieldguide.automl.advisor import Advice, Variant, get_speed, rank_networks
from fieldguide.automl.callbacks import NullCallback
from fieldguide.automl.clock import Clock, get_training_seconds
from fieldguide.automl.request import group_settings
from fieldguide.automl.step_times import StepTimer
from fieldguide.checkpoints import load
from fieldguide.checkpoints.backbone import use_as_backbone
from fieldguide.core import distributed
from fieldguide.core.errors import SettingsError, nearest
from fieldguide.core.settings import Settings
from fieldguide.data.dataset import Data
from fieldguide.data.splits import Splits, split
from fieldguide.tasks import Task, get_requested_task, infer_task
from fieldguide.tasks.analysis.subgroups import check_subgroup

MIN_COUNTING_SECONDS, MAX_COUNTING_FRACTION = 3.0, 0.05  # of the time of training, for counting the costs of networks


@dataclass
class Choice:
    """What is decided about some data before a network is built: task, splits, preprocessing, machine, and ranked networks."""

    source: Data
    task: Task
    why: str
    splits: Splits
    requested: dict[str, Any]
    task_options: dict[str, Any]
    model_fields: dict[str, Any]
    machine: dict[str, Any]
    minutes: float  # of training, as far as they are known yet; infinite without a limit
    advice: Advice
    checkpoint: load.Checkpoint | None = None
    location: str | None = None
    config: Any = None


def choose_network(
    source: Data,
    *,
    task: str | None = None,
    why: str = "requested",
    model: str = "auto",
    minutes: float | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    splits: Splits | None = None,
    callback: Any = None,
    weights: str | Path | None = None,
    clock: Clock | None = None,
) -> Choice:
    """Choose task, splits and preprocessing for data that has been read, and rank the networks. The parameters are those of
    `build_plan.build_plan`.
    """
    callback = callback or NullCallback()
    requested, model_fields, user_options, *_ = group_settings(settings or {})
    task_options = user_options
    if minutes is not None:
        requested["minutes"] = minutes
    elif "steps" in requested:
        requested.setdefault("minutes", 0)  # with a number of steps, time does not limit the run
    requested["seed"] = seed
    kind, why = (get_requested_task(task, source), why) if task else infer_task(source)
    offered = source.features()
    source = kind.select_columns(source)
    left_out = [c.name for c in offered if source.columns[c.name].role == "ignored"]
    callback.on_data(source, kind, why)
    callback.on_phase("checking and splitting the examples")
    checkpoint, location = None, None
    if weights == pretrained.AUTO:
        facts = pretrained.read_facts(source, kind.name, Settings().with_(requested), model)
        location, checkpoint = pretrained.resolve_auto(facts, callback)
    elif weights is not None:
        checkpoint = load.inspect_checkpoint(weights, None if model == "auto" else model, callback.log)
        checkpoint = use_as_backbone(checkpoint, kind.output_types)
    if checkpoint is not None:
        model = checkpoint.size
        task_options = finetune.get_default_options(kind, checkpoint, task_options, callback)
    task_options, model, model_fields = distillation.follow_teacher(
        kind, requested, task_options, model, model_fields, callback
    )
    options = kind.options_from(task_options)
    source = build_examples(kind, source, options, callback.log)
    if subgroup := Settings().with_(requested).subgroup:
        check_subgroup(source, subgroup)
    splits = splits or split(source, seed=seed)
    callback.log(f"split: {splits.description}")
    check_splits(kind, source, splits, options)
    callback.on_phase("fitting the preprocessing")
    train_rows = source.take(splits.train)
    fitted = kind.fit(train_rows, options)
    if left_out:
        reads = " and ".join((*kind.feature, *kind.further))
        fitted.add_note(f"columns not used, since {kind.name} reads only {reads}: {', '.join(left_out)}")
    config = None
    if checkpoint is not None:
        fitted, config = adapt_to_checkpoint(fitted, train_rows, checkpoint, task_options, model_fields, callback)
    for note in fitted.notes:
        callback.log(f"note: {note}")
    choose_metric(fitted, Settings().with_(requested).metric, callback)
    callback.on_phase("choosing a network")
    chosen = Settings().with_(requested)
    machine = distributed.broadcast(profile.get_nominal_machine() if chosen.deterministic else profile.measure_machine())
    limit = chosen.minutes or float("inf")
    if clock is not None and limit < float("inf") and not chosen.deterministic:
        limit = get_training_seconds(limit, clock.elapsed, 0.0) / 60
    advice = rank_networks(
        variants=list_variants(fitted, len(splits.train), allow_smaller=checkpoint is None),
        input_types=fitted.input_types,
        output_types=fitted.output_types,
        minutes=limit,
        machine=machine,
        model=model,
        config=config,
        measure=None if chosen.deterministic else StepTimer(machine, get_speed(machine), limit, callback.log),
        counting_seconds=math.inf if chosen.deterministic else max(MIN_COUNTING_SECONDS, MAX_COUNTING_FRACTION * 60 * limit),
    )
    return Choice(
        source,
        fitted,
        why,
        splits,
        requested,
        user_options,
        model_fields,
        machine,
        limit,
        distributed.broadcast(advice),
        checkpoint,
        location,
        config,
    )


def adapt_to_checkpoint(
    task: Task,
    rows: Data,
    checkpoint: load.Checkpoint,
    task_options: Mapping[str, Any],
    model_fields: Mapping[str, Any],
    callback: Any,
) -> tuple[Task, Any]:
    """Return a fitted task whose rows are short enough for a checkpoint, and the config of its network; None if the network has no
    head for the task.
    """
    dims = {"output_type": task.output_types, **task.model_dims()}
    config = None
    if set(checkpoint.card.output_types) & set(task.output_types):
        config = checkpoint.build_config(dims, model_fields)
    return finetune.limit_length(task, rows, config, checkpoint, task_options, callback), config


def list_variants(task: Task, rows: int, allow_smaller: bool = True) -> list[Variant]:
    """Return the input sizes that a network may get, with the facts and dimensions that follow, the task's own one first."""
    describe = lambda task: {"task": task.name, "rows": rows, **task.data_facts()}
    found = [Variant(0, describe(task), task.model_dims())]
    for size, shrinkage in task.smaller_inputs() if allow_smaller else ():
        smaller = task.with_input_size(size)
        found.append(Variant(size, describe(smaller), smaller.model_dims(), shrinkage))
    return found


def build_examples(kind: type[Task], source: Data, options: Any, log: Callable[[str], None]) -> Data:
    """Return the examples of a task, and log what only the task can find."""
    built = kind.build_examples(source, options)
    for finding in built.findings:
        if finding not in source.findings:
            log(f"{finding.severity}: {finding}")
    return built


def choose_metric(task: Task, requested: str | None, callback: Any) -> None:
    """Set the metric of a task to the one that the user asked for, or to one that suits the data.

    Raises `SettingsError` for a metric that the task does not compute.
    """
    known = {m.name: m for m in task.metrics if m.better in ("max", "min")}
    if requested is not None:
        name = requested.strip().lower().replace(" ", "_").replace("-", "_")
        by_title = {m.title.lower(): m.name for m in known.values()}
        task.metric = name if name in known else by_title.get(requested.lower(), "")
        if not task.metric:
            raise SettingsError(
                f"metric={requested!r} is none of the metrics of {task.name}: {', '.join(known)}.{nearest(requested, known)}"
            )
        return
    name, why = task.suggest_metric()
    if name in known:
        task.metric = name
        callback.log(f"metric: {known[task.metric].title}, since {why} (change this with --metric)")


def check_splits(kind: type[Task], source: Data, splits: Splits, options: Any) -> None:
    """Raise `DataError` if one of the splits cannot be trained on or scored."""
    for name, rows in (("training", splits.train), ("validation", splits.validation), ("test", splits.test)):
        kind.check_split(source.take(rows), name, options)

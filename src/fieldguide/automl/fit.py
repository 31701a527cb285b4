"""`fit`: from data to a trained and tested network in a run folder.

The steps are: read the data, build a plan (`build_plan`), train, calibrate, test, write the run folder. A run folder is locked
while a process works in it. Its status becomes "trained" when the weights are complete, and "done" when everything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from fieldguide.automl import config_file, pretrained
from fieldguide.automl.build_plan import Plan, build_plan
from fieldguide.automl.callbacks import NullCallback
from fieldguide.automl.clock import Clock
from fieldguide.automl.progress import make_default_callback
from fieldguide.automl.request import build_request, get_location, group_settings, read_for
from fieldguide.automl.resume import describe_source, finish, lock_run, resume
from fieldguide.automl.run_writer import build_record, check_available, create_folder, save_plan
from fieldguide.automl.training import build_trainer, train, train_and_test
from fieldguide.core import distributed
from fieldguide.core.deprecation import accept_renamed
from fieldguide.core.files import check_writable
from fieldguide.core.run_files import remove_leftovers
from fieldguide.core.settings import Settings
from fieldguide.data.samples import SAMPLES
from fieldguide.inference.run import Run
from fieldguide.training import tracking
from fieldguide.training.checkpoint import estimate_bytes
from fieldguide.training.precision import deterministic_kernels, use_threads


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
    minutes : time for everything, from reading the data to the report; 10 by default.
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
    requested, *_ = group_settings(settings or {})
    limits = {"seed": seed} if minutes is None else {"seed": seed, "minutes": minutes}
    chosen = Settings().with_(requested | limits)  # report wrong settings before reading the data
    tracking.check_installed(chosen.tracker)
    if minutes is None and not {"minutes", "steps"} & set(requested) and isinstance(data, str) and data in SAMPLES:
        minutes = SAMPLES[data].minutes
    request = build_request(
        data,
        target=target,
        group=group,
        time_column=time_column,
        allow_bad=allow_bad,
        task=task,
        model=model,
        settings=settings,
    )
    request["settings"] = {key: config_file.to_yaml_value(value) for key, value in (settings or {}).items() if "." in key}
    request["weights"] = get_location(weights) if weights is not None else None
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
        source, _, why = read_for(request, data)
        plan = build_plan(
            source,
            task=request["task"],
            why=why,
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


__all__ = ["NullCallback", "Plan", "build_plan", "build_trainer", "finish", "fit", "resume", "train"]

"""`resume` and `finish`: continue a run that was stopped, or test it as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from fieldguide.automl.build_plan import Plan
from fieldguide.automl.callbacks import NullCallback
from fieldguide.automl.clock import Clock
from fieldguide.automl.progress import make_default_callback
from fieldguide.automl.request import read_request
from fieldguide.automl.training import train_and_test
from fieldguide.core import distributed
from fieldguide.core.deprecation import accept_renamed
from fieldguide.core.errors import RunError, SettingsError
from fieldguide.core.files import check_writable
from fieldguide.core.lock import lock_folder
from fieldguide.core.run_files import remove_leftovers
from fieldguide.core.settings import Settings, canonical
from fieldguide.inference.run import Run, open_run
from fieldguide.training import tracking
from fieldguide.training.precision import deterministic_kernels, use_threads

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
        with use_threads(chosen.threads if chosen.deterministic else None), deterministic_kernels(chosen.deterministic):
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


def describe_source(data: Any) -> str:
    """Return the name of a source, for messages."""
    return str(data) if isinstance(data, str | Path) else "the table in memory"

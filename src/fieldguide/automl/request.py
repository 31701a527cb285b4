"""The request of a fit as run.json stores it: settings by group, and the location of the data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fieldguide.automl.index import parse_literal
from fieldguide.core.errors import SettingsError
from fieldguide.core.files import expand_home
from fieldguide.core.settings import canonical
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import Data
from fieldguide.data.read import LoadedSource, load
from fieldguide.data.samples import SAMPLES
from fieldguide.tasks import Task, get_requested_task, infer_task
from fieldguide.tasks import task as task_named


def group_settings(settings: Mapping[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
    """Return settings by group: training, model.*, task.*, column.*, role.*."""
    groups: dict[str, dict[str, Any]] = {"": {}, "model": {}, "task": {}, "column": {}, "role": {}}
    for key, value in settings.items():
        prefix, dot, rest = key.partition(".")
        if dot and prefix not in groups:
            raise SettingsError(f"--set {key}: there is no group {prefix!r}; groups are model., task., column. and role.")
        groups[prefix if dot else ""][rest if dot else key] = value
    return (
        canonical(groups[""]),
        {k: parse_literal(v) for k, v in groups["model"].items()},
        groups["task"],
        groups["column"],
        groups["role"],
    )


def build_request(
    data: Any,
    *,
    target: str | None = None,
    group: str | None = None,
    time_column: str | None = None,
    allow_bad: bool = False,
    task: str | None = None,
    model: str = "auto",
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the request for some data, without weights. The parameters are those of `fit`."""
    *_, kinds, roles = group_settings(settings or {})
    return {
        "data": get_location(data),
        "target": target,
        "group": group,
        "time": time_column,
        "allow_bad": allow_bad,
        "kinds": kinds,
        "roles": roles,
        "task": task,
        "settings": {},
        "weights": None,
        "model": model,
    }


def get_location(data: Any) -> str | None:
    """Return a location from which the data can be read again from any folder, or None for data in memory."""
    if not isinstance(data, str | Path):
        return None
    path = expand_home(data)
    return str(path.absolute()) if path.exists() else str(data)  # the name of a sample stays one


def read_request(request: Mapping[str, Any], data: Any) -> Data:
    """Read the requested data, with the column specification of the task if one is named."""
    return interpret(load_requested(request, data), request, last=True)


def load_requested(request: Mapping[str, Any], data: Any) -> LoadedSource:
    """Read the files of the requested data once."""
    spec = task_named(request["task"]).column_spec if request.get("task") else ColumnSpec()
    wanted = spec.kinds.get("target")
    kind = wanted if isinstance(wanted, str) else None
    source = request["data"] if data is None else data
    return load(source, target=request["target"], target_kind=kind, target_names=spec.names)


def interpret(loaded: LoadedSource, request: Mapping[str, Any], *, last: bool) -> Data:
    """Return the loaded data with the column types and roles of the request."""
    return loaded.interpret(
        kinds=request["kinds"],
        roles={"group": request["group"], "time": request["time"], **(request.get("roles") or {})},
        column_spec=task_named(request["task"]).column_spec if request.get("task") else None,
        allow_bad=request["allow_bad"],
        last=last,
    )


def read_for(request: dict[str, Any], data: Any = None) -> tuple[Data, type[Task], str]:
    """Return the data, its task, and the reason for that task.

    If the inferred task has its own column specification, it is noted in the request and the columns are interpreted
    again with it.
    """
    why = "requested"
    known = SAMPLES.get(request["data"]) if isinstance(request["data"], str) else None
    if known and not request["task"] and task_named(known.task).column_spec != ColumnSpec():
        request["task"], request["target"] = known.task, request["target"] or known.target or None
        why = "the task of this sample"
    loaded = load_requested(request, data)
    source = interpret(loaded, request, last=bool(request["task"]))
    if request["task"]:
        return source, get_requested_task(request["task"], source), why
    kind, why = infer_task(source)
    if kind.column_spec != ColumnSpec():
        request["task"] = kind.name
        source = interpret(loaded, request, last=True)
    return source, kind, why

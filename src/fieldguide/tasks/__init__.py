"""The kinds of problem, found by looking through this folder."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from fieldguide.core.errors import DataError, SettingsError, describe_unknown_task
from fieldguide.data.dataset import Data
from fieldguide.tasks.base import Task

MAX_NAMED_TASKS = 6  # in messages
MAX_NAMED_COLUMNS = 12


@functools.cache
def tasks() -> dict[str, type[Task]]:
    """Return all tasks by name."""
    found: list[type[Task]] = []
    for module in pkgutil.walk_packages(__path__, __name__ + "."):
        found += getattr(importlib.import_module(module.name), "TASKS", ())
    return {t.name: t for t in found}


def task(name: str) -> type[Task]:
    """Return the task with this name. Raises `SettingsError` that suggests the nearest name."""
    if name not in tasks():
        raise SettingsError(describe_unknown_task(name, tasks()))
    return tasks()[name]


def infer_task(data: Data) -> tuple[type[Task], str]:
    """Return the task that the data implies, and the reason. Raises `DataError` if no task or several tasks match."""
    suited = {kind: why for kind in tasks().values() if (why := kind.match(data))}
    if len(suited) == 1:
        return next(iter(suited.items()))
    seen = describe_columns(data)
    if suited:
        raise DataError(
            f"{data.source} matches several tasks: {'; '.join(f'{k.name} ({w})' for k, w in suited.items())}. "
            "Choose one with --task."
        )
    possible = [k for k in tasks().values() if not k.missing_requirements(data)]
    raise DataError(
        f"{data.source}: the task cannot be inferred. The data has: {seen}."
        + "".join(f"\n  --task {k.name} reads {k.reads}" for k in possible[:MAX_NAMED_TASKS])
        + "\n`fieldguide tasks` lists what each task reads."
    )


def describe_columns(data: Data) -> str:
    """Return the columns with their types and roles; for ignored ones, the reason."""
    columns = list(data.columns.values())
    named = ", ".join(
        f"{c.name} ({c.kind}, {c.role}{f': {c.why}' if c.role == 'ignored' and c.why else ''})"
        for c in columns[:MAX_NAMED_COLUMNS]
    )
    return named + (f" and {len(columns) - MAX_NAMED_COLUMNS:,} more columns" if len(columns) > MAX_NAMED_COLUMNS else "")


def get_requested_task(name: str, data: Data) -> type[Task]:
    """Return the task that the user requested. Raises `DataError` if the data lacks what it needs."""
    kind = task(name)
    if lack := kind.missing_requirements(data):
        raise DataError(
            f"{data.source} lacks what {name} needs: {lack}. It has: {describe_columns(data)}. {name} reads {kind.reads}."
        )
    return kind


__all__ = ["Task", "get_requested_task", "infer_task", "task", "tasks"]

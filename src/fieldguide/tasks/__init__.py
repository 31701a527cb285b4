"""The kinds of problem, found by looking through this folder."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from fieldguide.core.errors import DataError, SettingsError, nearest
from fieldguide.data.dataset import Data
from fieldguide.tasks.base import Task


@functools.cache
def tasks() -> dict[str, type[Task]]:
    """All tasks by name."""
    found: list[type[Task]] = []
    for module in pkgutil.walk_packages(__path__, __name__ + "."):
        found += getattr(importlib.import_module(module.name), "TASKS", ())
    return {t.name: t for t in found}


def task(name: str) -> type[Task]:
    """A task by name. Raises `SettingsError` with the nearest one."""
    if name not in tasks():
        raise SettingsError(f"there is no task {name!r}.{nearest(name, tasks())} Tasks are: {', '.join(tasks())}.")
    return tasks()[name]


def infer(data: Data) -> tuple[type[Task], str]:
    """The one task that the data makes before any other, and why. Raises `DataError` where none or several suit."""
    suited = {kind: why for kind in tasks().values() if (why := kind.match(data))}
    if len(suited) == 1:
        return next(iter(suited.items()))
    seen = ", ".join(f"{c.name} ({c.kind}, {c.role})" for c in data.columns.values())
    if suited:
        raise DataError(
            f"{data.source} suits several tasks: {'; '.join(f'{k.name} ({w})' for k, w in suited.items())}. "
            "Say which with --task."
        )
    possible = [k.name for k in tasks().values() if not k.missing_requirements(data)]
    raise DataError(
        f"{data.source} does not say by itself what is to be learnt. It has: {seen}. "
        + (f"With --task it could be: {', '.join(possible)}. " if possible else "")
        + "Tasks read: "
        + "; ".join(f"{k.name}: {k.reads}" for k in tasks().values())
    )


def asked_for(name: str, data: Data) -> type[Task]:
    """The task that the user named. Raises `DataError` where the data lacks what it needs."""
    kind = task(name)
    if lack := kind.missing_requirements(data):
        seen = ", ".join(f"{c.name} ({c.kind}, {c.role})" for c in data.columns.values())
        raise DataError(f"{data.source} lacks what {name} needs: {lack}. It has: {seen}. {name} reads {kind.reads}.")
    return kind


__all__ = ["Task", "asked_for", "infer", "task", "tasks"]

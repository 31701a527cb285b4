"""`check_data`: read data, infer its task and run all checks, without training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fieldguide.automl.choose_network import build_examples, check_splits
from fieldguide.automl.request import group_settings, read_for
from fieldguide.data.dataset import Data
from fieldguide.data.splits import split
from fieldguide.tasks import Task


@dataclass(frozen=True)
class CheckedData:
    """Data that can be trained on: the task that it implies, the reason, and what only the task could find."""

    data: Data
    task: type[Task]
    why: str
    lines: list[str] = field(default_factory=list)


def check_data(
    data: Any,
    *,
    target: str | None = None,
    group: str | None = None,
    time_column: str | None = None,
    task: str | None = None,
    allow_bad: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> CheckedData:
    """Return the data with its findings. The parameters are those of `fit`.

    Raises `DataError`, with every problem, if the data cannot be trained on.
    """
    _, _, options, kinds, roles = group_settings(settings or {})
    request = {
        "data": data,
        "target": target,
        "kinds": kinds,
        "roles": roles,
        "group": group,
        "time": time_column,
        "allow_bad": allow_bad,
        "task": task,
    }
    source, kind, why = read_for(request)
    lines = list[str]()
    examples = build_examples(kind, kind.select_columns(source), kind.options_from(options), lines.append)
    if kind.checks_splits:
        check_splits(kind, examples, split(examples), kind.options_from(options))
    return CheckedData(source, kind, why, lines)

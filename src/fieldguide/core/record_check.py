"""The structure of the JSON files of a run folder, checked before anything in them is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fieldguide.core.errors import RunError
from fieldguide.core.validation import name_kind

# Key -> type of its value, or its own structure; keys that end in "?" may be missing. `None` accepts null as well.
Structure = Mapping[str, Any]
RUN: Structure = {
    "status": str,
    "task": str,
    "model": {"architecture": str, "size": str, "config": dict, "parts?": dict},
    "settings": {"seed": int},
    "data": {"digest": str, "rows": int, "source?": str, "columns?": list, "findings?": list, "split?": {"how": str}},
    "request?": {"data?": (str, list, None), "settings?": dict},
    "choice?": {"why": str, "reasons": list, "against": list},
    "scores?": {"test?": dict, "intervals?": dict, "baselines?": (dict, list)},
    "cost?": dict,
    "machine?": dict,
    "versions?": dict,
    "digests?": dict,
}
PART: Structure = {"architecture": str, "size": str, "config": dict}
TASK: Structure = {"task": str, "columns": list, "options": dict, "state": dict}


def check_run(record: Mapping[str, Any], place: object) -> None:
    """Raise `RunError` if run.json has another structure."""
    check_structure(record, RUN, place)
    for name, part in record["model"].get("parts", {}).items():
        check_structure({"part": part}, {"part": PART}, f"{place}: model.parts.{name}")
    scores = record.get("scores", {}).get("test", {})
    for name, value in scores.items():
        if not isinstance(value, int | float | None):
            raise RunError(f"{place} is damaged: scores.test.{name} must be a number.")


def check_structure(record: Mapping[str, Any], structure: Structure, place: object, path: str = "") -> None:
    """Raise `RunError` that names the first key which is missing or has a value of another type."""
    for key, expected in structure.items():
        name = key.removesuffix("?")
        if name not in record:
            if key.endswith("?"):
                continue
            raise RunError(f"{place} is damaged: {path}{name} is missing.")
        value = record[name]
        kinds = (dict,) if isinstance(expected, Mapping) else expected if isinstance(expected, tuple) else (expected,)
        if not any(value is None if kind is None else type(value) is kind for kind in kinds):
            wanted = " or ".join("null" if kind is None else name_kind(kind) for kind in kinds)
            raise RunError(f"{place} is damaged: {path}{name} must be {wanted}, but is {name_kind(type(value))}.")
        if isinstance(expected, Mapping):
            check_structure(value, expected, place, f"{path}{name}.")

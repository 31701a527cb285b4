"""The structure of the JSON files of a run folder, checked before anything in them is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fieldguide.core.errors import RunError
from fieldguide.core.structure import check_fields

# Key -> type of its value, or its own structure; keys that end in "?" may be missing. Other keys are allowed.
NETWORK = {"architecture": str, "size": str, "config": dict}
RUN: Mapping[str, Any] = {
    "status": str,
    "task": str,
    "model": {**NETWORK, "parts?": dict[str, Any]},
    "settings": {"seed": int},
    "data": {"digest": str, "rows": int, "source?": str, "columns?": list, "findings?": list, "split?": {"how": str}},
    "request?": {"data?": str | list[str] | None, "settings?": dict},
    "choice?": {"why": str, "reasons": list[str], "against": list[str]},
    "scores?": {"test?": dict[str, float | None], "intervals?": dict, "baselines?": dict | list},
    "cost?": dict,
    "machine?": dict,
    "versions?": dict,
    "digests?": dict,
}
TASK: Mapping[str, Any] = {"task": str, "columns": list[dict], "options": dict, "state": dict, "metric?": str}


def check_run(record: Any, place: object) -> None:
    """Raise `RunError` if run.json has another structure."""
    check_structure(record, RUN, place)
    parts = record["model"].get("parts", {})
    check_structure(parts, dict.fromkeys(parts, NETWORK), place)


def check_structure(record: Any, structure: Mapping[str, Any], place: object) -> None:
    """Raise `RunError`, which names the key, if an object has another structure."""
    try:
        check_fields(record, structure, "")
    except ValueError as problem:
        raise RunError(f"{place} is damaged: {problem}.") from None

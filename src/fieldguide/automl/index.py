"""The index of models, tasks and settings: what listing commands and early checks need, readable without torch.

`models.json` and `descriptions.json.gz` are written by `make catalogue` from the cards and tasks. They carry a digest of the
source files they were made from. If a file has changed since, the index is not used, and the slower way through the modules
themselves gives the same answers.
"""

from __future__ import annotations

import ast
import functools
import gzip
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fieldguide.core.errors import SettingsError, describe_unknown_task, nearest

PACKAGE = Path(__file__).parent.parent
INDEX = Path(__file__).with_name("index.json")
DESCRIPTIONS = Path(__file__).with_name("descriptions.json.gz")
SOURCES = ("models", "tasks", "core")


@functools.cache
def compute_source_digest() -> str:
    """Return a digest of the files that define models, tasks and settings."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((PACKAGE / folder).rglob("*")):
            if path.suffix in (".py", ".toml"):
                digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def load_index() -> dict[str, Any] | None:
    """Return the index, or None if it is missing or older than the source files."""
    try:
        index = json.loads(INDEX.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return index if index["digest"] == compute_source_digest() else None


def get_index() -> dict[str, Any]:
    """Return the index, built from the modules (which imports torch) if the stored one is out of date."""
    if (index := load_index()) is not None:
        return index
    from fieldguide.automl.catalogue import build_index

    return build_index()


def describe(name: str, fields: Mapping[str, Any]) -> Any:
    """Return the description of a model, from the stored ones if it is a published size without changed fields."""
    if not fields and (index := load_index()) is not None:
        size = index["names"].get(name)
        if size is None and name.lower() not in index["closed"]:
            raise build_unknown_model_error(name, index)
        if size is not None and DESCRIPTIONS.is_file():
            from fieldguide.automl.description import Description

            stored = json.loads(gzip.decompress(DESCRIPTIONS.read_bytes()))
            if size in stored:
                return Description.from_json(stored[size] | {"tasks": index["models"][size]["tasks"]})
    from fieldguide.automl.catalogue import show

    return show(name, **fields)


def check_names(*, task: str | None = None, model: str = "auto", settings: Mapping[str, Any] | None = None) -> None:
    """Raise `SettingsError` for unknown names of task, model or settings, without importing torch.

    Does nothing if the index is out of date: the names are checked again where they are used.
    """
    from fieldguide.core.settings import Settings

    groups: dict[str, dict[str, Any]] = {"": {}, "model": {}, "task": {}, "column": {}, "role": {}}
    for key, value in (settings or {}).items():
        prefix, dot, rest = key.partition(".")
        if dot and prefix not in groups:
            raise SettingsError(
                f"--set {key}: there is no group {prefix!r}.{nearest(prefix, [g for g in groups if g])} Groups are model., "
                "task., column. and role."
            )
        groups[prefix if dot else ""][rest if dot else key] = value
    Settings().with_(groups[""])
    if (index := load_index()) is None:
        return
    if task is not None and task not in index["tasks"]:
        raise SettingsError(describe_unknown_task(task, index["tasks"]))
    if model != "auto" and model not in index["names"] and model.lower().replace("_", "-") not in index["closed"]:
        raise build_unknown_model_error(model, index)
    if task is not None:
        known = {option["key"] for option in index["tasks"][task]["options"]} | set(index["option_aliases"])
        for key in groups["task"]:
            if key not in known:
                own = sorted(option["key"] for option in index["tasks"][task]["options"])
                raise SettingsError(
                    f"{task} has no option task.{key}.{nearest(key, own)} It has: "
                    f"{', '.join(f'task.{name}' for name in own) or 'none'}."
                )


def build_unknown_model_error(name: str, index: Mapping[str, Any]) -> SettingsError:
    """Return the error for a model name that does not exist."""
    return SettingsError(f"unknown model {name!r}.{nearest(name, index['names'])} `fieldguide models` lists them all.")


def parse_literal(value: Any) -> Any:
    """Return the number, truth value or tuple that a text represents, else the text."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value.capitalize() if value in ("true", "false", "none") else value)
    except (ValueError, SyntaxError):
        return value

"""The record of a run, `run.json`: its schema, its migration from older schemas, reading and writing.

Schema 2 uses the current names of settings and config fields. Only `RENAMED` and `FORMER_FOLDERS` know the names of
schema 1.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fieldguide.core.errors import RunError
from fieldguide.core.files import write_atomically
from fieldguide.core.record_check import check_run
from fieldguide.core.settings import ALIASES
from fieldguide.core.validation import guard, read_json

SCHEMA = 2  # written by this version; every released schema can be read
USABLE_STATUSES = ("trained", "done")  # "trained": the weights are complete, but the test was not finished
REQUIRED = {"status", "task", "model", "settings", "data"}

# Schema 1 -> 2: the place in the record -> {old key: new key}. "config/NAME" holds for one architecture alone.
ROTARY = {"base": "rope_theta", "groups": "kv_heads", "stretch": "rope_scaling"}
RENAMED: dict[str, dict[str, str]] = {
    "settings": dict(ALIASES),
    "cost": {"seconds_a_step": "seconds_per_step", "most_steps": "max_steps"},
    "config": {"classes": "num_classes", "vocab": "vocab_size", "tied": "tie_embeddings", "gives": "output_type"},
    **{f"config/{name}": ROTARY for name in ("llama", "llava", "mixtral", "gemma", "gemma2", "gemma3", "qwen3")},
}

# Folders of a run that schema 1 named differently: name -> former name.
FORMER_FOLDERS = {"eval_samples": "glimpses"}


def find_folder(run: Path, name: str) -> Path:
    """Return the folder `name` of a run, under its former name if an earlier version created it."""
    former = run / FORMER_FOLDERS[name]
    return former if former.is_dir() else run / name


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a run folder in the present schema.

    Raises `RunError` if `folder` is not a run folder, or its record is damaged or newer than this version.
    """
    path = folder / "run.json"
    try:
        record: dict[str, Any] = read_json(path, RunError)
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{folder} is not a run folder: it has no run.json.") from None
    schema = record.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise RunError(
            f"{folder} was written by a newer version of fieldguide (schema {schema}; this version reads up to {SCHEMA}). "
            "Update fieldguide."
        )
    if not isinstance(schema, int) or not record.keys() >= REQUIRED:
        raise RunError(f"{path} is damaged or not the record of a run: required fields are missing.")
    check_run(record, path)
    with guard(path, RunError, ""):
        return migrate(record)


def migrate(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of any released schema in the present one; nothing but names changes."""
    if record["schema"] == SCHEMA:
        return record
    model = dict(record["model"])
    model["config"] = rename_config(model["architecture"], model["config"])
    model["parts"] = {
        name: {**part, "config": rename_config(part["architecture"], part["config"])}
        for name, part in model.get("parts", {}).items()
    }
    settings, cost = (rename(record.get(key, {}), RENAMED[key]) for key in ("settings", "cost"))
    return {**record, "schema": SCHEMA, "model": model, "settings": settings, "cost": cost}


def rename_config(architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a network with the names of the present schema."""
    return rename(config, RENAMED["config"] | RENAMED.get(f"config/{architecture}", {}))


def rename(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return `values` with its keys replaced by `names`; other keys stay."""
    return {names.get(key, key): value for key, value in values.items()}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `run.json` atomically."""
    content = json.dumps(replace_non_finite(record), indent=1, ensure_ascii=False, default=str, allow_nan=False)
    write_atomically(folder / "run.json", content.encode())


def replace_non_finite(value: Any) -> Any:
    """Return a JSON value with null in place of NaN and infinity, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

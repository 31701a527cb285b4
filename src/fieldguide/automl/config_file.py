"""Config files of `fit`: its arguments as YAML. A run folder holds one, `fit.yaml`, that repeats the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fieldguide.core.errors import SettingsError, nearest
from fieldguide.core.files import write_atomically
from fieldguide.core.validation import read_bytes
from fieldguide.core.yaml_reader import parse_yaml

NAME = "fit.yaml"
KEYS = ("data", "target", "task", "model", "weights", "minutes", "seed", "group", "time", "allow_bad", "out", "settings")


def read_config(path: Path) -> dict[str, Any]:
    """Return the arguments in a config file. Raises `SettingsError` naming the file and the line or key that is wrong."""
    try:
        config = parse_yaml(read_bytes(path, SettingsError), path, SettingsError)
    except FileNotFoundError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}.") from None
    if not isinstance(config, dict):
        raise SettingsError(f"{path}: expected keys and values, such as `data: iris`.")
    for key in config:
        if key not in KEYS:
            raise SettingsError(f"{path}: unknown key {key!r}.{nearest(str(key), KEYS)} Keys are {', '.join(KEYS)}.")
    settings = config.get("settings") or {}
    if not isinstance(settings, dict):
        raise SettingsError(f"{path}: settings must hold keys and values, such as `lr: 0.001`.")
    return {**{k: v for k, v in config.items() if v is not None}, "settings": flatten(settings)}


def flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with nested groups (`model: {dim: 64}`) under dotted names (`model.dim`)."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": tuple(v) if isinstance(v, list) else v for inner, v in value.items()}
        else:
            flat[str(key)] = tuple(value) if isinstance(value, list) else value
    return flat


def write_config(folder: Path, record: dict[str, Any]) -> None:
    """Write the config file that repeats a run, with its number of steps in place of its minutes.

    Its first lines say how exact a repetition is.
    """
    request, settings = record["request"], dict(record["settings"])
    if settings["steps"]:
        settings["minutes"] = 0.0
    config = {
        **{key: request[key] for key in ("data", "target", "weights", "group", "time", "allow_bad")},
        "task": record["task"],
        "model": record["model"]["size"],
        "seed": settings.pop("seed"),
        "settings": {k: v for k, v in settings.items() if v is not None} | to_yaml_value(request.get("settings", {})),
    }
    head = "".join(f"# {line}\n" for line in describe_repetition(folder, record))
    body = yaml.safe_dump({k: v for k, v in config.items() if v is not None}, sort_keys=False, allow_unicode=True)
    write_atomically(folder / NAME, (head + body).encode())


def describe_repetition(folder: Path, record: dict[str, Any]) -> list[str]:
    """Return the command that repeats a run, and whether the result is the same."""
    lines = [f"Repeats this run: fieldguide fit --config {folder / NAME}"]
    if record["request"]["data"] is None:
        lines = ["The data was in memory. With the data in a file: fieldguide fit FILE --config " + str(folder / NAME)]
    if record["cost"].get("repeatable", True):
        threads = record["machine"].get("threads", "as many")
        return [*lines, f"On this machine, with {threads} threads and these versions, the result is the same."]
    return [
        *lines,
        "The steps were changed or cut short during training, so the result is similar; --deterministic avoids that.",
    ]


def to_yaml_value(value: Any) -> Any:
    """Return a value with lists in place of tuples, as YAML holds it."""
    if isinstance(value, dict):
        return {key: to_yaml_value(item) for key, item in value.items()}
    return [to_yaml_value(item) for item in value] if isinstance(value, list | tuple) else value

"""What a path is: a run, a checkpoint or data. For errors that suggest the right call; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fieldguide.checkpoints.names import CONFIG_FILES, HUB_PREFIX, PIPELINE_FILE, WEIGHT_SUFFIXES
from fieldguide.core.errors import RunError, SettingsError, nearest

MAX_INSPECTED_FOLDERS = 200
MAX_NAMED = 3

SourceKind = Literal["run", "checkpoint", "data", "missing"]


def detect_kind(source: str | Path) -> SourceKind:
    """Return what a path is; a folder or file that is neither a run nor a checkpoint counts as data."""
    path = Path(source)
    if str(source).startswith(HUB_PREFIX):
        return "checkpoint"
    if not path.exists():
        return "missing"
    if path.is_file():
        return "checkpoint" if path.suffix in WEIGHT_SUFFIXES else "data"
    if (path / "run.json").exists():
        return "run"
    return "checkpoint" if any((path / name).is_file() for name in (*CONFIG_FILES, PIPELINE_FILE)) else "data"


def find_models(folder: Path) -> list[Path]:
    """Return the runs and checkpoints directly in a folder."""
    try:
        inside = sorted(p for p in folder.iterdir() if p.is_dir() or p.suffix in WEIGHT_SUFFIXES)[:MAX_INSPECTED_FOLDERS]
    except OSError:
        return []
    return [p for p in inside if detect_kind(p) in ("run", "checkpoint")]


def check_order(command: str, source: str, inputs: Sequence[str]) -> None:
    """Raise `SettingsError` if the run comes after the data in the arguments of a command."""
    if detect_kind(source) in ("run", "checkpoint"):
        return
    models = [i for i in inputs if detect_kind(i) == "run" or (Path(i).is_dir() and detect_kind(i) == "checkpoint")]
    if models:
        rest = " ".join([source, *(i for i in inputs if i not in models[:1])])
        raise SettingsError(
            f"{source} is no run, but {models[0]} is. The run comes first: `fieldguide {command} {models[0]} {rest}`."
        )


def check_model_source(source: str | Path) -> None:
    """Raise `RunError`, with a suggestion, for a path that is neither a run nor a checkpoint."""
    kind, path = detect_kind(source), Path(source)
    if kind in ("run", "checkpoint"):
        return
    if kind == "missing":
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise RunError(f"{source} does not exist. It must be a run folder or a checkpoint.{nearest(path.name, names)}")
    if path.is_dir() and (found := find_models(path)):
        named = ", ".join(map(str, found[:MAX_NAMED])) + (
            f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
        )
        raise RunError(f"{source} is not a run folder, but contains {named}. Did you mean {str(found[0])!r}?")
    what = "is not a run folder: it has no run.json, and no configuration of a checkpoint" if path.is_dir() else "is a file"
    raise RunError(
        f"{source} {what}. Pass a run folder (`fieldguide fit {'DATA' if path.is_dir() else source}` makes one), or a checkpoint."
    )

"""Errors that a user can act on. The command line prints their text without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FieldguideError(Exception):
    """A problem in the data, the settings or the machine that the user can fix."""


class DataError(FieldguideError):
    """The data cannot be used as it is; the text names the file, line or column and the remedy."""


class SettingsError(FieldguideError):
    """A setting is unknown or has a value that cannot work."""


class WeightsWarning(UserWarning):
    """Part of a checkpoint is not used by the network, which does not need it."""


class WeightsError(FieldguideError):
    """A checkpoint does not fit the network: every missing, unknown and misshaped key is listed."""


class RunError(FieldguideError):
    """A run folder is missing, damaged or of a schema that this version cannot read."""


class TrainingError(FieldguideError):
    """Training stopped: non-finite loss, full disk, damaged checkpoints. Nothing before it is lost."""


class WriteError(TrainingError):
    """A file cannot be written: the disk is full, or its folder is missing or read-only. Files written before are intact."""


def describe_unknown_task(name: str, known: Iterable[str]) -> str:
    """Return the message for a task that does not exist: the tasks that contain the name, or the nearest one."""
    names = list(known)
    fitting = [n for n in names if len(name) > 2 and name.lower().replace("_", "-").replace(" ", "-") in n]
    hint = f" Did you mean one of {', '.join(fitting)}?" if len(fitting) > 1 else nearest(name, fitting or names)
    return f"unknown task {name!r}.{hint} Without --task it is inferred from the data; `fieldguide tasks` lists all tasks."


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest known word, or an empty string."""
    match = difflib.get_close_matches(word.lower(), {k.lower(): k for k in known}, n=1, cutoff=0.5)
    names = {k.lower(): k for k in known}
    return f" Did you mean {names[match[0]]!r}?" if match else ""

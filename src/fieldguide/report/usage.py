"""Instructions for using a run, with its path and an input of its test rows."""

from __future__ import annotations

import shlex
from typing import Any

from fieldguide.core.report_elements import Code
from fieldguide.tasks.report_builder import ExampleInput

MAX_LINE_CHARACTERS = 90
TRAINING_DATA_NOTE = "The data that the network was trained on stand for your own; a target column is ignored."


def build_usage(run: str, example: ExampleInput | None, data: str | None) -> tuple[Code, Code]:
    """Return how to predict on the command line and in Python.

    `run` is the path of the run folder, `data` the path or sample name of the data, or None if it was in memory.
    """
    source: Any = example.source if example else data
    options = dict(example.options) if example else {}
    is_row = isinstance(source, dict)
    argument = data if is_row else source
    name = shlex.quote(run)
    lines = []
    if argument is not None or not is_row:
        words = [] if argument is None else [shlex.quote(str(argument))]
        settings = [f"--set {shlex.quote(f'{key}={value}')}" for key, value in options.items()]
        lines.append(" ".join(["fieldguide predict", name, *words, *settings]))
    if is_row:
        lines.append(f"fieldguide predict {name} NEW_ROWS.csv --out predictions.csv")
    lines.append(f"fieldguide evaluate {name} " + (shlex.quote(data) if data else "LABELED_DATA"))
    arguments = ", ".join([*([] if source is None else [format_python(source)]), *(f"{k}={v!r}" for k, v in options.items())])
    python = f"import fieldguide\n\nrun = fieldguide.open_run({run!r})\nprint(run.predict({arguments})[0])"
    if is_row:
        note = TRAINING_DATA_NOTE if argument is not None else ""
    else:
        note = example.note if example else TRAINING_DATA_NOTE
    return Code("Command line", note, "\n".join(lines)), Code("Python", "", python)


def format_python(value: Any) -> str:
    """Return a value as Python source; long dictionaries take several lines."""
    if not isinstance(value, dict) or len(repr(value)) <= MAX_LINE_CHARACTERS:
        return repr(value)
    lines = [""]
    for key, cell in value.items():
        item = f"{key!r}: {cell!r}, "
        if lines[-1] and len(lines[-1]) + len(item) > MAX_LINE_CHARACTERS:
            lines.append("")
        lines[-1] += item
    return "{\n" + "".join(f"    {line.rstrip()}\n" for line in lines) + "}"

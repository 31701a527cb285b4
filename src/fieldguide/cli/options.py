"""Options and helpers that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON Lines instead of a table.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A training setting, or model.FIELD, task.OPTION, column.NAME, role.ROLE (see `fieldguide settings`). Repeatable.",
    ),
]
PredictSet = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A prediction option (see `fieldguide settings TASK`), e.g. num_beams=4. Repeatable."
    ),
]
AllowBad = Annotated[bool, typer.Option("--allow-bad", help="Continue although more than 1 % of the examples are unusable.")]
Source = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run folder, or a pretrained model: a folder of transformers or timm, a .gguf file, OpenAI's .pt, "
        "hf:organization/name.",
    ),
]
Target = Annotated[str | None, typer.Option(help="The column to predict; inferred by default.")]
TaskName = Annotated[str | None, typer.Option(help="A name from `fieldguide tasks`; inferred by default.")]
Group = Annotated[str | None, typer.Option(help="A column whose equal values stay in one split.")]
Time = Annotated[str | None, typer.Option(help="A column of times; the latest rows become the test part.")]


def parse_pairs(changes: list[str] | None) -> dict[str, Any]:
    """Return the `--set` arguments as a dictionary."""
    from fieldguide.core.errors import SettingsError

    pairs: dict[str, Any] = {}
    for change in changes or []:
        key, sign, value = change.partition("=")
        if not sign or not key.strip():
            raise SettingsError(f"--set {change}: expected KEY=VALUE.")
        pairs[key.strip()] = value.strip()
    return pairs


def check_exists(data: str) -> None:
    """Raise `DataError` for a path that does not exist and is no sample, before anything heavy is imported."""
    from fieldguide.core.files import expand_home

    if expand_home(data).exists():
        return
    from fieldguide.core.errors import DataError, nearest
    from fieldguide.data.samples import SAMPLES

    if data not in SAMPLES and "," not in data:
        raise DataError(
            f"{data}: no such file or folder, and no sample of this name.{nearest(data, SAMPLES)} `fieldguide samples` lists "
            "the samples."
        )


@contextmanager
def show_phases(first: str) -> Iterator[Any]:
    """Show what a command is doing on the terminal, on stderr; elsewhere, show nothing."""
    from fieldguide.automl.output import OutputConsole
    from fieldguide.automl.phases import Phases

    phases = Phases(OutputConsole(stderr=True), lines=False)
    phases.start(first)
    try:
        yield phases
    finally:
        phases.stop()

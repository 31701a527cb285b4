"""The command line. Each command imports what it needs when it runs, so that help and rejected arguments load no torch."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from fieldguide.cli import info_commands, run_commands, train_commands
from fieldguide.core.terminal import echo, tolerate_any_character

INTERRUPTED = 130
COMMANDS = (  # in the order of the help, each with an example
    (train_commands.fit, "fit sales.csv --target price --minutes 5"),
    (train_commands.advise, "advise sales.csv --target price --minutes 5"),
    (run_commands.predict, "predict runs/sales-1 new_rows.csv --json"),
    (run_commands.export, "export runs/sales-1 --to onnx"),
    (run_commands.serve, "serve runs/sales-1 --port 8000"),
    (run_commands.evaluate, "evaluate runs/sales-1 last_month.csv"),
    (run_commands.compare, "compare runs/sales-1 runs/sales-2"),
    (train_commands.check, "check sales.csv --target price"),
    (info_commands.plan, "plan gpt2-medium --on a100-40g --batch 16"),
    (info_commands.probe, "probe server.json"),
    (info_commands.models, "models 'resnet*'"),
    (info_commands.show, "show resnet50"),
    (info_commands.samples, "samples"),
    (info_commands.tasks, "tasks"),
    (info_commands.settings, "settings text-generation"),
)

app = typer.Typer(
    name="fieldguide",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The field guide to neural networks that runs: from your data to a trained, tested network that predicts.",
)


def print_version(value: bool) -> None:
    """Print the version and exit."""
    if value:
        from fieldguide.core.version import __version__

        print(f"fieldguide {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=print_version, is_eager=True)
    ] = False,
) -> None: ...


for function, example in COMMANDS:
    app.command(epilog=f"Example: fieldguide {example}")(function)


def main() -> None:
    """Run the command line. User errors are printed without a traceback (exit code 1); an interrupted run exits with 130."""
    from fieldguide.core.errors import FieldguideError

    tolerate_any_character()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, so that a broken pipe is caught below
    except FieldguideError as error:
        sys.stdout.flush()
        echo(f"fieldguide: {error}", file=sys.stderr)
        raise SystemExit(INTERRUPTED if type(error).__name__ == "Interrupted" else 1) from None
    except KeyboardInterrupt:
        print("fieldguide: interrupted; the last checkpoint is intact.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:  # `fieldguide models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None

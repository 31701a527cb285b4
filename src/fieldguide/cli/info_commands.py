"""Commands that inform: networks, tasks, settings, samples, plans and machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fieldguide.cli.options import Json, Set, Target, TaskName, parse_pairs
from fieldguide.core.terminal import echo


def plan(
    source: Annotated[
        str, typer.Argument(metavar="DATA|RUN|NAME", help="Data as for fit, a run folder, or a name from `fieldguide models`.")
    ],
    target: Target = None,
    task: TaskName = None,
    model: Annotated[str, typer.Option(help="For data: a name from `fieldguide models`.")] = "auto",
    minutes: Annotated[float | None, typer.Option(help="For data: the minutes of the fit.")] = None,
    mode: Annotated[str | None, typer.Option(help="train, predict or serve; the first two by default.")] = None,
    on: Annotated[
        str, typer.Option(help="cpu for this machine, a name such as h100-80g, or a file of `fieldguide probe`.")
    ] = "cpu",
    devices: Annotated[int, typer.Option(help="Number of devices.")] = 1,
    strategy: Annotated[
        str, typer.Option(help="How several devices share the work: ddp, fsdp (training) or tensor (serving).")
    ] = "ddp",
    batch: Annotated[int | None, typer.Option(help="Rows per device and step.")] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens per row, where the network leaves it open: that of the run, else 128.")
    ] = None,
    side: Annotated[
        int | None, typer.Option(help="Pixels per side, where the network leaves it open: those of the run, else 224.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type of stored weights: float32 or bfloat16.")] = "float32",
    new_tokens: Annotated[int, typer.Option(help="Tokens that a language model writes for each row.")] = 0,
    as_json: Json = False,
    changes: Set = None,
) -> None:
    """Plan memory and time of training and prediction, without training."""
    from fieldguide.automl.index import check_names
    from fieldguide.cli.print_plan import print_plans

    settings = parse_pairs(changes)
    check_names(task=task, model=model, settings=settings)
    from fieldguide.automl.plan import plan as make_plans

    plans = make_plans(
        source,
        target,
        mode=mode,
        on=on,
        devices=devices,
        strategy=strategy,
        batch=batch,
        length=length,
        side=side,
        dtype=dtype,
        new_tokens=new_tokens,
        task=task,
        model=model,
        minutes=minutes,
        settings=settings,
    )
    print_plans(plans, as_json)


def probe(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The JSON file to write.")] = Path("machine.json"),
) -> None:
    """Measure this machine for `fieldguide plan --on FILE`: products, convolutions, memory bandwidth, overheads."""
    from fieldguide.core.files import check_writable
    from fieldguide.planning.machines import probe as measure

    check_writable(out.parent)
    machine = measure(out)
    echo(
        f"{machine.title or machine.name}, {machine.memory / 2**30:.0f} GiB: written to {out}. Nothing else should run meanwhile."
    )


def models(
    glob: Annotated[str, typer.Argument(metavar="GLOB", help="A pattern such as 'resnet*'.")] = "*",
    family: Annotated[str | None, typer.Option(help="feedforward, convolutional, recurrent, transformer, ...")] = None,
    task: Annotated[str | None, typer.Option(help="Only models for this task.")] = None,
    as_json: Json = False,
) -> None:
    """List models: sizes, parameters, papers."""
    from fieldguide.cli.console import print_models

    print_models(glob, family, task, as_json)


def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME|RUN", help="A name from `fieldguide models`, or a run folder or pretrained model as for predict."
        ),
    ],
    as_json: Json = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Another value for a field of the model's config. Repeatable."),
    ] = None,
) -> None:
    """Describe a model: what is new in it, sizes, parameters, layers. For a run: how it is called."""
    from fieldguide.inference.source_kind import detect_kind

    if detect_kind(name) in ("run", "checkpoint"):
        from fieldguide.cli.print_signature import print_signature
        from fieldguide.inference.pipeline import pipeline

        print_signature(name, pipeline(name, **parse_pairs(changes)).signature, as_json)
        return
    from fieldguide.automl.index import describe, parse_literal
    from fieldguide.cli.console import print_description

    fields = {k.removeprefix("model."): parse_literal(v) for k, v in parse_pairs(changes).items()}
    print_description(describe(name, fields), as_json)


def samples() -> None:
    """List the sample data sets, which need no download."""
    from fieldguide.cli.console import print_samples

    print_samples()


def tasks(as_json: Json = False) -> None:
    """List the tasks: what they read and how they are scored."""
    from fieldguide.cli.console import print_tasks

    print_tasks(as_json)


def settings(
    task: Annotated[str | None, typer.Argument(metavar="[TASK]", help="A name from `fieldguide tasks`.")] = None,
    as_json: Json = False,
) -> None:
    """List settings: of training, or the options of a task and of its predictions. Key, default, meaning."""
    from fieldguide.cli.console import print_settings

    print_settings(task, as_json)

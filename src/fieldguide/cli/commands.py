"""The command line. Each command imports what it needs when it runs, so that help and rejected arguments load no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fieldguide.core.terminal import echo, tolerate_any_character

app = typer.Typer(
    name="fieldguide",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The field guide to neural networks that runs: from your data to a trained, tested network that predicts.",
)

PARTIAL_FAILURE = 3  # exit code of `predict` if inputs could not be read, or have cells that do not fit the training data
INTERRUPTED = 130

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


@app.command(epilog="Example: fieldguide fit sales.csv --target price --minutes 5")
def fit(
    context: typer.Context,
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="A path, or the name of a sample (see `fieldguide samples`).")
    ] = None,
    target: Target = None,
    task: TaskName = None,
    model: Annotated[str, typer.Option(help="A name from `fieldguide models`, or auto.")] = "auto",
    weights: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint to start from: a folder or file of transformers, timm, torchvision or fieldguide, "
            "hf:organization/name, or auto: a public one that suits the data, which is downloaded."
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Time for everything, from reading to the report; 10 by default.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/NAME-N by default.")] = None,
    seed: Annotated[int, typer.Option(help="Determines the splits, the initial weights and every batch.")] = 0,
    group: Group = None,
    time: Time = None,
    resume: Annotated[Path | None, typer.Option(help="A run folder to continue.")] = None,
    finish: Annotated[
        Path | None,
        typer.Option(help="A run folder whose training was stopped: test the best weights so far, write the report."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="The score that selects the best weights and the model; chosen from the data if omitted.")
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Train again on training and validation rows together at the end.")
    ] = False,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="Give the same scores again on this machine: nothing depends on measured time."),
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file of these arguments; those given here take precedence.")
    ] = None,
    allow_bad: AllowBad = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Choose, and say what would be trained, at what cost; as `fieldguide advise`.")
    ] = False,
    changes: Set = None,
) -> None:
    """Read data, choose a network, train and test it, and write a run folder."""
    from fieldguide.core.errors import SettingsError

    settings = parse_pairs(changes) | ({"deterministic": True} if deterministic else {})
    settings |= ({"metric": metric} if metric is not None else {}) | ({"refit": True} if refit else {})
    arguments: dict[str, Any] = {
        "data": data,
        "target": target,
        "task": task,
        "model": model,
        "weights": weights,
        "minutes": minutes,
        "out": out,
        "seed": seed,
        "group": group,
        "time": time,
        "allow_bad": allow_bad,
    }
    if config is not None:
        from fieldguide.automl.config_file import read_config

        origins = {key: context.get_parameter_source(key) for key in arguments}
        typed = {key for key, origin in origins.items() if origin is not None and origin.name == "COMMANDLINE"}
        given = {key: value for key, value in arguments.items() if key in typed}
        arguments |= read_config(config) | given
        settings = {**arguments.pop("settings"), **settings}
        if "weights" not in given:
            arguments["weights"] = find_configured_weights(arguments["weights"])
    if [arguments["data"], resume, finish].count(None) != 2:
        raise SettingsError(
            "pass either data to train on (`fieldguide fit DATA`), or a run to continue (`fieldguide fit --resume RUN`) or to test "
            "as it is (`fieldguide fit --finish RUN`)."
        )
    from fieldguide.automl.index import check_names

    if (run := resume or finish) is not None:
        check_names(settings=settings)
        continue_run(run, arguments, settings, more_steps=finish is None)
        return
    check_names(task=arguments["task"], model=arguments["model"], settings=settings)
    check_exists(arguments["data"])
    if dry_run:
        del arguments["out"]
        print_data_advice(arguments | {"settings": settings}, as_json=False)
        return
    callback = build_callback()
    from fieldguide.automl.fit import fit as run_fit

    arguments["time_column"] = arguments.pop("time")
    run_fit(arguments.pop("data"), **arguments, callback=callback, settings=settings)


def print_data_advice(arguments: dict[str, Any], as_json: bool) -> None:
    """Print which networks suit some data. The arguments are those of `fieldguide.advise`, with `time` for `time_column`."""
    arguments["time_column"] = arguments.pop("time")
    data = arguments.pop("data")
    with show_phases(f"reading {data}") as phases:
        from fieldguide.automl.advise import advise as give_advice
        from fieldguide.automl.callbacks import NullCallback

        class Shown(NullCallback):
            def on_phase(self, name: str, total: int | None = None) -> None:
                phases.start(name)

        advice = give_advice(data, **arguments, callback=Shown())
    from fieldguide.cli.print_advice import print_advice

    print_advice(advice, as_json)


@app.command(epilog="Example: fieldguide advise sales.csv --target price --minutes 5")
def advise(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A path, or the name of a sample.")],
    target: Target = None,
    task: TaskName = None,
    model: Annotated[str, typer.Option(help="A name from `fieldguide models`, or auto.")] = "auto",
    minutes: Annotated[float | None, typer.Option(help="The minutes that `fit` would get; 10 by default.")] = None,
    seed: Annotated[int, typer.Option(help="Determines the splits.")] = 0,
    group: Group = None,
    time: Time = None,
    allow_bad: AllowBad = False,
    as_json: Json = False,
    changes: Set = None,
) -> None:
    """Advise which network suits some data and this machine: why, what it costs, which score to expect. Nothing is trained."""
    from fieldguide.automl.index import check_names

    settings = parse_pairs(changes)
    check_names(task=task, model=model, settings=settings)
    check_exists(data)
    arguments: dict[str, Any] = {
        "data": data,
        "target": target,
        "task": task,
        "model": model,
        "minutes": minutes,
        "seed": seed,
        "group": group,
        "time": time,
        "allow_bad": allow_bad,
        "settings": settings,
    }
    print_data_advice(arguments, as_json)


def find_configured_weights(weights: str | None) -> str | None:
    """Return the weights that a config file names; names of the hub are found among earlier downloads only.

    Whoever wrote the file decides on the name, but only the user decides what is downloaded.
    """
    from fieldguide.checkpoints.names import HUB_PREFIX

    if not isinstance(weights, str) or not weights.startswith(HUB_PREFIX):
        return weights
    from fieldguide.checkpoints.hub import find_model

    return str(find_model(weights.removeprefix(HUB_PREFIX)))


def continue_run(folder: Path, arguments: dict[str, Any], settings: dict[str, Any], more_steps: bool) -> None:
    """Resume a run, with which only training settings may be given, or finish it, unless `more_steps`."""
    from fieldguide.core.errors import SettingsError
    from fieldguide.core.run_record import read_record

    fixed = {f"--{k.replace('_', '-')}": v for k, v in arguments.items() if k not in ("data", "minutes", "allow_bad")}
    defaults = {"--model": "auto", "--seed": 0}
    if given := [name for name, value in fixed.items() if value is not None and value != defaults.get(name)]:
        raise SettingsError(f"{', '.join(given)} cannot change when a run is resumed; start a new one.")
    from fieldguide.inference.source_kind import check_model_source

    check_model_source(folder)  # report a wrong path before torch is imported
    read_record(folder)
    callback = build_callback()
    from fieldguide.automl.fit import finish, resume

    if arguments["minutes"] is not None:
        settings["minutes"] = arguments["minutes"]
    if not more_steps:
        if settings:
            raise SettingsError(f"{', '.join(settings)}: a run is finished as it is, without other settings.")
        finish(folder, callback=callback)
        return
    resume(folder, callback=callback, settings=settings)


def build_callback() -> Any:
    """Return the progress display, which begins at once: loading torch takes a second or two."""
    from fieldguide.automl.progress import make_default_callback

    callback = make_default_callback()
    callback.on_phase("starting")
    return callback


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


@app.command(epilog="Example: fieldguide predict runs/sales-1 new_rows.csv --json")
def predict(
    run: Source,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT]...",
            help="Files, folders or tables; for text tasks also the text itself; for some generative tasks, nothing.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .csv, .tsv, .parquet or .jsonl file for the inputs with their predictions, or a folder for predictions that are "
            "files: images, videos."
        ),
    ] = None,
    as_json: Json = False,
    changes: PredictSet = None,
) -> None:
    """Predict for raw inputs.

    Inputs that cannot be read, and cells that are malformed, unknown from training or far outside the training range, are listed on
    stderr, and the exit code is then 3.
    """
    table = out if out is not None and out.suffix else None
    if table is not None:
        from fieldguide.inference.predictions import check_output

        check_output(table)
    from fieldguide.inference.source_kind import check_order

    values = list(inputs or ())
    check_order("predict", run, values)
    with show_phases(f"loading {run}") as phases:
        from fieldguide.inference.pipeline import open_source
        from fieldguide.inference.predictions import Predictions

        predictor, options = open_source(run, parse_pairs(changes))
        phases.start("predicting")
        pieces = predictor.stream(values[0], **options) if table is None and not as_json and len(values) == 1 else None
        predictions = predictor.predict(values, **options) if pieces is None else Predictions([])
    if pieces is not None:
        from fieldguide.cli.console import print_stream

        for note in predictor.get_notes():
            echo(f"note: {note}", file=sys.stderr)
        print_stream(pieces)
        return
    notes, problems = predictions.notes, predictions.problems
    if predictor.generates_text and not as_json and table is None:
        for record in predictions:
            echo(record["text"])
        return
    cells = sum(p.count for p in problems)
    from fieldguide.cli.console import print_answers, print_saved

    if table is not None:
        predictions.save(table)
        print_saved(predictions, table)
    else:
        print_answers(predictions.save_media(out), as_json, notes)
    report_failures(predictions, cells)


def report_failures(predictions: list[dict[str, Any]], cells: int) -> None:
    """Exit with `PARTIAL_FAILURE` if inputs could not be read, or if `cells` of them do not fit the training data."""
    sys.stdout.flush()
    if failed := sum("error" in record for record in predictions):
        print(f"fieldguide: {failed:,} of {len(predictions):,} inputs could not be read.", file=sys.stderr)
    if cells:
        print(f"fieldguide: {cells:,} cells do not fit the training data; see the notes.", file=sys.stderr)
    if failed or cells:
        raise SystemExit(PARTIAL_FAILURE)


@app.command(epilog="Example: fieldguide evaluate runs/sales-1 last_month.csv")
def evaluate(
    run: Source,
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="Data with known targets; for CLIP, a folder of images for each class."),
    ],
    as_json: Json = False,
    changes: PredictSet = None,
) -> None:
    """Score a trained network on data with known targets."""
    from fieldguide.inference.source_kind import check_order

    check_order("evaluate", run, [data])
    with show_phases(f"loading {run}") as phases:
        from fieldguide.inference.pipeline import open_source

        predictor, options = open_source(run, parse_pairs(changes))
        phases.start(f"scoring {data}")
        result = predictor.evaluate(data, **options)
    from fieldguide.cli.console import print_scores

    print_scores(predictor, result, as_json)


@app.command(epilog="Example: fieldguide compare runs/sales-1 runs/sales-2")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Two or more run folders of the same task.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
    as_json: Json = False,
) -> None:
    """Compare runs: scores with intervals, costs, settings that differ, and learning curves."""
    from fieldguide.core.run_record import read_record

    for run in runs:
        read_record(run)  # report a wrong path before torch is imported
    from fieldguide.cli.console import print_comparison
    from fieldguide.report.compare import compare as compare_runs

    print_comparison(compare_runs(runs, out), as_json)


@app.command(epilog="Example: fieldguide check sales.csv --target price")
def check(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A path, or the name of a sample.")],
    target: Target = None,
    group: Group = None,
    time: Time = None,
    task: TaskName = None,
    allow_bad: AllowBad = False,
    changes: Set = None,
) -> None:
    """Check data without training: column types, the inferred task, and problems."""
    settings = parse_pairs(changes)
    from fieldguide.automl.index import check_names

    check_names(task=task, settings=settings)
    check_exists(data)
    with show_phases(f"reading {data}"):
        from fieldguide.automl.check import check_data

        checked = check_data(
            data, target=target, group=group, time_column=time, task=task, allow_bad=allow_bad, settings=settings
        )
    from fieldguide.cli.console import print_checked

    print_checked(checked)


@app.command(epilog="Example: fieldguide plan gpt2-medium --on a100-40g --batch 16")
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
    length: Annotated[int, typer.Option(help="Tokens per row, where the network leaves it open.")] = 128,
    side: Annotated[int, typer.Option(help="Pixels per side, where the network leaves it open.")] = 224,
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


@app.command(epilog="Example: fieldguide probe server.json")
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


@app.command(epilog="Example: fieldguide models 'resnet*'")
def models(
    glob: Annotated[str, typer.Argument(metavar="GLOB", help="A pattern such as 'resnet*'.")] = "*",
    family: Annotated[str | None, typer.Option(help="feedforward, convolutional, recurrent, transformer, ...")] = None,
    task: Annotated[str | None, typer.Option(help="Only models for this task.")] = None,
    as_json: Json = False,
) -> None:
    """List models: sizes, parameters, papers."""
    from fieldguide.cli.console import print_models

    print_models(glob, family, task, as_json)


@app.command(epilog="Example: fieldguide show resnet50")
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


@app.command(epilog="Example: fieldguide samples")
def samples() -> None:
    """List the sample data sets, which need no download."""
    from fieldguide.cli.console import print_samples

    print_samples()


@app.command(epilog="Example: fieldguide tasks")
def tasks(as_json: Json = False) -> None:
    """List the tasks: what they read and how they are scored."""
    from fieldguide.cli.console import print_tasks

    print_tasks(as_json)


@app.command(epilog="Example: fieldguide settings text-generation")
def settings(
    task: Annotated[str | None, typer.Argument(metavar="[TASK]", help="A name from `fieldguide tasks`.")] = None,
    as_json: Json = False,
) -> None:
    """List settings: of training, or the options of a task and of its predictions. Key, default, meaning."""
    from fieldguide.cli.console import print_settings

    print_settings(task, as_json)


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

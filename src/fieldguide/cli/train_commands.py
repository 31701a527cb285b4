"""Commands from data to a trained network: check, advise, fit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fieldguide.cli.options import AllowBad, Group, Json, Set, Target, TaskName, Time, check_exists, parse_pairs, show_phases


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

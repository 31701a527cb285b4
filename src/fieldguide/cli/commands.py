"""The command line. Every verb imports what it needs when it runs: `--help` loads no torch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="fieldguide",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="The field guide to neural networks that runs: from your data to the right network, trained, "
    "measured and ready to predict.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON Lines instead of a table.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A training setting, or model.FIELD, task.FIELD, column.NAME, role.ROLE. May be given several times.",
    ),
]
PARTLY = 3  # exit code of `predict` where some inputs could not be read
AllowBad = Annotated[bool, typer.Option("--allow-bad", help="Go on though more than 1 % of the examples are unusable.")]


@app.command()
def fit(
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="A path, or the name of a sample (see `fieldguide samples`).")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The column to predict.")] = None,
    task: Annotated[str | None, typer.Option(help="The kind of problem, where the data leaves it open.")] = None,
    model: Annotated[str, typer.Option(help="A name from `fieldguide models`, or auto.")] = "auto",
    weights: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint to begin with: a folder or file of transformers, timm, "
            "torchvision, fieldguide; or hf:organisation/name."
        ),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Training time; 10 where nothing is said.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/NAME-N where nothing is said.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the split, the first weights and every batch.")] = 0,
    group: Annotated[str | None, typer.Option(help="A column whose rows must stay on one side of the split.")] = None,
    time: Annotated[str | None, typer.Option(help="A column of time: the latest rows are the test.")] = None,
    resume: Annotated[Path | None, typer.Option(help="A run folder to go on with.")] = None,
    allow_bad: AllowBad = False,
    changes: Set = None,
) -> None:
    """Read data, choose a network, train it, test it, and write a run folder."""
    from fieldguide.automl.progress import Progress
    from fieldguide.core.errors import SettingsError

    settings = pairs(changes)
    if (data is None) == (resume is None):
        raise SettingsError(
            "say either what to train on (`fieldguide fit DATA`) or what to go on with (`fieldguide fit --resume RUN`)."
        )
    from fieldguide.automl.fit import NullCallback
    from fieldguide.automl.fit import fit as run_fit
    from fieldguide.automl.fit import resume as run_resume

    callback = Progress() if int(os.environ.get("RANK", 0)) == 0 else NullCallback()
    if resume is not None:
        said = {
            "--target": target,
            "--task": task,
            "--out": out,
            "--group": group,
            "--time": time,
            "--weights": weights,
            "--model": None if model == "auto" else model,
            "--seed": seed or None,
        }
        if given := [name for name, value in said.items() if value is not None]:
            raise SettingsError(f"{', '.join(given)} cannot change when a run is resumed; start a new one.")
        if minutes is not None:
            settings["minutes"] = minutes
        run_resume(resume, callback=callback, settings=settings)
    else:
        run_fit(
            data,
            target=target,
            task=task,
            model=model,
            minutes=minutes,
            out=out,
            seed=seed,
            group=group,
            time_column=time,
            allow_bad=allow_bad,
            callback=callback,
            settings=settings,
            weights=weights,
        )


@app.command()
def predict(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run folder; or a pretrained network: a folder of transformers or "
            "timm, a .gguf file, OpenAI's .pt, hf:organisation/name.",
        ),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT]...",
            help="Files, folders, tables; for text tasks also the text itself; for some that generate, nothing.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder for answers that are files: pictures, films.")] = None,
    as_json: Json = False,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="How to answer, in the task's own words: temperature, beams, threshold, ..."
        ),
    ] = None,
) -> None:
    """Ask a trained network about raw inputs. One that cannot be read is named on the error output, and the exit code is 3."""
    from fieldguide.cli.console import print_stream
    from fieldguide.inference.run import open_run

    asked = pairs(changes)
    if published(run):
        ask(run, inputs or [], asked, as_json)
        return
    opened = open_run(run)
    if not as_json and len(inputs or ()) == 1 and (pieces := opened.stream(inputs[0], **asked)) is not None:
        print_stream(pieces)
        return
    answered(stored(opened.predict(list(inputs or ()), **asked), out), as_json, opened.task.notes)


def answered(answers: list[dict[str, Any]], as_json: bool, notes: list[str]) -> None:
    """Prints answers; ends with `PARTLY` where some inputs have none."""
    from fieldguide.cli.console import print_answers

    print_answers(answers, as_json, notes)
    if wrong := sum("error" in answer for answer in answers):
        sys.stdout.flush()
        print(f"fieldguide: {wrong:,} of {len(answers):,} inputs could not be answered.", file=sys.stderr)
        raise SystemExit(PARTLY)


def stored(answers: list[dict[str, Any]], folder: Path | None) -> list[dict[str, Any]]:
    """Answers with the paths of the files that were written for what is one."""
    from fieldguide.tasks.base import Media

    folder = folder or Path("answers")
    for number, answer in enumerate(answers, 1):
        for name, value in answer.items():
            if isinstance(value, Media):
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"{number:05d}-{name}{value.suffix}"
                path.write_bytes(value.content)
                answer[name] = str(path)
    return answers


def published(model: str) -> bool:
    """Whether this is no run but a pretrained network: a folder with a configuration, a file of weights, or on the hub."""
    from fieldguide.checkpoints.load import CONFIGS
    from fieldguide.checkpoints.weights import SUFFIXES

    path = Path(model)
    return (
        model.startswith("hf:")
        or (path.is_file() and path.suffix in SUFFIXES)
        or (not (path / "run.json").exists() and any((path / name).is_file() for name in CONFIGS))
    )


def ask(model: str, inputs: list[str], asked: dict[str, str], as_json: bool) -> None:
    """Answers of a pretrained network, by what it gives: what follows a text, words on a picture, the class of either, ..."""
    from fieldguide.checkpoints.load import inspect_checkpoint

    found = inspect_checkpoint(model, asked.get("name"))
    if found.card.input_type == "captioned" and "tokens" in found.card.output_types:
        from fieldguide.inference import image_to_text

        how = image_to_text.settled(asked)
        answered(image_to_text.Viewer.load(found).answer(inputs, **how), as_json, [])
        return
    if "embeddings" not in found.card.output_types:
        asked.pop("name", None)
        if "tokens" in found.card.output_types:
            speak(found, inputs, asked, as_json)
            return
        from fieldguide.inference.pretrained_task import Published

        ready = Published.load(found, **{key: asked.pop(key) for key in ("output_type", "columns") if key in asked})
        answered(ready.predict(inputs, **asked), as_json, ready.task.notes)
        return
    from fieldguide.inference.zero_shot import ZeroShot, settled

    made, how = settled(asked)
    made.pop("name", None)
    answered(ZeroShot.load(found, **made).predict(inputs, **how), as_json, [])


def speak(model: Any, prompts: list[str], asked: dict[str, str], as_json: bool) -> None:
    """Answers of a pretrained language model."""
    from fieldguide.cli.console import print_stream
    from fieldguide.inference.text_generation import Speaker, settled

    made, how, chat = settled(asked, prompts)
    speaker = Speaker.load(model, **made)
    asks = [speaker.question(p, chat) for p in prompts]
    if len(asks) == 1 and not as_json and speaker.manner(**how).searched == 1:
        print_stream(speaker.stream(asks[0], **how))
        return
    for prompt, answer in zip(prompts, speaker.say(asks, **how)):
        print(json.dumps({"prompt": prompt, "text": answer}, ensure_ascii=False) if as_json else answer)


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder; or a pretrained network with a head, or CLIP.")],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Data with known answers; for a CLIP, pictures in a folder for each class.")
    ],
    as_json: Json = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For a CLIP: templates, tokenizer, name.")
    ] = None,
) -> None:
    """Score a trained network on data with known answers."""
    from fieldguide.cli.console import print_scores
    from fieldguide.core.errors import SettingsError
    from fieldguide.inference.run import open_run

    asked = pairs(changes)
    if published(run):
        from fieldguide.checkpoints.load import inspect_checkpoint

        found = inspect_checkpoint(run, asked.get("name"))
        if "embeddings" not in found.card.output_types:
            from fieldguide.inference.pretrained_task import Published

            if strange := asked.keys() - {"name"}:
                raise SettingsError(f"{', '.join(sorted(strange))}: a published network is scored as it is, but for its name")
            ready = Published.load(found)
            print_scores(ready, ready.evaluate(data), as_json)
            return
        from fieldguide.inference.zero_shot import ZeroShot, settled

        made, how = settled(asked)
        made.pop("name", None)
        if how.pop("classes"):
            raise SettingsError("classes are named by the data's folders when they are scored; leave them out")
        zero = ZeroShot.load(found, **made)
        print_scores(zero, zero.evaluate(data, **how), as_json)
        return
    if asked:
        raise SettingsError(f"{', '.join(asked)}: a run is scored as it was tested, and takes no settings here")
    opened = open_run(run)
    print_scores(opened, opened.evaluate(data), as_json)


@app.command()
def check(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A path, or the name of a sample.")],
    target: Annotated[str | None, typer.Option(help="The column to predict.")] = None,
    group: Annotated[str | None, typer.Option(help="A column whose rows must stay on one side of the split.")] = None,
    time: Annotated[str | None, typer.Option(help="A column of time.")] = None,
    task: Annotated[str | None, typer.Option(help="The kind of problem, where the data leaves it open.")] = None,
    allow_bad: AllowBad = False,
    changes: Set = None,
) -> None:
    """Let the doctor look at data without training: what it is, and what is wrong with it."""
    from fieldguide.automl.progress import print_data
    from fieldguide.automl.request import grouped, read_for

    _, _, of_task, kinds, roles = grouped(pairs(changes))
    source, kind, why = read_for(
        {
            "data": data,
            "target": target,
            "kinds": kinds,
            "roles": roles,
            "group": group,
            "time": time,
            "allow_bad": allow_bad,
            "task": task,
        }
    )
    kind.examples(kind.select_columns(source), kind.options_from(of_task))  # refuses what only the task can know to be wrong
    print_data(source, kind, why)


@app.command()
def models(
    glob: Annotated[str, typer.Argument(metavar="GLOB", help="Which, such as 'resnet*'.")] = "*",
    family: Annotated[str | None, typer.Option(help="feedforward, convolutional, recurrent, transformer, ...")] = None,
    task: Annotated[str | None, typer.Option(help="Only those that can do this task.")] = None,
    as_json: Json = False,
) -> None:
    """List networks: sizes, parameters, papers."""
    from fieldguide.cli.console import print_models

    print_models(glob, family, task, as_json)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name from `fieldguide models`.")],
    as_json: Json = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Another value for one of the network's fields.")
    ] = None,
) -> None:
    """Describe a network: what is new in it, sizes, parameters by part, layer by layer."""
    from fieldguide.automl.catalogue import show as describe
    from fieldguide.automl.request import literal
    from fieldguide.cli.console import print_description

    overrides = {k.removeprefix("model."): literal(v) for k, v in pairs(changes).items()}
    print_description(describe(name, **overrides), as_json)


@app.command()
def samples() -> None:
    """List the data that comes with fieldguide."""
    from fieldguide.cli.console import print_samples

    print_samples()


def pairs(changes: list[str] | None) -> dict[str, Any]:
    """`--set` arguments as a dictionary."""
    from fieldguide.core.errors import SettingsError

    out: dict[str, Any] = {}
    for change in changes or []:
        key, sign, value = change.partition("=")
        if not sign or not key.strip():
            raise SettingsError(f"--set {change}: write it as KEY=VALUE.")
        out[key.strip()] = value.strip()
    return out


def main() -> None:
    """Runs the command line. Errors that the user can act on are printed without a traceback, with exit code 1; a run
    that was interrupted ends with 130."""
    from fieldguide.core.errors import FieldguideError

    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where a broken pipe is caught, and not when the interpreter ends
    except FieldguideError as error:
        sys.stdout.flush()
        print(f"fieldguide: {error}", file=sys.stderr)
        raise SystemExit(130 if type(error).__name__ == "Interrupted" else 1) from None
    except KeyboardInterrupt:
        print("fieldguide: stopped at once; what the last checkpoint holds is safe.", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `fieldguide models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None

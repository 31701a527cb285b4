"""Commands for runs and published models: predict, evaluate, compare, export, serve."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fieldguide.cli.options import Json, PredictSet, Source, parse_pairs, show_phases
from fieldguide.core.terminal import echo

PARTIAL_FAILURE = 3  # exit code of `predict` if inputs could not be read, or have cells that do not fit the training data


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


def export(
    run: Source,
    to: Annotated[str, typer.Option(help="The format: onnx, torch, executorch, huggingface or gguf.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="The folder to write; RUN-FORMAT by default.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Data with known targets to verify with; by default the run's held-out rows.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Of the stored weights: float32, float16 or int8; for GGUF float16 by default, else float32."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a trained network to a folder that runs without fieldguide, and verify it on held-out rows.

    If an answer differs from the original, the folder is renamed to NAME.unverified, and the exit code is 3.
    """
    with show_phases(f"loading {run}") as phases:
        from fieldguide.exporting.export import export as export_model
        from fieldguide.inference.pipeline import pipeline

        predictor = pipeline(run)
        phases.start(f"exporting to {to}")
        done = export_model(predictor, to, out=out, data=data, name=run, precision=precision)
    from fieldguide.cli.print_export import print_export

    for note in predictor.get_notes():  # for example, that training is not finished
        echo(f"note: {note}", file=sys.stderr)
    print_export(done, as_json)
    if done.passed is False:
        raise typer.Exit(3)


def serve(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Run folders or pretrained models; NAME=RUN serves one under another name."),
    ],
    host: Annotated[str, typer.Option(help="The address to listen on; others than loopback need an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on; 0 chooses a free one.")] = 8000,
    api_key: Annotated[
        str, typer.Option(envvar="FIELDGUIDE_API_KEY", help="The key that clients must send (Authorization: Bearer KEY).")
    ] = "",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name under which clients call the server. Repeatable.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Rows of several requests that are computed together.")] = 128,
    max_wait_ms: Annotated[
        float,
        typer.Option(help="Milliseconds that an idle model waits for more requests; 0: up to 10, if the last batch had more."),
    ] = 0.0,
    queue: Annotated[int, typer.Option(help="Requests that may wait for a model; more are rejected (429).")] = 256,
    slots: Annotated[int, typer.Option(help="Texts that a language model generates at the same time.")] = 16,
    timeout: Annotated[float, typer.Option(help="Seconds until a request is given up (504).")] = 120.0,
) -> None:
    """Serve runs and pretrained models over HTTP: predictions, the API of OpenAI, Open Inference Protocol V2, and a form."""
    from fieldguide.inference.source_kind import check_model_source
    from fieldguide.serving.extras import check_packages

    check_packages()
    for run in runs:
        name, mark, path = run.partition("=")
        check_model_source(path if mark and "/" not in name and not Path(run).exists() else run)
    from fieldguide.serving.settings import ServerSettings

    settings = ServerSettings(host, port, api_key, tuple(allow_host or ()), max_batch, max_wait_ms, queue, timeout, slots)
    with show_phases(f"loading {', '.join(runs)}"):
        from fieldguide.serving.server import load_server

        server = load_server(runs, settings)
    server.serve_forever()


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

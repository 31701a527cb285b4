"""Output of the command line: predictions, scores, and lists of models, tasks and settings."""

from __future__ import annotations

import fnmatch
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fieldguide.automl.progress import console, print_data
from fieldguide.core.errors import SettingsError, describe_unknown_task
from fieldguide.core.numbers import format_plain
from fieldguide.core.terminal import echo


def print_notes(notes: Sequence[str]) -> None:
    """Print notes on stderr."""
    for note in notes:
        echo(f"note: {note}", file=sys.stderr)


def print_failed(answers: Sequence[dict[str, Any]]) -> None:
    """Print the inputs that could not be read on stderr."""
    for answer in answers:
        if "error" in answer:
            echo(f"not read: {answer['input']}: {answer['error']}", file=sys.stderr)


def print_saved(predictions: Any, path: Path) -> None:
    """Print notes and failures, and where the predictions were written."""
    print_notes(predictions.notes)
    print_failed(predictions)
    console.print(f"{len(predictions):,} predictions written to {path}", markup=False, highlight=False, soft_wrap=True)


def print_answers(answers: Sequence[dict[str, Any]], as_json: bool, notes: Sequence[str] = ()) -> None:
    """Print predictions as a table, or as JSON Lines."""
    print_notes(notes)
    if as_json:
        for answer in answers:
            echo(json.dumps(answer, ensure_ascii=False))
        return
    print_failed(answers)
    answers = [answer for answer in answers if "error" not in answer]
    plain = [k for k, v in answers[0].items() if not isinstance(v, dict | list)] if answers else []
    shown = plain if len(plain) > 1 or not answers else list(answers[0])  # nested values only if there is nothing else
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in shown:
        table.add_column(name, justify="right" if isinstance(answers[0][name], float) else "left")
    for answer in answers:
        table.add_row(*(escape(shorten(answer[k])) for k in shown))
    console.print(table)


def shorten(value: Any, most: int = 80) -> str:
    """Return a value of a prediction as text; long lists are shortened."""
    if isinstance(value, dict):
        return " ".join(shorten(v) for v in value.values())
    if isinstance(value, list):
        text = ("; " if any(isinstance(v, dict) for v in value) else " ").join(map(shorten, value))
        return text if len(text) <= most else f"{text[:most].rsplit(' ', 1)[0]} ..."
    return format_plain(value) if isinstance(value, float) else str(value)


def print_checked(checked: Any) -> None:
    """Print the columns, the findings and the task of data."""
    print_data(checked.data, checked.task, checked.why)
    for line in checked.lines:
        console.print(f"  {line}", markup=False)


def print_stream(pieces: Iterator[str]) -> None:
    """Print generated text piece by piece."""
    for piece in pieces:
        echo(piece, end="")
    print()


def print_scores(run: Any, result: dict[str, Any], as_json: bool) -> None:
    for note in result.get("notes", ()):
        echo(f"note: {note}", file=sys.stderr)
    if as_json:
        from fieldguide.core.run_record import replace_non_finite

        print(json.dumps(replace_non_finite(result), allow_nan=False))
        return
    table = Table("metric", "value", "95 % interval", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for metric in run.task.metrics:
        if metric.name not in result["scores"]:
            continue
        interval = metric.interval_text(*result["intervals"][metric.name])
        table.add_row(metric.title, metric.text(result["scores"][metric.name]), interval)
    console.print(f"{result['rows']:,} examples" + (f" ({result['note']})" if result["note"] else ""))
    console.print(table)


def print_comparison(comparison: Any, as_json: bool) -> None:
    """Print the comparison of runs as tables, or as JSON."""
    if as_json:
        from fieldguide.core.run_record import replace_non_finite

        record = {"scores": comparison.scores, "notes": comparison.notes, "page": str(comparison.path)}
        print(json.dumps(replace_non_finite(record), allow_nan=False))
        return
    scores, costs, differences = comparison.list_scores(), comparison.list_costs(), comparison.list_differences()
    table = build_table(*scores.header[:4], *(costs.header[k] for k in (1, 3, 6)))
    for row, cost in zip(scores.rows, costs.rows):
        table.add_row(*(escape(str(cell)) for cell in (*row[:4], *(cost[k] for k in (1, 3, 6)))))
    console.print(table)
    for title, rows in (
        ("Other scores", [[scores.header[k], *(row[k] for row in scores.rows)] for k in range(4, len(scores.header))]),
        (differences.title, differences.rows),
    ):
        if not rows:
            continue
        console.print(f"\n[bold]{title}[/]")
        table = build_table("", *map(escape, comparison.names))
        for row in rows:
            table.add_row(*(escape(shorten(cell)) for cell in row))
        console.print(table)
    console.print()
    for note in comparison.notes:
        console.print(f"note: {escape(note)}")
    console.print(f"Page: {escape(str(comparison.path))}")


def print_models(glob: str, family: str | None, task: str | None, as_json: bool) -> None:
    """Print the models that match. Raises `SettingsError` if there are none."""
    from fieldguide.automl.index import get_index

    index = get_index()
    if task is not None and task not in index["tasks"]:
        raise SettingsError(describe_unknown_task(task, index["tasks"]))
    rows = [
        {
            "name": row["name"],
            "parameters": row["parameters"],
            "family": row["family"],
            "input_type": row["input_type"],
            "output_type": " or ".join(row["output_types"]),
            "year": row["year"],
            "paper": row["paper"],
            "source": row["source"],
            "summary": row["summary"],
        }
        for row in index["models"].values()
        if not row["test"]
        and fnmatch.fnmatch(row["name"], glob)
        and family in (None, row["family"])
        and (task is None or task in row["tasks"])
    ]
    systems = {system["names"][0]: system for system in index["closed"].values()}
    closed = [
        system
        for name, system in systems.items()
        if family is None and fnmatch.fnmatch(name, glob) and (task is None or task in system["tasks"])
    ]
    if not rows and not closed:
        raise SettingsError(
            f"no model matches {glob!r}"
            + (f" in family {family!r}" if family else "")
            + (f" for task {task!r}" if task else "")
            + ". `fieldguide models` lists them all."
        )
    if as_json:
        for row in (*rows, *({**system, "name": system["names"][0], "closed": True} for system in closed)):
            print(json.dumps(row))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("name", "parameters", "input_type", "output_type", "year", "what", "source"):
        table.add_column(name, justify="right" if name == "parameters" else "left", no_wrap=name not in ("what", "source"))
    said = ""
    for row in rows:  # the summary is printed only for the first size of an architecture
        what, said = ("" if row["summary"] == said else row["summary"].split(" (")[0].rstrip(".")), row["summary"]
        table.add_row(
            row["name"],
            f"{row['parameters']:,}" if row["parameters"] else "by data",
            row["input_type"],
            row["output_type"],
            str(row["year"]),
            escape(what),
            escape(row["source"]),
        )
    if rows:
        console.print(table)
    if closed:
        print_closed(closed)


def print_closed(systems: list[dict[str, Any]]) -> None:
    """Print systems whose weights and code are not public, with the most similar model here."""
    table = build_table("closed", "maker", "year", "most similar model", no_wrap=True)
    for system in systems:
        table.add_row(system["names"][0], escape(system["maker"]), str(system["year"]), system["stand_in"])
    console.print(table)


def print_tasks(as_json: bool) -> None:
    """Print the tasks with what they read and their metrics."""
    from fieldguide.automl.index import get_index

    tasks = get_index()["tasks"].values()
    if as_json:
        for task in tasks:
            print(json.dumps(task))
        return
    table = build_table("task", "reads", "metrics")
    for task in tasks:
        table.add_row(task["name"], escape(task["reads"]), ", ".join(m["name"] for m in task["metrics"]))
    console.print(table)


def print_settings(task: str | None, as_json: bool) -> None:
    """Print key, default and meaning of the training settings, or of the options of a task and of its predictions."""
    from fieldguide.automl.index import get_index

    index = get_index()
    if task is None:
        groups = {"fit --set": index["settings"]}
    elif task not in index["tasks"]:
        raise SettingsError(describe_unknown_task(task, index["tasks"]))
    else:
        found = index["tasks"][task]
        options = [{**option, "key": f"task.{option['key']}"} for option in found["options"]]
        groups = {"fit --set": options, "predict --set": found["predict_options"]}
    aliases: dict[str, list[str]] = {}
    for alias, name in (index["aliases"] if task is None else index["predict_aliases"] | index["option_aliases"]).items():
        aliases.setdefault(name, []).append(alias)
    for title, rows in groups.items():
        if as_json:
            for row in rows:
                print(json.dumps({"for": title, **row, "aliases": aliases.get(row["key"].removeprefix("task."), [])}))
            continue
        table = build_table(title, "default", "meaning")
        for row in rows:
            also = aliases.get(row["key"].removeprefix("task."), [])
            default = "chosen" if row["default"] is None else str(row["default"]) or "none"
            meaning = row["meaning"] + (f" (also: {', '.join(also)})" if also else "")
            table.add_row(row["key"], default, escape(meaning))
        if rows:
            console.print(table)


def build_table(*columns: str, no_wrap: bool = False) -> Table:
    """Return an empty table without borders."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, no_wrap=no_wrap)
    return table


def print_description(d: Any, as_json: bool) -> None:
    if not hasattr(d, "parameters"):  # a closed system
        print(json.dumps({**asdict(d), "closed": True})) if as_json else console.print(escape(d.text))
        return
    if as_json:
        print(json.dumps(asdict(d), default=str))
        return
    console.print(f"[bold]{d.name}[/]  {escape(d.summary)}")
    console.print(f"new: {escape(d.new)}")
    console.print(
        f"paper: {escape(d.paper)} ({d.year}); family: {d.family}; takes {d.input_type}, gives {d.output_type}"
        + (f"; tasks: {', '.join(d.tasks)}" if d.tasks else "")
    )
    published = (
        "" if d.published is None else (" (as published)" if d.published == d.parameters else f" (published: {d.published:,})")
    )
    console.print(f"parameters: {d.parameters:,}{published}; multiply-adds: {d.multiply_adds:,} for input {d.inputs}")
    console.print("fields: " + ", ".join(f"{k}={v}" for k, v in d.config.items()))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("size", "parameters"):
        table.add_column(name, justify="right" if name == "parameters" else "left")
    for size, count in d.sizes.items():
        table.add_row(size, f"{count:,}")
    console.print(table)
    parts = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("part", "parameters", "share"):
        parts.add_column(name, justify="left" if name == "part" else "right")
    for part, count in d.parts.items():
        parts.add_row(part, f"{count:,}", f"{100 * count / max(d.parameters, 1):.1f} %")
    console.print(parts)
    layers = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("layer", "kind", "parameters", "output_type"):
        layers.add_column(name, justify="right" if name == "parameters" else "left")
    for layer in d.layers:
        layers.add_row(layer.path, layer.kind, f"{layer.parameters:,}" if layer.parameters else "", layer.shape)
    console.print(layers)


def print_samples() -> None:
    from fieldguide.data.samples import SAMPLES

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("name", "task", "reaches", "what", "licence"):
        table.add_column(name)
    for name, sample in SAMPLES.items():
        metric, value = sample.reaches
        table.add_row(
            name,
            sample.task,
            f"{metric} {value:g}",
            escape(("synthetic: " if sample.synthetic else "") + sample.what),
            sample.licence,
        )
    console.print(table)

"""Several runs side by side: scores with intervals, costs, the settings that differ, and learning curves."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from fieldguide.core.errors import RunError
from fieldguide.core.files import make_folder, write_atomically
from fieldguide.core.numbers import format_plain
from fieldguide.core.report_elements import Bars, Lines, ReportElement, Table
from fieldguide.inference.run import Run, open_run
from fieldguide.report.render import Section, render
from fieldguide.report.training_curves import Curve, collect_curves, collect_scores, smooth
from fieldguide.report.verdict import format_duration
from fieldguide.tasks.spec import Metric

MISSING = "–"
IGNORED_SETTINGS = {"steps", "eval_steps"}  # they follow from the time and the speed of the machine


@dataclass
class Comparison:
    """The comparison of runs of one task, best first. It is printed as a table; `path` is the page that was written."""

    names: list[str]
    runs: list[Run]
    metrics: list[Metric]
    notes: list[str]
    path: Path

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """The test scores of each run, by its name."""
        return {name: run.scores for name, run in zip(self.names, self.runs)}

    def list_scores(self) -> Table:
        """Return the scores of each run, the first metric with its interval."""
        main, *others = self.metrics
        rows = []
        for name, run in zip(self.names, self.runs):
            interval = run.record.get("scores", {}).get("intervals", {}).get(main.name)
            rows.append(
                [
                    name,
                    run.record["model"]["size"],
                    main.text(run.scores.get(main.name)),
                    main.interval_text(*interval) if interval else MISSING,
                    *(m.text(run.scores.get(m.name)) for m in others),
                ]
            )
        header = ("run", "network", main.title, "95 % interval", *(m.title for m in others))
        links = [link_to(run.path / "report.html", self.path.parent) for run in self.runs]
        return Table(
            "Scores", "On the test examples; the best run first. The names lead to the reports.", header, rows, links=links
        )

    def list_costs(self) -> Table:
        """Return size, training time, memory and speed of each run."""
        rows = []
        for name, run in zip(self.names, self.runs):
            cost, machine = run.record["cost"], run.record["machine"]
            latency = cost.get("latency", {})
            rate = latency["batch_examples"] / max(latency["batch"], 1e-9) if "batch" in latency else None
            rows.append(
                [
                    name,
                    f"{cost['parameters']:,}",
                    f"{cost['multiply_adds']:,}",
                    format_duration(cost["seconds"]) if "seconds" in cost else MISSING,
                    f"{cost['steps']:,}" if "steps" in cost else MISSING,
                    f"{cost['peak_memory'] / 2**20:,.0f} MiB" if "peak_memory" in cost else MISSING,
                    format_duration(latency["one"]) if "one" in latency else MISSING,
                    MISSING if rate is None else format_plain(rate, 2),
                    f"{machine['cores']} cores, {machine['device']}",
                ]
            )
        header = (
            *("run", "parameters", "multiply-adds", "training", "steps", "peak memory"),
            *("one prediction", "predictions per second", "machine"),
        )
        return Table("Costs", "Times are comparable only on the same machine.", header, rows)

    def list_differences(self) -> Table:
        """Return the settings that are not the same in all runs."""
        one_architecture = not differs(self.runs, lambda run: run.record["model"]["architecture"])
        flat = [flatten_settings(run.record, with_model=one_architecture) for run in self.runs]
        keys = [key for key in dict.fromkeys(key for each in flat for key in each) if len({each.get(key) for each in flat}) > 1]
        rows = [[key, *(each.get(key, MISSING) for each in flat)] for key in keys]
        note = "" if rows else "All settings are the same."
        return Table("Settings that differ", note, ("setting", *self.names), rows)

    def draw_scores(self) -> Bars:
        """Return the first metric of each run as bars with intervals."""
        main, factor = self.metrics[0], 100 if self.metrics[0].percent else 1
        scored = {n: r.record["scores"] for n, r in zip(self.names, self.runs) if main.name in r.scores}
        return Bars(
            f"{main.heading} of the runs",
            f"{'Higher' if main.better == 'max' else 'Lower'} is better. The lines show 95 % intervals: runs whose intervals overlap "
            "widely may differ by chance.",
            {name: factor * scores["test"][main.name] for name, scores in scored.items()},
            {
                name: (factor * scores["intervals"][main.name][0], factor * scores["intervals"][main.name][1])
                for name, scores in scored.items()
            },
            "%" if main.percent else "",
            highlight=self.names[:1],
        )

    def draw_curves(self) -> list[ReportElement]:
        """Return the learning curves of all runs."""
        metric = self.runs[0].task.monitored_metric()
        losses: dict[str, Curve] = {}
        by_step: dict[str, Curve] = {}
        by_time: dict[str, Curve] = {}
        for name, run in zip(self.names, self.runs):
            lines = run.losses()
            for phase, (steps, values) in collect_curves(lines, "loss").items():
                smoothed = smooth(np.array(values, dtype=float))
                losses[name if phase == "loss" else f"{name}, {phase.removesuffix('.loss')}"] = (steps, smoothed)
            scored = [line for line in lines if "scores" in line]
            by_step[name] = collect_scores([(r["step"], r["scores"]) for r in scored], metric.name)
            seconds = [(r["seconds"] / 60, r["scores"]) for r in scored if "seconds" in r]
            by_time[name] = collect_scores(seconds, metric.name)
        title = f"Validation {metric.title}"
        return [
            Lines("Training loss", "Smoothed. Losses of different objectives are not comparable.", "step", "loss", losses),
            Lines(f"{title} by step", "", "step", metric.title, by_step),
            Lines(f"{title} by time", "", "minutes of training", metric.title, by_time),
        ]

    def write(self) -> None:
        """Write the page."""
        main, best = self.metrics[0], self.runs[0]
        value = main.text(best.scores.get(main.name))
        sections = [
            Section("Scores", " ".join(f"{note}." for note in self.notes), [self.draw_scores(), self.list_scores()]),
            Section("Costs", "", [self.list_costs()]),
            Section("Settings", "", [self.list_differences()]),
            Section("Learning curves", "", self.draw_curves()),
        ]
        page = render(
            title=f"Comparison of {len(self.runs)} runs: {best.record['task']} on {best.record['data']['source']}",
            verdict=f"{value} {main.title} of the best run, {self.names[0]} ({best.record['model']['size']})",
            facts=[],
            sections=sections,
        )
        make_folder(self.path.parent)
        write_atomically(self.path, page.encode())

    def __repr__(self) -> str:
        return "\n".join(
            [*(format_table(t) for t in (self.list_scores(), self.list_costs(), self.list_differences())), *self.notes]
        )


def compare(runs: Sequence[str | Path | Run], out: str | Path = "compare.html") -> Comparison:
    """Compare runs of the same task and write a page.

    Parameters
    ----------
    runs : run folders, or opened runs. Runs that are not finished have curves, but no scores.
    out : the page to write.

    Raises
    ------
    RunError : fewer than two runs are given, they are of different tasks, or none is tested.
    """
    opened = [run if isinstance(run, Run) else open_run(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    if len(opened) < 2:
        raise RunError("a comparison needs at least two run folders.")
    if len(kinds := {run.record["task"] for run in opened}) > 1:
        listed = "; ".join(f"{run.path}: {run.record['task']}" for run in opened)
        raise RunError(f"runs of {len(kinds)} tasks cannot be compared ({listed}). Their scores measure different things.")
    if not any(run.scores for run in opened):
        raise RunError("none of the runs is tested yet. Finish one with `fieldguide fit --resume RUN`.")
    main = opened[0].task.main_metric()
    sign = -1 if main.better == "max" else 1
    opened.sort(key=lambda run: sign * run.scores[main.name] if main.name in run.scores else float("inf"))
    metrics = [m for m in opened[0].task.ordered_metrics() if any(m.name in run.scores for run in opened)]
    comparison = Comparison(name_runs(opened), opened, metrics, find_notes(opened), Path(out))
    comparison.write()
    return comparison


def name_runs(runs: Sequence[Run]) -> list[str]:
    """Return the names of the folders, with as many parent folders as make them differ."""
    parts = [run.path.resolve().parts for run in runs]
    longest = max(map(len, parts))
    depth = next((d for d in range(1, longest) if len({p[-d:] for p in parts}) == len(parts)), longest)
    return ["/".join(p[-depth:]) for p in parts]


def find_notes(runs: Sequence[Run]) -> list[str]:
    """Return what makes the runs less comparable."""
    notes = []
    if unfinished := [str(run.path) for run in runs if not run.scores]:
        notes.append(f"Not tested yet: {', '.join(unfinished)}")
    if differs(runs, lambda run: run.record["data"]["digest"]):
        notes.append("The runs were trained and tested on different data, so their scores are not directly comparable")
    elif differs(runs, lambda run: np.sort(run.read_splits().test).tobytes()):
        notes.append("The runs were tested on different rows of the same data: they have different seeds or splits")
    if differs(runs, lambda run: tuple(run.record["machine"].get(key) for key in ("cores", "threads", "device"))):
        notes.append("The runs were made on different machines or with different numbers of threads, so their times differ")
    return notes


def link_to(page: Path, folder: Path) -> str:
    """Return the address of a page for a link in a page in `folder`: relative, unless they are on different drives."""
    try:
        return quote(Path(os.path.relpath(page, folder)).as_posix())
    except ValueError:
        return page.resolve().as_uri()


def differs(runs: Sequence[Run], get: Callable[[Run], Any]) -> bool:
    """Return whether a property is not the same in all runs."""
    return len({get(run) for run in runs}) > 1


def flatten_settings(record: Mapping[str, Any], with_model: bool) -> dict[str, str]:
    """Return what was chosen for a run as text by name: network, training settings, options, split and versions.

    `with_model` includes the fields of the network's config, which mean the same only within an architecture.
    """
    model, request = record["model"], record["request"]
    flat = {"network": model["size"], "data": record["data"]["source"], "split": record["data"]["split"]["how"]}
    flat |= {key: str(value) for key, value in record["settings"].items() if key not in IGNORED_SETTINGS}
    flat |= {f"model.{key}": str(value) for key, value in model["config"].items() if with_model}
    flat |= {key: str(value) for key, value in request.get("settings", {}).items()}
    flat |= {key: str(request.get(key)) for key in ("target", "group", "time", "weights")}
    return flat | {f"version of {key}": str(value) for key, value in record["versions"].items()}


def format_table(table: Table) -> str:
    """Return a table as aligned text."""
    rows = [[str(cell) for cell in row] for row in (table.header, *table.rows)]
    if len(rows) == 1:
        return f"{table.title}\n  {table.note or 'nothing'}\n"
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([table.title, *lines, ""])

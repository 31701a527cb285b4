"""The progress display of `fit`: data, chosen network, a progress bar and the result."""

from __future__ import annotations

import os
import time
from typing import Any, cast

from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from fieldguide.automl.callbacks import NullCallback
from fieldguide.automl.output import OutputConsole, report_lost_output
from fieldguide.automl.phases import Phases
from fieldguide.core.numbers import format_plain

# Into a pipe or a file, lines are as long as their content asks; on a terminal they fit it.
console = OutputConsole(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console = OutputConsole(highlight=False, soft_wrap=True, width=200)
MAX_METRIC_NAME = 20  # characters of the name of a metric next to the bar
MAX_LOSSES = 2  # losses next to the bar
MAX_LISTED_COLUMNS = 30  # columns of a table that are listed
MAX_TABLE_WIDTH = 100  # characters of a line of that list


class Progress:
    """Show the progress of `fit` on the terminal: the data, the choice, then a bar with loss, scores and time
    left.
    """

    def __init__(self) -> None:
        self.bar: Bar | None = None
        self.phases = Phases(console)
        console.on_lost = report_lost_output
        self.best: str = ""

    def log(self, text: str) -> None:
        (self.bar.console if self.bar else console).print(escape(text))

    def on_phase(self, name: str, total: int | None = None) -> None:
        self.stop()
        self.phases.start(name, total)

    def on_progress(self, done: int) -> None:
        self.phases.advance(done)

    def on_data(self, data: Any, task: Any, why: str) -> None:
        print_data(data, task, why)

    def on_plan(self, advice: Any, config: Any) -> None:
        best = advice.best
        console.print(
            f"\n[bold]{best.name}[/]: {best.parameters:,} parameters, {best.multiply_adds:,} multiply-adds per example"
        )
        for reason in best.reasons:
            console.print(f"  + {escape(reason)}")
        for reason in best.against:
            console.print(f"  - {escape(reason)}")
        others = list(dict.fromkeys(o.architecture for o in advice.options[1:] if o.architecture != best.architecture))
        if others:
            console.print(f"  alternatives: {', '.join(others[:4])}")
        ruled = list({o.architecture: o for o in advice.rejected if o.rejected}.values())
        for option in ruled[:4]:
            console.print(f"  [dim]rejected: {option.name}: {escape(option.rejected)}[/]")
        console.print()

    def on_train_start(self, settings: Any, done: int) -> None:
        self.stop()
        self.bar = Bar(  # fits 80 columns
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(None),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[score]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self.line = self.bar.add_task("", total=settings.steps, completed=done, loss="-", score="")
        self.steps, self.last_printed, self.done, self.began = settings.steps, done, done, time.monotonic()
        self.bar.start()
        console.print(
            f"training {settings.steps:,} steps of {settings.batch_size} examples, {settings.optimizer} "
            f"lr {settings.lr:g}, {settings.precision}"
        )

    def on_replan(self, steps: int) -> None:
        self.steps = steps
        if self.bar:
            self.bar.update(self.line, total=steps)

    def on_step(self, step: int, losses: dict[str, float]) -> None:
        assert self.bar is not None  # created by `on_train_start`
        text = " ".join([format_plain(v) for k, v in losses.items() if k.endswith("loss")][:MAX_LOSSES])
        self.bar.update(self.line, completed=step, loss=text)

    def on_evaluate(self, step: int, scores: dict[str, float], best: bool) -> None:
        if self.bar is None:  # a run that is finished without further training
            return
        name, value = next(iter(scores.items()))
        if best:
            self.best = format_plain(value)
        self.bar.update(self.line, score=f"best {shorten(name, MAX_METRIC_NAME)} {self.best}")
        # Without a terminal there is no bar; a line is printed at most 20 times.
        if not console.is_terminal and (best or step == self.steps) and step - self.last_printed >= self.steps / 20:
            self.last_printed = step
            left = (time.monotonic() - self.began) / (step - self.done) * (self.steps - step)
            console.print(f"step {step:,} of {self.steps:,}: validation {name} {format_plain(value)}; about {left:.0f} s left")

    def on_end(self, run: Any) -> None:
        self.stop()
        from fieldguide.report.pages import format_duration, summarize_result

        cost = run.record["cost"]
        console.print(f"\n[bold]{escape(summarize_result(run.record, run.task.main_metric()))}[/]")
        console.print(
            f"Trained {cost['steps']:,} steps in {format_duration(cost['seconds'])}; peak memory {cost['peak_memory'] / 2**20:,.0f} MiB."
        )
        console.print(f"Report:  {escape(str(run.path / 'report.html'))}")
        console.print(f"Predict: fieldguide predict {escape(str(run.path))} INPUT...")

    def stop(self) -> None:
        self.phases.stop()
        if self.bar:
            self.bar.stop()
            self.bar = None

    def close(self) -> None:
        self.stop()


def make_default_callback() -> NullCallback:
    """Return the progress display on the first process, and a silent callback on the others."""
    return cast(NullCallback, Progress()) if int(os.environ.get("RANK", 0)) == 0 else NullCallback()


def shorten(text: str, most: int) -> str:
    """Return a text of at most `most` characters, without its middle if it is longer."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-((most - 1) // 2) :]}"


def print_data(data: Any, task: Any, why: str) -> None:
    from fieldguide.data.summary import describe_missing, describe_reason, describe_values  # imports polars

    summary = data.manifest.summary()
    console.print(
        f"[bold]{escape(data.source)}[/]: {len(data):,} examples from {summary['files']:,} "
        f"file{'s' if summary['files'] != 1 else ''}" + (f", {summary['dropped']:,} dropped" if summary["dropped"] else "")
    )
    shown = list(data.columns.values())
    width = min(console.width, MAX_TABLE_WIDTH)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", width=width)
    for name in ("column", "kind", "role"):
        table.add_column(name, max_width=24, overflow="fold")
    table.add_column("missing", justify="right", no_wrap=True)
    table.add_column("values", ratio=1, overflow="fold")
    for column in shown[:MAX_LISTED_COLUMNS]:
        words = "; ".join(filter(None, (describe_values(data, column), describe_reason(column))))
        table.add_row(escape(column.name), column.kind, column.role, describe_missing(data, column), escape(words))
    console.print(table)
    if len(shown) > MAX_LISTED_COLUMNS:
        console.print(f"  and {len(shown) - MAX_LISTED_COLUMNS} more columns")
    for finding in data.findings:
        console.print(f"  {finding.severity}: {finding}", markup=False)
    console.print(f"task: {task.name} ({escape(why)})")

"""Printing of advice on data."""

from __future__ import annotations

import json
import math
from typing import Any

from rich.markup import escape
from rich.table import Table

from fieldguide.automl.progress import console
from fieldguide.cli.print_plan import format_bytes, format_time
from fieldguide.core.terminal import echo

MAX_REJECTED = 6  # networks that were ruled out, in the list


def print_advice(advice: Any, as_json: bool) -> None:
    """Print advice as text, or as JSON."""
    if as_json:
        echo(json.dumps(make_finite(advice.to_dict()), ensure_ascii=False))
        return
    rows, machine = advice.rows, advice.machine
    flops = ", ".join(f"{value / 1e9:,.0f} GFLOPS {name}" for name, value in machine["flops"].items())
    facts = ", ".join(f"{name} {format_fact(value)}" for name, value in advice.facts.items() if value not in (None, ""))
    print_line("task", f"{advice.task} ({advice.why})")
    print_line("rows", ", ".join(f"{count:,} {name}" for name, count in rows.items()))
    print_line("facts", facts)
    print_line("machine", f"{machine['cores']} cores, {format_bytes(machine['memory'])}, {flops}")
    if math.isfinite(advice.training_minutes):
        print_line("time", f"{advice.minutes:g} minutes, of which about {advice.training_minutes:.2g} for training")
    for note in advice.notes:
        print_line("note", note)
    console.print(build_table(advice))
    best = advice.best
    console.print(f"[bold]{best.name}[/] is the first choice:")
    for reason in best.reasons:
        console.print(f"  + {escape(reason)}")
    for reason in best.against:
        console.print(f"  - {escape(reason)}")
    if len(advice.racing) > 1:
        print_line("race", f"{', '.join(advice.racing)} train for equal time first; the best goes on")
    if advice.baselines:
        scores = ", ".join(
            name if score is None else f"{name} {advice.metric.text(score)}" for name, score in advice.baselines.items()
        )
        print_line("baselines", f"{scores} on validation rows; the best model is kept, whether network or baseline")
    if advice.pretrained:
        console.print(escape(advice.pretrained))
    for name, reason in advice.rejected[:MAX_REJECTED]:
        console.print(f"[dim]ruled out: {escape(name)}: {escape(reason)}[/]")
    if more := len(advice.rejected) - MAX_REJECTED:
        console.print(f"[dim]and {more} more[/]" if more > 0 else "", end="\n" if more > 0 else "")


def build_table(advice: Any) -> Table:
    """Return the table of candidates."""
    metric = advice.metric
    reduced = any(c.input_size for c in advice.candidates)
    table = Table(box=None, pad_edge=False)
    table.add_column("network")
    for name in ["parameters", *(["input"] if reduced else []), "a pass takes", "passes", "memory", f"expected {metric.title}"]:
        table.add_column(name, justify="right")
    for candidate in advice.candidates:
        about = "" if candidate.is_measured else "~"
        expected = "unknown"
        if candidate.expected:
            low, _, high = candidate.expected
            expected = f"{metric.text(low)} to {metric.text(high)}"
        table.add_row(
            candidate.name,
            f"{candidate.parameters:,}",
            *([str(candidate.input_size or "full")] if reduced else []),
            about + format_time(candidate.epoch_seconds),
            "no limit" if math.isinf(candidate.epochs) else f"{candidate.epochs:,.3g}",
            format_bytes(candidate.peak_bytes) if candidate.peak_bytes else "?",
            expected,
        )
    return table


def print_line(name: str, text: str) -> None:
    console.print(f"[dim]{name:10}[/]{escape(text)}")


def format_fact(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def make_finite(value: Any) -> Any:
    """Return a value for JSON with None in place of infinite numbers."""
    if isinstance(value, dict):
        return {key: make_finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [make_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Graphs of tasks that read tables: raw numbers and texts of categories -> classes, numbers, scores of anomalies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.column_types import FALSE_WORDS, TRUE_WORDS
from fieldguide.data.dataset import Column
from fieldguide.data.number_formats import NumberFormat, list_replacements
from fieldguide.data.preprocessing.labels import list_spellings
from fieldguide.data.text_values import MISSING_MARKERS
from fieldguide.exporting.graph import BATCH, ExportError, Graph, Lookup
from fieldguide.exporting.steps.tables import TableSteps
from fieldguide.exporting.supervised import finish

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

READING = ("numbers", "stacked")  # parts of the program


@dataclass(frozen=True)
class TableInput:
    """How a table enters a graph; see `Graph`."""

    front: TableSteps
    inputs: tuple[TensorSpec, ...]
    columns: dict[str, list[str]]
    lookups: tuple[Lookup, ...]
    values: dict[str, Any]


def build_table(predictor: TaskPredictor) -> Graph:
    """Return the graph of a tabular task: one input for each column, raw numbers and texts of categories."""
    task: Any = predictor.task
    if task.preparer.texts:
        raise ExportError(
            f"column {next(iter(task.preparer.texts))!r} holds texts, whose TF-IDF vectors cannot be part of a graph yet. Train "
            "without it: --set role.NAME=ignored."
        )
    table = describe_table(task, predictor.card.number_scale, predictor.card.input_type == "vector")
    parts = {"columns": table.columns, "lookups": table.lookups, "values": table.values}
    return finish(predictor, table.front, table.inputs, parts=(*READING, "tables", "classes", "table_answers"), **parts)


def describe_table(task: Any, scale: str, as_vector: bool) -> TableInput:
    """Return how the table of a task enters a graph, with numbers scaled by `scale`, as one vector or as numbers and categories."""
    kinds = {column.name: column for column in task.input_columns()}
    dates = [name for name, column in kinds.items() if column.kind == "date"]
    front = TableSteps(task.preparer, dates, scale, as_vector)
    texts = front.text_categories
    inputs: tuple[TensorSpec, ...] = (
        TensorSpec("raw", "float64", (BATCH, Axis("numbers", len(front.raw_columns)))),
        TensorSpec("codes", "int64", (BATCH, Axis("categories", len(texts))), low=0, high=1),
    )
    inputs = tuple(spec for spec in inputs if spec.axes[1].size)
    lookups = tuple(
        Lookup(c.column, tuple(c.values), 1, 0, c.size - 1 if c.missing else 0, list_spellings(c.values, 1)) for c in texts
    )
    used = [*front.raw_columns, *(c.column for c in texts)]
    columns = {"raw": front.raw_columns, "codes": [c.column for c in texts]}
    return TableInput(
        front, inputs, columns, lookups, {"columns": [describe_column(kinds[name]) for name in used], **describe_cells()}
    )


def describe_column(column: Column) -> dict[str, Any]:
    """Return how the program reads the cells of a column. Raises `ExportError` for dates that it cannot read."""
    dates = column.date_format or {}
    if unread := [name for name in ("parts", "weeks", "compact", "region", "yearly_steps") if dates.get(name)]:
        raise ExportError(
            f"column {column.name!r} has dates that run.py cannot read ({', '.join(unread)}). Write them as 2026-01-31 and train "
            f"again, or train without it: --set role.{column.name}=ignored."
        )
    found = {
        "name": column.name,
        "kind": column.kind,
        "format": column.number_format or dates,
        "literals": column.literals or (),
    }
    if column.kind == "number":
        found["pattern"] = NumberFormat(**(column.number_format or {})).build_pattern()
    return found


def describe_cells() -> dict[str, Any]:
    """Return words and characters that mean the same in all columns."""
    truth = [word for pair in zip(TRUE_WORDS, FALSE_WORDS) for word in pair]
    return {"missing": MISSING_MARKERS, "truth": truth, "characters": list_replacements()}

"""Summaries of columns for people: ranges, examples, and classes with counts."""

from __future__ import annotations

import re
from typing import Any

import polars as pl

from fieldguide.data.dataset import Column, Data
from fieldguide.data.text_values import count_values

MAX_CLASSES = 12  # classes of a target that are listed; features list a third of it
MAX_EXAMPLE_CHARACTERS = 40
# Reasons that only repeat the type and what the summary shows anyway
PLAIN_REASON = re.compile(
    r"all [\d,]+ values are numbers|[\d,]+ distinct values|the target has .*|two values: .*|stored as \w+|"
)


def describe_values(data: Data, column: Column) -> str:
    """Return the range and three examples of numbers and dates, the most frequent categories with counts, or an example."""
    if column.name not in data.rows.columns:
        return ""
    values = data.rows[column.name].drop_nulls()
    if not len(values) or values.dtype.is_nested() or values.dtype == pl.Object:
        return ""
    if column.kind == "number" or (column.kind == "identifier" and values.dtype.is_numeric()):
        few = values.unique(maintain_order=True).head(3).to_list()
        low, high, *examples = (format_number(v) for v in (values.min(), values.max(), *few))
        return f"{low} to {high}, e.g. {', '.join(examples)}"
    if column.kind == "date":
        low, high = (str(v).removesuffix(" 00:00:00") for v in (values.min(), values.max()))
        return f"{low} to {high}"
    if column.kind in ("category", "boolean"):
        names, counts = count_values(values.cast(pl.String))
        most = MAX_CLASSES if column.role == "target" else MAX_CLASSES // 3
        listed = ", ".join(f"{name} {count:,}" for name, count in list(zip(names, counts))[:most])
        one, many = ("class", "classes") if column.role == "target" else ("value", "values")
        what = one if len(names) == 1 else many
        return f"{len(names):,} {what}: {listed}" + (f", and {len(names) - most:,} more" if len(names) > most else "")
    if column.kind in ("text", "identifier") and values.dtype == pl.String:
        first = str(values[0]).replace("\n", " ")
        return f"e.g. {first[:MAX_EXAMPLE_CHARACTERS]!r}" + ("..." if len(first) > MAX_EXAMPLE_CHARACTERS else "")
    return ""


def describe_missing(data: Data, column: Column) -> str:
    """Return the number and share of missing values, "" without any."""
    if column.name not in data.rows.columns or not (count := data.rows[column.name].null_count()):
        return ""
    return f"{count:,} ({100 * count / len(data):.0f} %)" if count >= 0.005 * len(data) else f"{count:,}"


def describe_reason(column: Column) -> str:
    """Return why the column has its type, "" if the values show it."""
    return "" if PLAIN_REASON.fullmatch(column.why) else column.why


def format_number(value: Any) -> str:
    """Return a number with up to six digits; larger whole numbers in full."""
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.6g}"

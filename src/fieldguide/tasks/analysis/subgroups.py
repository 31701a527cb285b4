"""Scores of groups of test rows with the same value in a column that the user names (`--set subgroup=COLUMN`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from fieldguide.core.errors import SettingsError, nearest
from fieldguide.core.report_elements import Bars, ReportElement, Table
from fieldguide.data.dataset import BOOKKEEPING, Data
from fieldguide.tasks.analysis.context import Deadline, ReportContext, take_rows
from fieldguide.tasks.evaluator import Evaluator
from fieldguide.tasks.spec import Metric

MAX_GROUPS = 20  # the most frequent ones; the others are one further group
NUM_RANGES = 4  # of a numeric column with more distinct values than groups are shown
MIN_ROWS = 2
TIME_FRACTION = 0.25  # of the time of all analyses


def check_subgroup(data: Data, name: str) -> None:
    """Raise `SettingsError` if the examples have no column of this name."""
    names = [column for column in data.rows.columns if column not in BOOKKEEPING]
    if name not in names:
        raise SettingsError(
            f"subgroup={name}: the examples of {data.source} have no column {name!r}.{nearest(name, names)} They have: "
            f"{', '.join(names)}."
        )


def find_groups(values: pl.Series) -> dict[str, np.ndarray]:
    """Return the rows of each group by its name: a value, a range of numbers, "(missing)" or "(other)"."""
    if values.dtype.is_numeric() and values.n_unique() > MAX_GROUPS:
        numbers = values.cast(pl.Float64).to_numpy()
        edges = np.unique(np.nanquantile(numbers, np.linspace(0, 1, NUM_RANGES + 1)))
        place = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, max(len(edges) - 2, 0))
        names = [f"{edges[k]:.4g} to {edges[min(k + 1, len(edges) - 1)]:.4g}" for k in range(max(len(edges) - 1, 1))]
        groups = {name: np.flatnonzero((place == k) & np.isfinite(numbers)) for k, name in enumerate(names)}
        groups["(missing)"] = np.flatnonzero(~np.isfinite(numbers))
    else:
        texts = np.array(["(missing)" if v is None else str(v) for v in values.to_list()], dtype=object)
        found, counts = np.unique(texts, return_counts=True)
        kept = found[np.argsort(-counts, kind="stable")][:MAX_GROUPS]
        groups = {str(name): np.flatnonzero(texts == name) for name in kept}
        groups["(other)"] = np.flatnonzero(~np.isin(texts, kept))
    return {name: rows for name, rows in groups.items() if len(rows)}


def score_groups(
    evaluator: Evaluator, context: ReportContext, column: str, deadline: Deadline
) -> list[tuple[str, int, dict[str, float], dict[str, tuple[float, float]]]]:
    """Return name, number of rows, scores and 95 % intervals of each group; without intervals if time is short."""
    results = []
    for name, rows in find_groups(context.test.rows[column]).items():
        if len(rows) < MIN_ROWS:
            continue
        outputs, targets = take_rows(context.outputs, rows), take_rows(context.targets, rows)
        intervals = {} if deadline.is_over else evaluator.intervals(outputs, targets)
        results.append((name, len(rows), evaluator.score(outputs, targets), intervals))
    return results


def build_subgroups(
    evaluator: Evaluator, metrics: Sequence[Metric], context: ReportContext, column: str
) -> list[ReportElement]:
    """Return the scores of the groups of a column as a table and as bars."""
    if any(len(values) != len(context.test) for values in (*context.outputs.values(), *context.targets.values())):
        return [Table(f"Scores by {column}", "This task is not scored row by row, so groups of rows have no scores.")]
    results = score_groups(evaluator, context, column, context.deadline.part(TIME_FRACTION))
    main, factor = metrics[0], 100 if metrics[0].percent else 1
    rows = [
        (
            name,
            count,
            main.text(scores.get(main.name)),
            main.interval_text(*intervals[main.name]) if main.name in intervals else "–",
            *(metric.text(scores.get(metric.name)) for metric in metrics[1:]),
        )
        for name, count, scores, intervals in results
    ]
    return [
        Bars(
            f"{main.heading} by {column}",
            "The lines show 95 % intervals: groups whose intervals overlap widely may differ by chance.",
            {name: factor * scores[main.name] for name, _, scores, _ in results if scores.get(main.name) is not None},
            {
                name: (factor * intervals[main.name][0], factor * intervals[main.name][1])
                for name, _, _, intervals in results
                if main.name in intervals
            },
            "%" if main.percent else "",
        ),
        Table(
            f"Scores by {column}",
            "Scores that depend on which classes occur, such as AUC, are not comparable between groups with different classes.",
            (column, "test rows", main.title, "95 % interval", *(metric.title for metric in metrics[1:])),
            rows,
        ),
    ]

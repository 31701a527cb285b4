"""Permutation importance of columns (Breiman 2001, doi:10.1023/A:1010933404324, section 10; Fisher et al. 2019, JMLR 20:177)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from fieldguide.core.report_elements import Bars, ReportElement
from fieldguide.data.dataset import Data
from fieldguide.tasks.analysis.context import ReportContext, take_rows
from fieldguide.tasks.evaluator import Evaluator
from fieldguide.tasks.spec import Metric

MAX_ROWS, MAX_MEDIA_ROWS = 1000, 200  # test rows that are used; fewer if files must be decoded for each shuffle
SHUFFLES = 3  # of each column
MAX_COLUMNS = 200
TIME_FRACTION = 0.6  # of the time of all analyses


def build_importance(
    evaluator: Evaluator, metric: Metric, columns: Sequence[str], context: ReportContext, has_media: bool = False
) -> list[ReportElement]:
    """Return the loss of score for each column when its values are shuffled among test rows.

    Rows and shuffles depend on the data alone, so a value is the same whenever it is computed; if time is short, only some
    columns have one.
    """
    if len(columns) < 2 or len(context.test) < 2:
        return []
    rows, deadline = context.sample(MAX_MEDIA_ROWS if has_media else MAX_ROWS), context.deadline.part(TIME_FRACTION)
    data, targets = context.test.take(rows), take_rows(context.targets, rows)
    sign = 1 if metric.better == "max" else -1
    best = sign * evaluator.score(take_rows(context.outputs, rows), targets)[metric.name]
    losses: dict[str, list[float]] = {}
    for name in columns[:MAX_COLUMNS]:
        if deadline.is_over:
            break
        losses[name] = [
            best - sign * evaluator.score(context.predict(shuffle_column(data, name, seed)), targets)[metric.name]
            for seed in range(SHUFFLES)
        ]
    mean = {name: float(np.mean(values)) for name, values in losses.items()}
    if not mean or not np.isfinite(list(mean.values())).all():
        return []
    factor = 100 if metric.percent else 1
    order = sorted(mean, key=lambda name: -mean[name])
    left_out = f" {len(columns) - len(mean)} of {len(columns)} columns were not measured." if len(mean) < len(columns) else ""
    return [
        Bars(
            "Importance of the columns",
            f"{'Drop' if sign > 0 else 'Rise'} of the {metric.title} when the values of one column are shuffled among {len(rows):,} "
            f"test rows (mean of {SHUFFLES} shuffles; the lines show their range). Columns that hold the same information share "
            f"their importance.{left_out}",
            {name: factor * mean[name] for name in order},
            {name: (factor * min(losses[name]), factor * max(losses[name])) for name in order},
            "points" if metric.percent else "",
        )
    ]


def shuffle_column(data: Data, name: str, seed: int) -> Data:
    """Return the data with the values of one column in another order."""
    order = np.random.default_rng([seed, *name.encode()]).permutation(len(data))
    shuffled = data.take(np.arange(len(data)))
    shuffled.rows = data.rows.with_columns(pl.Series(name, data.rows[name].gather(order)))
    return shuffled

"""Build the report of a tested run: the task's elements, and analyses of the model within a limited time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from fieldguide.data.dataset import Data
from fieldguide.inference.predictor import TaskPredictor
from fieldguide.inference.report_context import build_context
from fieldguide.inference.run import Run
from fieldguide.report import pages
from fieldguide.tasks.analysis.context import Deadline
from fieldguide.tasks.analysis.latency import measure_latency
from fieldguide.tasks.analysis.subgroups import build_subgroups
from fieldguide.tasks.evaluator import Arrays

Result = TypeVar("Result")


def write_report(
    run: Run,
    predictor: TaskPredictor,
    training: Data,
    test: Data,
    outputs: Arrays,
    targets: Arrays,
    test_seconds: float,
    log: Callable[[str], None],
    max_seconds: float = math.inf,
) -> None:
    """Write report.html and README.md, and add the time of a prediction to the run's record.

    `outputs` and `targets` are those of the test rows, `test_seconds` is how long their prediction took. The analyses take at
    most 5 seconds or 5 % of the training time, whichever is more, and at most `max_seconds`. One that fails is left out and
    logged, since the report must not be lost for it.
    """

    def attempt(name: str, analysis: Callable[[], Result], default: Result) -> Result:
        try:
            return analysis()
        except Exception as error:  # noqa: BLE001  # see above
            log(f"note: the report has no {name}: {type(error).__name__}: {error}")
            return default

    task, record = predictor.task, run.record
    context = build_context(predictor, test, outputs, targets, Deadline.after_training(record["cost"]["seconds"], max_seconds))
    context.seconds_per_example = test_seconds / max(len(test), 1)
    unknown: dict[str, float] = {}
    record["cost"]["latency"] = attempt("latency", lambda: measure_latency(context), unknown)
    metrics = [m for m in task.ordered_metrics() if m.name in record["scores"]["test"]]
    column = record["settings"].get("subgroup")
    groups = lambda: build_subgroups(task, metrics, context, column) if column else []
    extras = pages.Extras(
        subgroups=attempt("subgroups", groups, []),
        explanation=attempt("analysis of what matters", lambda: task.explain(context), []),
        preview=attempt("preview of the data", lambda: task.preview_data(training), []),
        example=attempt("example of an input", lambda: task.example_input(test), None),
    )
    pages.write(run, task.report_elements(test, outputs, targets, predictor.objective), extras)

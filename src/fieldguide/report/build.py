"""Build the report of a tested run: the task's elements, and analyses of the model within a limited time."""

from __future__ import annotations

import copy

import torch

from fieldguide.core import distributed
from fieldguide.data.dataset import Data
from fieldguide.data.loader import Batches
from fieldguide.inference.predictor import TaskPredictor
from fieldguide.inference.run import Run
from fieldguide.report import pages
from fieldguide.tasks.analysis.context import Deadline, ReportContext
from fieldguide.tasks.analysis.latency import measure_latency
from fieldguide.tasks.analysis.subgroups import build_subgroups
from fieldguide.tasks.evaluator import Arrays
from fieldguide.training.inference_loop import collect


def write_report(
    run: Run,
    predictor: TaskPredictor,
    training: Data,
    test: Data,
    outputs: Arrays,
    targets: Arrays,
    test_seconds: float,
) -> None:
    """Write report.html and README.md, and add the time of a prediction to the run's record.

    `outputs` and `targets` are those of the test rows, `test_seconds` is how long their prediction took. The analyses take at
    most 5 seconds or 5 % of the training time, whichever is more.
    """
    task, record = predictor.task, run.record
    context = build_context(predictor, test, outputs, targets, Deadline.after_training(record["cost"]["seconds"]))
    context.seconds_per_example = test_seconds / max(len(test), 1)
    record["cost"]["latency"] = measure_latency(context)
    metrics = [m for m in task.metrics if m.name in record["scores"]["test"]]
    column = record["settings"].get("subgroup")
    extras = pages.Extras(
        subgroups=build_subgroups(task, metrics, context, column) if column else (),
        explanation=task.explain(context),
        preview=task.preview_data(training),
        example=task.example_input(test),
    )
    pages.write(run, task.report_elements(test, outputs, targets, predictor.objective), extras)


def build_context(predictor: TaskPredictor, test: Data, outputs: Arrays, targets: Arrays, deadline: Deadline) -> ReportContext:
    """Return the test of a model for analyses, which the calling process does alone."""
    task = predictor.task.for_request(predictor.task.PredictOptions())  # whose notes about altered inputs are not kept
    objective, device = copy.copy(predictor.objective), distributed.device()
    step = task.predict_step(objective)

    def run_batches(batches: Batches) -> Arrays:
        found = collect(objective, batches, step=step, batch=predictor.batch_size, device=device, shared=False)
        return task.postprocess({**found, **batches.meta})

    def predict(data: Data) -> Arrays:
        return run_batches(task.batches(data, predictor.card))

    def make_batch(data: Data) -> dict[str, torch.Tensor]:
        batches = task.batches(data, predictor.card)
        return batches.make(torch.arange(len(batches)).numpy(), None)

    def predict_batch(batch: dict[str, torch.Tensor]) -> Arrays:
        count = len(next(iter(batch.values())))
        return run_batches(Batches(count, lambda index, generator: {k: t[torch.from_numpy(index)] for k, t in batch.items()}))

    return ReportContext(test, outputs, targets, predict, make_batch, predict_batch, deadline)

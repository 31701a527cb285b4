"""The functions with which analyses for the report use a tested network."""

from __future__ import annotations

import copy

import numpy as np
import torch

from fieldguide.core import distributed
from fieldguide.data.dataset import Data
from fieldguide.data.loader import Batches
from fieldguide.inference.predictor import TaskPredictor
from fieldguide.tasks.analysis.context import Deadline, ReportContext
from fieldguide.tasks.evaluator import Arrays
from fieldguide.training.inference_loop import collect


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
        return batches.make(np.arange(len(batches)), None)

    def predict_batch(batch: dict[str, torch.Tensor]) -> Arrays:
        count = len(next(iter(batch.values())))
        return run_batches(Batches(count, lambda index, generator: {k: t[torch.from_numpy(index)] for k, t in batch.items()}))

    return ReportContext(test, outputs, targets, predict, make_batch, predict_batch, deadline)

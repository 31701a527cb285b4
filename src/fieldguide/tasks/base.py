"""A task: a specification, a preprocessor, an evaluator, a report builder and a signature builder, joined by the objective.

    TaskSpec        what is read, which models are accepted, metrics, options       spec.py
    Preprocessor    fitted on training rows: rows -> batches, state, reading        preprocessor.py
    Evaluator       outputs and targets -> scores, intervals, baselines             evaluator.py
    ReportBuilder   outputs and targets -> tables, charts, samples                  report_builder.py
    SignatureBuilder  raw inputs, tensors, steps, records: how the model is called  signature_builder.py

Code that needs one of these is written against that class. `Task` adds what connects data and model: the objective, the
prediction step and the format of predictions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from fieldguide.core.card import Card
from fieldguide.core.errors import RunError
from fieldguide.core.media import Media
from fieldguide.core.record_check import TASK, check_structure
from fieldguide.core.run_record import rename
from fieldguide.core.settings import Settings
from fieldguide.core.validation import read_json
from fieldguide.data.dataset import Column
from fieldguide.objectives import Objective
from fieldguide.tasks.evaluator import Arrays, Baseline, Evaluator, bootstrap_intervals
from fieldguide.tasks.preprocessor import CheckpointAssets, Preprocessor
from fieldguide.tasks.report_builder import ReportBuilder
from fieldguide.tasks.signature_builder import SignatureBuilder
from fieldguide.tasks.spec import OPTION_ALIASES, Metric, TaskSpec

__all__ = [
    "OPTION_ALIASES",
    "Arrays",
    "Baseline",
    "CheckpointAssets",
    "Evaluator",
    "Media",
    "Metric",
    "Preprocessor",
    "ReportBuilder",
    "SignatureBuilder",
    "Task",
    "TaskSpec",
    "bootstrap_intervals",
]


class Task(Preprocessor, Evaluator, ReportBuilder, SignatureBuilder):
    """A task with fitted preprocessing. Create one with `fit` from training rows, or with `load` from a run folder."""

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        """Return the training objective. `parts` are the further models named in `card.parts`, such as a GAN's
        discriminator.
        """
        raise NotImplementedError

    def predict_step(self, objective: Objective) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """Return the function that predicts a batch for test and prediction, which uses `predict_options`.

        `objective` is a shallow copy for this request, so that the step may set its attributes.
        During training `objective.outputs` is used instead; it may be faster and return less.
        """
        return objective.outputs

    def format_predictions(self, outputs: Arrays) -> Sequence[dict[str, Any] | list[dict[str, Any]]]:
        """Return one record per example, or a list of them. A value that is written to a file (image, audio) is a
        `Media`.
        """
        raise NotImplementedError

    def stream(self, objective: Objective, source: Any) -> Iterator[str] | None:
        """Yield the prediction for one input piece by piece as it is generated; None if predictions are not streamed."""
        return None

    def for_request(self, options: Any) -> Self:
        """Return a copy of the task for one request, with its own prediction options and notes.

        What a task keeps between reading inputs and formatting predictions stays in the copy, so that one fitted task
        serves many threads.
        """
        request = copy.copy(self)
        request.predict_options, request.notes, request.problems = options, [], []
        return request

    @classmethod
    def load(cls, folder: Path) -> Task:
        from fieldguide.tasks import task

        record = read_json(folder / "task.json", RunError)
        check_structure(record, TASK, folder / "task.json")
        kind = task(record["task"])
        options = rename(record["options"], OPTION_ALIASES)
        values = {"columns": record["columns"], "options": options, "state": record["state"]}
        structure = {"columns": list[Column], "options": kind.Options, "state": kind.state_types()}
        check_structure(values, structure, folder / "task.json")
        loaded = kind.from_state([Column(**c) for c in record["columns"]], kind.Options(**options), record["state"], folder)
        loaded.metric = record.get("metric", "")
        return loaded

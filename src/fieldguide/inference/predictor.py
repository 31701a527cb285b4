"""Predictors: a trained network with everything that turns raw inputs into predictions.

`fieldguide.pipeline` returns one for any source. A predictor holds no state of a request: prediction options are arguments,
so that one predictor serves many threads at once.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from fieldguide.core import distributed
from fieldguide.core.card import Card
from fieldguide.core.errors import SettingsError
from fieldguide.core.signature import Signature
from fieldguide.data.dataset import Data
from fieldguide.data.loader import Batches
from fieldguide.data.readers.memory import as_table
from fieldguide.inference.predictions import Predictions
from fieldguide.inference.signature import describe_task_predictor
from fieldguide.objectives import EmbeddingObjective, Objective
from fieldguide.objectives.embedding import Pooling
from fieldguide.tasks import Task
from fieldguide.training.inference_loop import collect

if TYPE_CHECKING:
    from fieldguide.core.card import Network


class Predictor:
    """The interface of everything that predicts."""

    card: Card | None
    generates_text: bool = False  # each prediction is a text, to be printed as it is

    @property
    def model(self) -> Network:
        """The trained network."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Name of the architecture, for messages."""
        return self.card.name if self.card else type(self.model).__name__

    @functools.cached_property
    def signature(self) -> Signature:
        """How the model is called: raw inputs, tensors, outputs, options and limits."""
        raise NotImplementedError

    def get_notes(self) -> list[str]:
        """Return what the user should know about the network, such as that its training was stopped early."""
        return []

    def predict(self, inputs: Any = (), **options: Any) -> Predictions:
        """Return one record for each raw input: `input`, then the prediction.

        `inputs` is a path, a data frame, a text, or a list of those; a row is also a dictionary or a pandas series. If some of
        several inputs cannot be read, their records hold `input` and `error` only. Raises `DataError` if none can be read,
        `SettingsError` for wrong options.
        """
        raise NotImplementedError

    def evaluate(self, source: Any, **options: Any) -> dict[str, Any]:
        """Return scores on data with known targets: {"rows", "scores", "intervals", "note", "notes"}.

        `note` says which rows were scored; `notes` are those that `predict` would give.
        """
        raise SettingsError(f"{self.name} without a trained task has no scores; train it with `fieldguide fit`.")

    def export(self, to: str = "onnx", **options: Any) -> Any:
        """Export the model to a folder that runs without fieldguide: see `fieldguide.export`."""
        from importlib import import_module

        return import_module("fieldguide").export(self, to, **options)  # the root finds it: exports are built on predictors

    def stream(self, source: Any, **options: Any) -> Iterator[str] | None:
        """Return the generated text of one input piece by piece; None if the prediction is not text."""
        return None

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return a unit vector for each text, N D float32; dot products are cosine similarities."""
        raise SettingsError(
            f"{self.name} does not embed texts. Runs of encoders such as BERT or ModernBERT do, for fill-mask or "
            "text-classification."
        )


class TaskPredictor(Predictor):
    """A network with a fitted task: a finished run, or a pretrained network with a head."""

    task: Task
    card: Card
    objective: Objective
    batch_size: int = 64
    pooling: Pooling = Pooling()  # of token vectors, for `embed`

    def __init__(self, task: Task, card: Card, objective: Objective, *, batch_size: int = 64, pooling: Pooling | None = None):
        self.task, self.card, self.objective, self.batch_size = task, card, objective.eval(), batch_size
        self.pooling = pooling or Pooling()

    @property
    def model(self) -> Network:
        return self.objective.model

    @functools.cached_property
    def signature(self) -> Signature:
        return describe_task_predictor(self, getattr(self, "config", None) or self.model.config)

    def outputs(self, data: Data) -> dict[str, np.ndarray]:
        """Return the network's outputs for examples as `Task.score` takes them, with default prediction options."""
        task = self.task.for_request(self.task.PredictOptions())
        return self.run_batches(task, task.batches(data, self.card))

    def run_batches(
        self, task: Task, batches: Batches, callback: Callable[[int], None] = lambda done: None
    ) -> dict[str, np.ndarray]:
        """Return post-processed outputs of batches. `task` is the request's own, `callback` receives the examples done."""
        step = task.predict_step(copy.copy(self.objective))  # a copy, since a step may configure it for its request
        outputs = collect(
            self.objective, batches, step=step, batch=self.batch_size, device=distributed.device(), callback=callback
        )
        return task.postprocess({**outputs, **batches.meta})

    def predict(self, inputs: Any = (), *, callback: Callable[[int], None] = lambda done: None, **options: Any) -> Predictions:
        """Return one record for each raw input, or several: a forecast has one for each step.

        `options` are those of the task (`fieldguide settings TASK`): `temperature`, `num_beams`, `threshold`, ...
        """
        task = self.task.for_request(self.task.parse_predict_options(options))
        data = task.read(as_list(inputs))
        outputs = self.run_batches(task, task.predict_batches(data, self.card), callback)
        records = join_skipped(data, task.format_predictions(outputs))
        return Predictions(records, task.notes, task.problems, data.inputs if task.has_own_rows else None)

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the columns of `predict_proba`; empty for a task without classes."""
        return list(getattr(self.task, "labels", ()))

    def predict_proba(self, inputs: Any, **options: Any) -> np.ndarray:
        """Return class probabilities: N C float64, in the order of `classes`; the row of an input that cannot be read is NaN.

        Raises `SettingsError` for a task whose predictions are not single classes.
        """
        task = self.task.for_request(self.task.parse_predict_options(options))
        data = task.read(as_list(inputs))
        outputs = self.run_batches(task, task.predict_batches(data, self.card))
        probabilities = outputs.get("probabilities")
        if probabilities is None or probabilities.shape != (len(data), len(self.classes)):
            raise SettingsError(f"{task.name} does not predict one class for each input, so it has no class probabilities.")
        return np.insert(probabilities.astype(np.float64), [skipped.before for skipped in data.skipped], np.nan, axis=0)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return a unit vector for each text, N D float32, pooled from the last hidden states.

        Raises `SettingsError` for a network that is not a bidirectional text encoder.
        """
        model, pooling = self.model, getattr(self.task, "pooled", self.pooling)  # a task of embeddings knows its own
        texts = [pooling.prompt + text for text in as_list(texts)]
        longest = getattr(model.config, "length", 0)  # networks of images have vectors, too
        rows = self.task.encode_texts(texts, longest) if "vector" in self.card.output_types and longest else None
        if rows is None:
            return super().embed(texts)
        if not texts:
            return np.zeros((0, model.config.dim), dtype=np.float32)
        return collect(EmbeddingObjective(model, pooling).eval(), rows, batch=64, device=distributed.device())["vector"]

    def stream(self, source: Any, **options: Any) -> Iterator[str] | None:
        task = self.task.for_request(self.task.parse_predict_options(options))
        return task.stream(self.objective, source)

    def score(self, data: Data, note: str, task: Task | None = None) -> dict[str, Any]:
        """Return scores with 95 % intervals of examples with known targets; `task` is the request's, if it read the data."""
        task = task or self.task.for_request(self.task.PredictOptions())
        task.prepare_scoring(len(data))
        outputs, targets = self.run_batches(task, task.batches(data, self.card)), task.targets(data)
        return {
            "rows": len(data),
            "scores": task.score(outputs, targets),
            "intervals": task.intervals(outputs, targets),
            "note": note,
            "notes": [*task.notes, *task.find_doubts(targets)],
        }


def join_skipped(data: Data, predictions: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the predictions for rows of data with their places, and records of errors in the place of skipped inputs."""
    skipped: dict[int, list[Any]] = {}
    for item in data.skipped:
        skipped.setdefault(item.before, []).append(item)
    records: list[dict[str, Any]] = []
    for i in range(len(predictions) + 1):
        records += [{"input": item.place, "error": item.why} for item in skipped.get(i, ())]
        if i < len(predictions):
            each = predictions[i] if isinstance(predictions[i], list) else [predictions[i]]
            records += [{"input": data.locate_row(i), **record} for record in each]
    return records


def as_list(inputs: Any) -> Sequence[Any]:
    """Return `inputs` as a list; anything but a list or tuple is one input, and a list of rows is one table."""
    table = as_table(inputs)
    return [table] if table is not None else list(inputs) if isinstance(inputs, list | tuple) else [inputs]


def as_rows(inputs: Any) -> list[Any]:
    """Return `inputs` as a list in which the rows of tables are dictionaries."""
    return [row for value in as_list(inputs) for row in (value.to_dicts() if isinstance(value, pl.DataFrame) else [value])]

"""Answering: a trained network with the task that it does, asked about raw inputs. Runs are such, and published networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fieldguide.core import distributed
from fieldguide.core.card import Card
from fieldguide.core.errors import SettingsError
from fieldguide.data.dataset import Data
from fieldguide.data.loader import Batches
from fieldguide.objectives import Objective, Vectors
from fieldguide.tasks import Task
from fieldguide.training.inference_loop import collect


class Answering:
    """Has a task, the card of its network, and the network inside its objective; `together` examples are answered at once."""

    task: Task
    card: Card
    objective: Objective
    together: int = 64
    pooled: str = "mean"  # how a text's vector is made of those of its tokens (`Vectors`)

    @property
    def model(self) -> torch.nn.Module:
        """The trained network."""
        return self.objective.model

    def outputs(self, data: Data) -> dict[str, np.ndarray]:
        """What the network says of examples, as scores take it."""
        return self.respond(self.task.batches(data, self.card))

    def respond(self, batches: Batches, callback=lambda done: None) -> dict[str, np.ndarray]:
        outputs = collect(
            self.objective,
            batches,
            ask=self.task.predict_step(self.objective),
            batch=self.together,
            device=distributed.device(),
            callback=callback,
        )
        return self.task.postprocess(outputs)

    def predict(self, inputs: Any = (), callback=lambda done: None, **asked: Any) -> list[dict[str, Any]]:
        """One record for each raw input (or several: a forecast has one for each step): where it came from, then what the
        task says of it.

        `inputs` is a path, a data frame, or a list of those; folders and tables hold many inputs. `asked` says how
        to answer, in the task's own words (`task.Asking`): temperature, beams, threshold, ... Of many inputs, one that
        cannot be read has a record in its place of nothing but `input` and `error`. Raises `DataError` where none can be.
        """
        self.task.asking = self.task.predict_options(asked)
        data = self.task.read(listed(inputs))
        return records(data, self.task.format_predictions(self.respond(self.task.predict_batches(data, self.card), callback)))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """A vector of length 1 for each text, N D float32, from the mean over its tokens of what the network reads (or as its
        publisher says): products of two are their likeness. Raises `SettingsError` for a network that does not read both
        sides of a word."""
        texts, model = listed(texts), self.model
        rows = self.task.encode_texts(texts, model.config.length) if "vector" in self.card.output_types else None
        if rows is None:
            raise SettingsError(
                f"{self.card.name}, trained for {self.task.name}, makes no vectors of texts; runs of encoders "
                "such as BERT and ModernBERT do, for fill-mask or text-classification."
            )
        if not texts:
            return np.zeros((0, model.config.dim), dtype=np.float32)
        return collect(Vectors(model, self.pooled), rows, batch=64, device=distributed.device())["vector"]

    def stream(self, source: Any, **asked: Any) -> Iterator[str] | None:
        """The answer to one input piece by piece, where the task can; else None."""
        self.task.asking = self.task.predict_options(asked)
        return self.task.stream(self.objective, source)

    def scored(self, data: Data, note: str) -> dict[str, Any]:
        """Scores, with 95 % intervals, of examples with known answers."""
        self.task.prepare_scoring(len(data))
        outputs, truth = self.outputs(data), self.task.targets(data)
        return {
            "rows": len(data),
            "scores": self.task.score(outputs, truth),
            "intervals": self.task.intervals(outputs, truth),
            "note": note,
        }


def records(data: Data, answers: Sequence[Any]) -> list[dict[str, Any]]:
    """Answers to the rows of data, each with where it came from; in the place of inputs that could not be read, why."""
    unread = {i: [u for u in data.skipped if u.before == i] for i in {u.before for u in data.skipped}}
    found: list[dict[str, Any]] = []
    for i in range(len(answers) + 1):
        found += [{"input": u.place, "error": u.why} for u in unread.get(i, ())]
        if i < len(answers):
            each = answers[i] if isinstance(answers[i], list) else [answers[i]]
            found += [{"input": data.place(i), **record} for record in each]
    return found


def listed(inputs: Any) -> Sequence[Any]:
    return list(inputs) if isinstance(inputs, list | tuple) else [inputs]

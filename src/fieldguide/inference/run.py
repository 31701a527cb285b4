"""The run folder: the only border between training and everything after it.

run.json             schema, task, model and config, settings, data, versions, scores, cost
model.safetensors    the weights that predict (and one file for each further network that the objective keeps)
preprocess/          all that turns raw inputs into tensors
splits.npz           which rows were trained on, which were not
metrics.jsonl        losses and scores by step
report.html          one page for a person; README.md says the same in words
checkpoints/         what `fieldguide fit --resume` goes on from
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fieldguide.checkpoints import weights
from fieldguide.checkpoints.run_folder import build_network
from fieldguide.core import distributed
from fieldguide.core.errors import RunError
from fieldguide.core.run_record import read_record, write_record
from fieldguide.core.settings import Settings
from fieldguide.data.splits import drawn
from fieldguide.data.validation.checks import enforce
from fieldguide.inference.predictor import Answering, listed
from fieldguide.models import registry
from fieldguide.objectives import Objective
from fieldguide.tasks import Task


class Run(Answering):
    """A run folder, opened. Weights and preparation are read when first needed."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.record = read_record(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self.record['model']['size']} for {self.record['task']}, {self.status})"

    @property
    def status(self) -> str:
        """ "training" until the network is tested, then "done"."""
        return self.record["status"]

    @property
    def scores(self) -> dict[str, float]:
        """Scores on the test part, by metric."""
        return self.record.get("scores", {}).get("test", {})

    @functools.cached_property
    def task(self) -> Task:
        folder = self.path / "preprocess"
        try:
            return Task.load(folder)
        except FileNotFoundError as error:
            raise RunError(f"{error.filename} is missing: the run folder is not whole.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{folder / 'task.json'} is damaged: {error}.") from None

    @functools.cached_property
    def card(self):
        return registry.card(self.record["model"]["architecture"])

    def fresh(self) -> torch.nn.Module:
        """The run's network with new weights."""
        return build_network(self.card, self.record["model"]["config"])

    def fresh_parts(self) -> dict[str, torch.nn.Module]:
        """The networks beside it, such as a generator's critic, with new weights."""
        return {
            name: build_network(registry.card(part["architecture"]), part["config"])
            for name, part in self.record["model"].get("parts", {}).items()
        }

    @functools.cached_property
    def objective(self) -> Objective:
        """The trained network inside its objective, ready to answer."""
        if self.status != "done":
            raise RunError(f"{self.path} is not finished. Go on with `fieldguide fit --resume {self.path}`.")
        objective = self.task.objective(self.fresh(), self.card, self.settings, **self.fresh_parts())
        for name in objective.keep:
            weights.load(getattr(objective, name), self.path / f"{name}.safetensors")
        return objective.to(distributed.device()).eval()

    @property
    def settings(self) -> Settings:
        return Settings(**self.record["settings"])

    @property
    def together(self) -> int:
        return max(64, self.settings.batch_size or 64)

    def evaluate(self, source: Any) -> dict[str, Any]:
        """Scores, with 95 % intervals, on data with known answers: {"rows", "scores", "intervals", "note"}.

        Of the data that the run was trained on, only the rows of its test part are scored.
        """
        self.task.asking = self.task.predict_options({})  # as when it was tested
        data, note = self.task.read(listed(source), answered=True), ""
        enforce(data.findings, len(data) + len(data.skipped), source=data.source, offer=False)  # some are read leniently
        if data.manifest.digest == self.record["data"]["digest"] and len(data) == self.record["data"]["rows"]:
            with np.load(self.path / "splits.npz", allow_pickle=False) as splits:
                data = data.take(splits["test"])
            note = "the run was trained on this data: scored on the test part, which no step of training has seen"
        rows = drawn(np.arange(len(data)), self.task.tested, self.record["settings"]["seed"])
        if len(rows) < len(data):
            note += f"{'; ' if note else ''}{len(rows):,} rows of {len(data):,}, drawn by chance, since answers take long"
            data = data.take(rows)
        return self.scored(data, note)

    def update(self, **changes: Any) -> None:
        """Lays changes over run.json and stores it."""
        self.record |= changes
        write_record(self.path, self.record)

    def losses(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def open_run(path: str | Path) -> Run:
    """Opens a run folder. Raises `RunError` where it is none, damaged, or newer than this version."""
    return Run(path)

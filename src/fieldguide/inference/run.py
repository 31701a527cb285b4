"""The run folder: the only interface between training and everything after it.

run.json             schema, task, model and config, settings, data, versions, scores, cost
model.safetensors    the trained weights (and one file for each further network that the objective keeps)
preprocess/          the fitted preprocessing, from raw inputs to tensors
splits.npz           the rows of each split
row_digests.npz      digests of the training and validation rows, to recognize them in other data
metrics.jsonl        losses and scores by step
report.html          the report; README.md is the model card
checkpoints/         the state that `fieldguide fit --resume` continues from
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from fieldguide.checkpoints import weights
from fieldguide.checkpoints.run_folder import build_config
from fieldguide.core import distributed
from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, RunError, SettingsError
from fieldguide.core.run_record import USABLE_STATUSES, read_record, write_record
from fieldguide.core.settings import Settings
from fieldguide.data import row_digests
from fieldguide.data.splits import sample_rows
from fieldguide.data.validation.checks import enforce
from fieldguide.inference.predictor import TaskPredictor, as_list
from fieldguide.models import registry
from fieldguide.objectives import Objective
from fieldguide.tasks import Task


class Run(TaskPredictor):
    """An open run folder. Weights and preprocessing are loaded when they are first needed."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.record = read_record(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self.record['model']['size']} for {self.record['task']}, {self.status})"

    @property
    def status(self) -> str:
        """Return "training", "trained" (usable, but the test has not been finished) or "done"."""
        return self.record["status"]

    @property
    def scores(self) -> dict[str, float]:
        """The scores on the test rows, by metric."""
        return self.record.get("scores", {}).get("test", {})

    # These attributes of a predictor are loaded when they are first needed.
    @functools.cached_property
    def task(self) -> Task:  # type: ignore[override]
        folder = self.path / "preprocess"
        try:
            return Task.load(folder)
        except FileNotFoundError as error:
            raise RunError(f"{error.filename} is missing: the run folder is incomplete.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{folder / 'task.json'} is damaged: {error}.") from None

    @functools.cached_property
    def card(self) -> Card:  # type: ignore[override]
        return registry.card(self.record["model"]["architecture"])

    @property
    def config(self) -> Any:
        """The config of the run's network."""
        return build_config(self.card, self.record["model"]["config"])

    @property
    def part_networks(self) -> dict[str, tuple[Card, str, Any]]:
        """Card, size and config of each further network, such as a generator's critic."""
        found = {}
        for name, part in self.record["model"].get("parts", {}).items():
            card = registry.card(part["architecture"])
            found[name] = card, part["size"], build_config(card, part["config"])
        return found

    @functools.cached_property
    def objective(self) -> Objective:  # type: ignore[override]
        """The trained network inside its objective, in evaluation mode."""
        if self.status not in USABLE_STATUSES:
            raise RunError(f"{self.path} is not finished. Continue it with `fieldguide fit --resume {self.path}`.")
        parts = {name: card.make(config) for name, (card, _, config) in self.part_networks.items()}
        objective = self.task.objective(self.card.make(self.config), self.card, self.settings, **parts)
        for name in objective.keep:
            weights.load(getattr(objective, name), self.path / f"{name}.safetensors")
        return objective.to(distributed.device()).eval()

    @property
    def settings(self) -> Settings:
        return Settings(**self.record["settings"])

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        return max(64, self.settings.batch_size or 64)

    def evaluate(self, source: Any, **options: Any) -> dict[str, Any]:
        """Return scores with 95 % intervals on data with known targets: {"rows", "scores", "intervals", "note", "notes"}.

        Of the data that the run was trained on, only the test rows are scored. Raises `SettingsError` for any option: a
        run is scored as it was tested.
        """
        if options:
            raise SettingsError(f"{', '.join(options)}: a run is evaluated as it was tested, without options.")
        task = self.task.for_request(self.task.PredictOptions())
        data, note = task.read(as_list(source), answered=True), ""
        enforce(data.findings, len(data) + len(data.skipped), source=data.source, offer=False)  # some are read leniently
        if data.manifest.digest == self.record["data"]["digest"] and len(data) == self.record["data"]["rows"]:
            with np.load(self.path / "splits.npz", allow_pickle=False) as splits:
                data = data.take(splits["test"])
            note = "the run was trained on this data; only its test rows are scored"
        elif task.has_own_rows:
            used, is_certain = row_digests.find_used(self.path, row_digests.compute_digests(data, task.columns))
            if used.all() and len(used):
                raise DataError(
                    f"{data.source}: all {len(used):,} rows were used in training, so their scores would say nothing. Evaluate on "
                    "rows that the run has not seen."
                )
            if used.any() and is_certain:
                data = data.take(np.flatnonzero(~used))
                note = f"{int(used.sum()):,} of {len(used):,} rows were used in training and are left out"
            elif used.any():
                task.add_note(f"{int(used.sum()):,} of {len(used):,} rows are equal to training rows, possibly by chance")
        rows = sample_rows(np.arange(len(data)), self.task.max_test_examples, self.record["settings"]["seed"])
        if len(rows) < len(data):
            note += f"{'; ' if note else ''}a random sample of {len(rows):,} of {len(data):,} rows, since prediction is slow"
            data = data.take(rows)
        return self.score(data, note, task)

    def update(self, **changes: Any) -> None:
        """Update entries of run.json and write it."""
        self.record |= changes
        write_record(self.path, self.record)

    def losses(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def open_run(path: str | Path) -> Run:
    """Open a run folder. Raises `RunError` if it is not one, is damaged, or is newer than this version."""
    return Run(path)

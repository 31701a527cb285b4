"""The run folder: the only interface between training and everything after it.

run.json             schema, task, model and config, settings, data, versions, scores, cost, digests of the files below
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
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fieldguide.checkpoints import weights
from fieldguide.checkpoints.config_check import check_network
from fieldguide.checkpoints.run_folder import build_config
from fieldguide.core import distributed
from fieldguide.core.archives import read_arrays
from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, RunError, SettingsError
from fieldguide.core.record_check import check_structure
from fieldguide.core.run_files import check_file, check_folder
from fieldguide.core.run_record import USABLE_STATUSES, read_record, write_record
from fieldguide.core.settings import Settings
from fieldguide.core.validation import guard, parse_json, read_text
from fieldguide.data import row_digests
from fieldguide.data.splits import Splits, sample_rows
from fieldguide.data.validation.checks import enforce
from fieldguide.inference.predictor import Predictions, TaskPredictor, as_list
from fieldguide.models import registry
from fieldguide.objectives import Objective
from fieldguide.objectives.ensemble import Ensemble, Member
from fieldguide.objectives.supervised import Supervised
from fieldguide.tasks import Task
from fieldguide.training import checkpoint, peft
from fieldguide.training.trainer import load_best_weights

BASELINE_PART = "baseline"  # the part of a run that is averaged with its network
TABLE_DIMS = {"numbers", "categories", "features"}  # inputs of a network of tables, which the preprocessing alone determines


class Run(TaskPredictor):
    """An open run folder. Weights and preprocessing are loaded when they are first needed."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.record = read_record(self.path)
        self.notes: list[str] = []  # about the network, added when it is loaded

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self.record['model']['size']} for {self.record['task']}, {self.status})"

    @property
    def status(self) -> str:
        """Return "training", "trained" (usable, but the test has not been finished) or "done"."""
        return self.record["status"]

    @property
    def is_trained(self) -> bool:
        """Return whether training is over; the test may still be missing."""
        return self.status in USABLE_STATUSES

    @property
    def scores(self) -> dict[str, float]:
        """The scores on the test rows, by metric."""
        return self.record.get("scores", {}).get("test", {})

    # These attributes of a predictor are loaded when they are first needed.
    @functools.cached_property
    def task(self) -> Task:  # type: ignore[override]
        folder = self.path / "preprocess"
        check_folder(self.path, self.record, folder.name)
        with guard(folder / "task.json", RunError, ""):
            try:
                return Task.load(folder)
            except FileNotFoundError as error:
                raise RunError(f"{error.filename} is missing: the run folder is incomplete.") from None

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
        """The trained network inside its objective, in evaluation mode.

        If training was stopped, it has the best weights of the last checkpoint. Raises `RunError` if there is none.
        """
        if not self.is_trained:
            return self.load_unfinished()
        self.check_networks()
        with guard(self.path, RunError, ""):
            objective = self.build_objective(self.card.make(self.config))
        for name in objective.keep:
            check_file(self.path, self.record, f"{name}.safetensors")
            weights.load(getattr(objective, name), self.path / f"{name}.safetensors")
        return objective.to(distributed.device()).eval()

    def check_networks(self) -> None:
        """Raise `RunError` or `WeightsError` if a config cannot be that of the stored weights."""
        path = self.path / "model.safetensors"
        check_file(self.path, self.record, path.name)
        shapes = weights.read_shapes(path)
        check_network(self.card, self.config, shapes, self.path)
        dims = self.task.model_dims()
        for name in TABLE_DIMS & dims.keys():
            if hasattr(self.config, name) and getattr(self.config, name) != dims[name]:
                raise RunError(
                    f"{self.path}: the network has {name}={getattr(self.config, name)}, but the preprocessing gives {dims[name]}. "
                    "The files do not belong together: restore them from a copy."
                )
        for name, (card, _, config) in self.part_networks.items():  # similar in size; not all of them are stored
            if name == BASELINE_PART:
                check_file(self.path, self.record, f"{name}.safetensors")
                shapes = weights.read_shapes(self.path / f"{name}.safetensors")
            check_network(card, config, shapes, self.path)

    def load_unfinished(self) -> Objective:
        """Return the objective with the best weights of the last checkpoint, and note that training was stopped."""
        notes: list[str] = []
        found = checkpoint.load(self.path / "checkpoints", notes.append)
        if found is None:
            raise RunError(
                f"{self.path} is not finished, and has no checkpoint to predict with yet. Continue it with `fieldguide fit "
                f"--resume {self.path}`."
            )
        step, tensors, record = found
        check_network(self.card, self.config, tensors, self.path)
        network = self.card.make(self.config)
        peft.prepare(network, self.settings, self.record["model"].get("fresh"))
        objective = self.build_objective(network)
        is_scored = load_best_weights(
            nn.ModuleDict({name: getattr(objective, name) for name in objective.keep}), tensors, self.settings
        )
        peft.merge(objective)
        state = record["state"]
        used = f"best weights so far, those of step {state['best_step']:,}," if is_scored else "last weights, not scored yet,"
        self.notes = [
            *notes,
            f"training is not finished (step {step:,} of {state.get('steps') or self.settings.steps:,}): the {used} are used, "
            f"without calibration and test. `fieldguide fit --resume {self.path}` continues, and `fieldguide fit --finish "
            f"{self.path}` tests what is there",
        ]
        return objective.to(distributed.device()).eval()

    def build_objective(self, network: nn.Module) -> Objective:
        """Return the objective of the task around a network, with the further networks of the run."""
        parts = {name: card.make(config) for name, (card, _, config) in self.part_networks.items()}
        baseline = parts.pop(BASELINE_PART, None)
        objective = self.task.objective(network, self.card, self.settings, **parts)
        if baseline is None:
            return objective
        assert isinstance(objective, Supervised), "only supervised networks join with a baseline"
        return Ensemble(objective, Member(baseline, self.part_networks[BASELINE_PART][0].inputs))

    def get_notes(self) -> list[str]:
        _ = self.objective  # loading it finds out
        return self.notes

    def predict(self, inputs: Any = (), **options: Any) -> Predictions:
        predictions = super().predict(inputs, **options)
        predictions.notes[:0] = self.get_notes()
        return predictions

    @property
    def settings(self) -> Settings:
        try:
            settings = Settings(**self.record["settings"])
        except TypeError as error:
            raise RunError(
                f"{self.path / 'run.json'}: {error}. The run may be of a newer version; update fieldguide."
            ) from None
        check_structure({"settings": settings.to_dict()}, {"settings": Settings}, self.path / "run.json")
        return settings

    def read_splits(self) -> Splits:
        """Return the rows of training, validation and test. Raises `RunError` if their file is missing or damaged."""
        path = self.path / "splits.npz"
        check_file(self.path, self.record, path.name)
        with guard(path, RunError, "Restore the file from a copy."):
            rows = read_arrays(path)
            train, validation, test = rows["train"], rows["validation"], rows["test"]
        return Splits(train, validation, test, self.record["data"]["split"]["how"])

    @functools.cached_property
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
            data = data.take(self.read_splits().test)
            note = "the run was trained on this data; only its test rows are scored"
        elif task.has_own_rows:
            if (self.path / row_digests.FILE_NAME).exists():
                check_file(self.path, self.record, row_digests.FILE_NAME)
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
        result = self.score(data, note, task)
        return {**result, "notes": [*self.get_notes(), *result["notes"]]}

    def update(self, **changes: Any) -> None:
        """Update entries of run.json and write it."""
        self.record |= changes
        write_record(self.path, self.record)

    def losses(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        lines = read_text(path, RunError, max_bytes=None).splitlines() if path.exists() else []
        return [parse_json(line, f"{path}:{number}", RunError, remedy="") for number, line in enumerate(lines, 1)]


def open_run(path: str | Path) -> Run:
    """Open a run folder. Raises `RunError` if it is not one, is damaged, or is newer than this version."""
    return Run(path)

"""Experiment trackers that receive losses and scores in addition to metrics.jsonl (`--set tracker=tensorboard`).

`mlflow` and `wandb` write where those packages are configured to write, which may be a server. They are therefore used only
if the user names them: resuming a run contacts no server because its run.json says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from fieldguide.core.errors import SettingsError
from fieldguide.core.files import write_atomically
from fieldguide.core.settings import Settings

PROJECT = "fieldguide"  # name of the MLflow experiment and of the Weights & Biases project
ID_FILE = "tracker.json"  # in the run folder: the tracker's own identifier, with which a resumed run continues it


class Tracker:
    """Interface of a tracker. `step` is the step that the run resumes from, 0 for a new run."""

    package: ClassVar[str]
    extra: ClassVar[str]  # of fieldguide, that installs the package
    is_local: ClassVar[bool] = False  # whether it writes to the run folder only

    def __init__(self, folder: Path, step: int, settings: Settings):
        raise NotImplementedError

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by name: `train/loss`, `scores/accuracy`, `test/accuracy`."""
        raise NotImplementedError

    def log_metrics(self, line: Mapping[str, Any]) -> None:
        """Write a line of metrics.jsonl."""
        self.log_values(dict(flatten(line)), line["step"])

    def close(self, finished: bool) -> None:
        """End the tracked run; `finished` is False if training was stopped or failed."""


class TensorBoard(Tracker):
    """TensorBoard event files in the folder `events/` of the run."""

    package, extra, is_local = "tensorboard", "track", True

    def __init__(self, folder: Path, step: int, settings: Settings):
        from torch.utils.tensorboard import SummaryWriter

        # Hide events that were written after the checkpoint from which the run resumes.
        self.writer = SummaryWriter(str(folder / "events"), purge_step=step + 1 if step else None)

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, finished: bool) -> None:
        self.writer.close()


class MLflow(Tracker):
    """A run of MLflow, at the tracking URI that MLflow is configured for (`MLFLOW_TRACKING_URI`)."""

    package, extra = "mlflow", "mlflow"

    def __init__(self, folder: Path, step: int, settings: Settings):
        mlflow = importlib.import_module("mlflow")
        self.client, self.metric = mlflow.MlflowClient(), importlib.import_module("mlflow.entities").Metric
        if step and (known := read_id(folder, self.package)):
            self.run = known
            self.client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.run = self.client.create_run(number, run_name=folder.name).info.run_id
        write_id(folder, self.package, self.run)
        for key, value in settings.to_dict().items():
            self.client.log_param(self.run, key, value)

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self.client.log_batch(self.run, metrics=[self.metric(name, value, now, step) for name, value in values.items()])

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.run, "FINISHED" if finished else "KILLED")


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases, online or offline as `wandb` is configured (`WANDB_MODE`)."""

    package, extra = "wandb", "wandb"

    def __init__(self, folder: Path, step: int, settings: Settings):
        wandb = importlib.import_module("wandb")
        known = read_id(folder, self.package) if step else None
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=folder.name,
            dir=str(folder),
            config=settings.to_dict(),
            id=known,
            resume="allow",
        )
        write_id(folder, self.package, self.run.id)

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class FaultTolerantTracker(Tracker):
    """A tracker whose failures, such as a server that does not answer, are logged once and do not stop training."""

    def __init__(self, tracker: Tracker, log: Callable[[str], None]):
        self.tracker: Tracker | None = tracker
        self.log = log

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        self._attempt(lambda tracker: tracker.log_values(values, step))

    def close(self, finished: bool) -> None:
        self._attempt(lambda tracker: tracker.close(finished))
        self.tracker = None

    def _attempt(self, action: Callable[[Tracker], None]) -> None:
        if self.tracker is None:
            return
        try:
            action(self.tracker)
        except Exception as error:  # noqa: BLE001  # trackers raise errors of many packages; none may end the training
            self.log(f"tracker={self.tracker.package} failed and is not used any more: {error}. metrics.jsonl has all values.")
            self.tracker = None


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WeightsAndBiases}


def open_tracker(settings: Settings, folder: Path, step: int, log: Callable[[str], None]) -> Tracker | None:
    """Return the tracker that the settings name, or None.

    Raises `SettingsError` if it is not installed or cannot be started, for example without a login.
    """
    if settings.tracker not in TRACKERS:
        return None
    check_installed(settings.tracker)
    try:
        return FaultTolerantTracker(TRACKERS[settings.tracker](folder, step, settings), log)
    except Exception as error:
        raise SettingsError(
            f"tracker={settings.tracker} could not be started: {error}. Correct its configuration, or leave it out "
            "(--set tracker=none)."
        ) from error


def check_installed(name: str) -> None:
    """Raise `SettingsError` with the install line if the package of a tracker is not installed."""
    kind = TRACKERS.get(name)
    if kind is not None and importlib.util.find_spec(kind.package) is None:
        raise SettingsError(f"tracker={name} needs the optional package {kind.package}: pip install 'fieldguide[{kind.extra}]'")


def is_local(name: str) -> bool:
    """Return whether a tracker writes to the run folder only, or is none."""
    return name not in TRACKERS or TRACKERS[name].is_local


def flatten(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a line of metrics.jsonl with their names: those of groups as `GROUP/NAME`, others as `train/NAME`."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", number) for key, number in value.items())
        elif name != "step":
            yield f"train/{name}", value


def read_id(folder: Path, package: str) -> str | None:
    """Return the identifier that a tracker gave to a run, or None."""
    try:
        return str(json.loads((folder / ID_FILE).read_text(encoding="utf-8"))[package])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_id(folder: Path, package: str, number: str) -> None:
    """Store the identifier that a tracker gave to a run."""
    write_atomically(folder / ID_FILE, json.dumps({package: number}).encode())

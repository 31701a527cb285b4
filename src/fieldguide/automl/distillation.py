"""Teaching: a finished run's network put into the objective of a new one (`fit --set teacher=RUN`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data.dataset import Data
from fieldguide.data.splits import Splits
from fieldguide.inference.run import Run, open_run
from fieldguide.objectives import Classification, Distillation, Objective, Supervised
from fieldguide.tasks import Task


def named(settings: Settings) -> Settings:
    """Settings that name the teacher from any folder."""
    return settings.with_({"teacher": str(Path(settings.teacher).absolute())}) if settings.teacher else settings


def taught(objective: Objective, task: Task, settings: Settings, source: Data, parts: Splits) -> Objective:
    """The objective, with the teacher that the settings name, or as it is where they name none.

    Any task that learns classes can have one, of any architecture. Raises `RunError` for a run that cannot be opened, and
    `SettingsError` where it cannot teach this task or has seen its test rows.
    """
    if not settings.teacher:
        return objective
    run = open_run(settings.teacher)
    if run.record["task"] != task.name:
        raise SettingsError(f"teacher={run.path} was trained for {run.record['task']}, this is {task.name}")
    if type(objective) is not Supervised or not isinstance(objective.loss, Classification):
        raise SettingsError(f"teacher={run.path}: {task.name} with this network learns no classes; only those can be taught")
    refuse_seen(run, source, parts)
    show = task.teacher_inputs(run.task, run.card)
    return Distillation(
        objective.model, objective.inputs, objective.loss, run.model, show=show, hard=settings.distillation == "hard"
    )


def refuse_seen(run: Run, source: Data, parts: Splits) -> None:
    """A teacher that learnt from rows which are tested here would give their answers away."""
    if run.record["data"]["digest"] != source.manifest.digest or run.record["data"]["rows"] != len(source):
        return
    with np.load(run.path / "splits.npz", allow_pickle=False) as theirs:
        seen = np.intersect1d(theirs["train"], parts.test)
    if len(seen):
        raise SettingsError(
            f"teacher={run.path} learnt from {len(seen):,} of the {len(parts.test):,} rows that this run is to "
            f"be tested on: give both the same split, as --seed {run.record['settings']['seed']} does"
        )

"""Distillation from a finished run (`fit --set teacher=RUN`)."""

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


def with_absolute_teacher(settings: Settings) -> Settings:
    """Return the settings with the absolute path of the teacher's run folder."""
    return settings.with_({"teacher": str(Path(settings.teacher).absolute())}) if settings.teacher else settings


def add_teacher(objective: Objective, task: Task, settings: Settings, source: Data, splits: Splits) -> Objective:
    """Return a distillation objective around the network if `settings.teacher` names a run, else the objective unchanged.

    Any task that predicts classes can have a teacher of any architecture. Raises `RunError` if the run cannot be opened,
    and `SettingsError` if it was trained for another task or has seen the test rows.
    """
    if not settings.teacher:
        return objective
    run = open_run(settings.teacher)
    if not run.is_trained:
        raise SettingsError(
            f"teacher={run.path}: its training is not finished. Run `fieldguide fit --resume {run.path}` or `--finish` first."
        )
    if run.record["task"] != task.name:
        raise SettingsError(f"teacher={run.path} was trained for {run.record['task']}, but this task is {task.name}.")
    if type(objective) is not Supervised or not isinstance(objective.loss, Classification):
        raise SettingsError(f"teacher={run.path}: distillation supports classification only, not {task.name}.")
    check_unseen(run, source, splits)
    show = task.teacher_inputs(run.task, run.card)
    return Distillation(
        objective.model, objective.inputs, objective.loss, run.model, teacher_inputs=show, hard=settings.distillation == "hard"
    )


def check_unseen(run: Run, source: Data, splits: Splits) -> None:
    """Raise `SettingsError` if the teacher was trained on rows of the test part, whose targets it would leak."""
    if run.record["data"]["digest"] != source.manifest.digest or run.record["data"]["rows"] != len(source):
        return
    seen = np.intersect1d(run.read_splits().train, splits.test)
    if len(seen):
        raise SettingsError(
            f"teacher={run.path} was trained on {len(seen):,} of the {len(splits.test):,} test rows of this run. Use the "
            f"same split for both: --seed {run.record['settings']['seed']}."
        )

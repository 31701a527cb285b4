"""Distillation from a finished run (`fit --set teacher=RUN`): of classifiers, or of diffusion models to generate in fewer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

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


def follow_teacher(
    kind: type[Task],
    requested: Mapping[str, Any],
    task_options: Mapping[str, Any],
    model: str,
    model_fields: Mapping[str, Any],
    callback: Any,
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Return task options, model and its fields, with those of the teacher where its student must have the same network.

    Raises `RunError` if the run cannot be opened, and `SettingsError` if another model is requested.
    """
    unchanged = dict(task_options), model, dict(model_fields)
    if not requested.get("teacher"):
        return unchanged
    run = open_run(requested["teacher"])
    if run.record["task"] != kind.name or not run.is_trained:  # reported by `add_teacher`
        return unchanged
    options = kind.student_options(run.task, run.card)
    if options is None:
        return unchanged
    size = run.record["model"]["size"]
    if model not in ("auto", size, run.card.name):
        raise SettingsError(
            f"teacher={run.path}: the student starts from its weights, so the model must be {size}, not {model}. Leave the model out."
        )
    callback.log(f"the student starts from its teacher, {size} of {run.path}: same network, preprocessing and noise process")
    config = {field.name: getattr(run.config, field.name) for field in fields(run.config)}
    return {**options, **task_options}, size, {**config, **model_fields}


def add_teacher(objective: Objective, task: Task, settings: Settings, source: Data, splits: Splits) -> Objective:
    """Return a distillation objective around the network if `settings.teacher` names a run, else the objective unchanged.

    Any task that predicts classes can have a teacher of any architecture. A diffusion model is distilled to a network like it, which
    starts from its weights. Raises `RunError` if the run cannot be opened, and `SettingsError` if it was trained for another task, has
    seen the test rows, or is missing though the objective needs one.
    """
    if not settings.teacher:
        if objective.needs_teacher:
            raise SettingsError(
                "with this task.method, a model learns from a diffusion model: name its run with --set teacher=RUN."
            )
        return objective
    run = open_run(settings.teacher)
    if not run.is_trained:
        raise SettingsError(
            f"teacher={run.path}: its training is not finished. Run `fieldguide fit --resume {run.path}` or `--finish` first."
        )
    if run.record["task"] != task.name:
        raise SettingsError(f"teacher={run.path} was trained for {run.record['task']}, but this task is {task.name}.")
    if objective.learns_from_teacher:
        check_unseen(run, source, splits)
        task.teacher_inputs(run.task, run.card)  # raises if they differ
        try:
            objective.model.load_state_dict(run.model.state_dict())
        except RuntimeError as error:
            raise SettingsError(
                f"teacher={run.path}: the student must have the same network. Leave out --model and --set model.*. ({error})"
            ) from None
        return task.distill(objective.model, run.model)
    if type(objective) is not Supervised or not isinstance(objective.loss, Classification):
        raise SettingsError(
            f"teacher={run.path}: only classifiers and diffusion models of images can be distilled, not {task.name}."
        )
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

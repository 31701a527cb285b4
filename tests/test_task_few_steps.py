"""Consistency models of runs: distilled from a diffusion run, or trained from scratch; options, resume, report and prediction."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import fieldguide
import fieldguide.data
from fieldguide.automl.fit import NullCallback, build_plan
from fieldguide.automl.race import is_open
from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.models.registry import find
from fieldguide.objectives import AdversarialDistillation, ConsistencyDistillation, ConsistencyTraining, FewSteps
from fieldguide.tasks.vision import image_generation
from fieldguide.tasks.vision.image_generation import ImageGeneration
from fieldguide.tasks.vision.video_generation import VideoGeneration

QUICK = {"steps": 4, "batch": 16, "precision": "float32", "evaluate": 2}
SMALL = {**QUICK, "model.dim": 8, "model.groups": 4}


@pytest.fixture(scope="module", autouse=True)
def short_evaluation():
    """Train the CNNs of the evaluation for a few steps; their scores are not tested here."""
    patch = pytest.MonkeyPatch()
    train = image_generation.generative.train_classifier
    patch.setattr(
        image_generation.generative, "train_classifier", lambda *args, **options: train(*args, **{**options, "steps": 5})
    )
    yield
    patch.undo()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Return two classes of 40 images with a bright square."""
    root, rng = tmp_path_factory.mktemp("data") / "images", np.random.default_rng(0)
    for k, name in enumerate("ab"):
        (root / name).mkdir(parents=True)
        for i in range(40):
            array = rng.integers(0, 80, (8, 8))
            array[2:5, 3 * k : 3 * k + 3] = 250
            Image.fromarray(array.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def teacher(pictures):
    settings = {**SMALL, "task.schedule": "flow"}
    return fieldguide.fit(pictures, task="image-generation", model="ddpm-8", out=pictures.parent / "teacher", settings=settings)


@pytest.fixture(scope="module")
def student(pictures, teacher):
    settings = {**QUICK, "teacher": str(teacher.path), "task.teacher_guidance": 2.0}
    return fieldguide.fit(pictures, task="image-generation", out=pictures.parent / "student", settings=settings)


def test_student_has_network_and_process_of_its_teacher(pictures, teacher):
    source, kind = fieldguide.data.read(str(pictures)), {"task": "image-generation"}
    plan = build_plan(source, settings={**QUICK, "teacher": str(teacher.path)}, **kind)
    objective = plan.objective
    assert isinstance(objective, ConsistencyDistillation) and objective.guidance == 1.5 and objective.solver == "ddim"
    assert objective.levels == (8, 8) and (plan.settings.optimizer, plan.settings.lr) == ("adamw", 5e-4)
    assert teacher.settings.optimizer == "muon"
    assert plan.config == teacher.config and plan.size == "ddpm-8" and plan.task.options.schedule == "flow"
    assert type(objective.process).__name__ == "FlowProcess" and objective.process.predicts == "velocity"
    wanted = teacher.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in objective.model.state_dict().items())
    assert objective.frozen_teacher[0] is not objective.model
    assert not is_open(plan, {"model": "auto", "weights": None, "settings": {}})  # no race against other networks
    for changes, message in (
        ({"model": "dit-8"}, "the model must be ddpm-8, not dit-8"),
        ({"settings": {"model.dim": 16, "model.groups": 4}}, "must have the same network"),
        ({"settings": {"task.method": "diffusion"}}, "only classifiers and diffusion models of images"),
        ({"settings": {"task.side": 16}}, "preprocesses examples differently"),
        ({"settings": {"task.teacher_guidance": -1}}, "teacher_guidance=-1"),
    ):
        settings = {**QUICK, "teacher": str(teacher.path), **changes.pop("settings", {})}
        with pytest.raises(SettingsError, match=message):
            build_plan(source, settings=settings, **kind, **changes)


def test_student_generates_in_few_steps(student, teacher):
    assert student.record["settings"]["teacher"] == str(teacher.path) and student.scores["feature_distance"] >= 0
    run = fieldguide.open_run(student.path)
    calls = []
    run.model.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    assert type(run.objective) is ConsistencyTraining
    first = run.predict(["a"], count=2)
    assert calls == [2] * 4  # 4 steps, without a second call for guidance
    assert [record["class"] for record in first] == ["a", "a"]
    for steps in (1, 2):
        calls.clear()
        run.predict(["a"], count=2, steps=steps)
        assert calls == [2] * steps
    for options, message in (
        ({"sampler": "ddim"}, "this model generates in few steps"),
        ({"guidance": 2.0}, "The guidance of the teacher is learned"),
        ({"eta": 0.5}, "eta=0.5"),
    ):
        with pytest.raises(SettingsError, match=message):
            run.predict(["a"], count=1, **options)
    with pytest.raises(SettingsError, match="needs a model of few steps"):
        teacher.predict(["a"], count=1, sampler="consistency")


def test_signature_of_both(student, teacher):
    found = {}
    for name, run in (("student", student), ("teacher", teacher)):
        task = run.task
        signature = task.build_signature(run.card, run.config, run.model)
        options = {o.name: o for o in signature.options}
        found[name] = (options["sampler"].choices, options["steps"].default, signature.loop.guidance, signature.loop.schedule)
    assert found["student"] == (("consistency",), 4, False, "flow")
    assert found["teacher"][1:] == (12, True, "flow") and "consistency" not in found["teacher"][0]


@pytest.mark.slow
def test_students_of_a_critic(pictures, teacher, tmp_path):
    settings = {**QUICK, "teacher": str(teacher.path), "task.method": "adversarial", "task.teacher_guidance": 2.0}
    run = fieldguide.fit(pictures, task="image-generation", out=tmp_path / "run", settings=settings)
    assert type(run.objective) is FewSteps and run.scores["feature_distance"] >= 0
    assert run.predict(["a"], count=2) == run.predict(["a"], count=2, steps=4)
    assert not (run.path / "critic.safetensors").exists()
    assert "Fewer steps than the teacher" in (run.path / "report.html").read_text()
    data = fieldguide.data.read(str(pictures))
    plan = build_plan(data, task="image-generation", settings=settings)
    assert isinstance(plan.objective, AdversarialDistillation) and plan.objective.guidance == 2.0
    with pytest.raises(SettingsError, match="name its run with --set teacher=RUN"):
        build_plan(data, task="image-generation", settings={**QUICK, "task.method": "adversarial"})
    with pytest.raises(SettingsError, match="few steps already"):
        build_plan(data, task="image-generation", settings={**QUICK, "teacher": str(run.path)})


def test_report_compares_student_and_teacher(student):
    text = (student.path / "report.html").read_text()
    assert "Fewer steps than the teacher" in text and "teacher, 50 steps" in text


@pytest.mark.slow
def test_resume_is_exact(pictures, teacher, student, tmp_path):
    class Stop(NullCallback):
        def on_step(self, step, losses):
            if step == 2:
                raise KeyboardInterrupt

    settings = {**QUICK, "teacher": str(teacher.path), "task.teacher_guidance": 2.0}
    with pytest.raises(KeyboardInterrupt):
        fieldguide.fit(pictures, task="image-generation", out=tmp_path / "half", settings=settings, callback=Stop())
    half = fieldguide.resume(tmp_path / "half")
    assert (half.path / "model.safetensors").read_bytes() == (student.path / "model.safetensors").read_bytes()
    strip = lambda run: [{k: v for k, v in line.items() if "sec" not in k} for line in run.losses() if "loss" in line]
    assert strip(half) == strip(student)


def test_training_from_scratch(pictures, tmp_path, monkeypatch):
    """Without a teacher. The loop tells the objective how far training is."""
    seen, count = [], ConsistencyTraining.count_levels

    def count_levels(objective):
        seen.append(objective.progress)
        return count(objective)

    monkeypatch.setattr(ConsistencyTraining, "count_levels", count_levels)
    settings = {**SMALL, "task.method": "consistency", "task.schedule": "edm"}
    run = fieldguide.fit(pictures, task="image-generation", model="ddpm-8", out=tmp_path / "run", settings=settings)
    assert list(dict.fromkeys(seen)) == [0, 0.25, 0.5, 0.75]
    assert type(run.objective) is ConsistencyTraining and len(run.predict(count=2)) == 2
    assert json.loads((run.path / "preprocess" / "task.json").read_text())["options"]["method"] == "consistency"


def test_students_cannot_teach(pictures, student):
    with pytest.raises(SettingsError, match="generates in a few steps already"):
        build_plan(
            fieldguide.data.read(str(pictures)), task="image-generation", settings={**QUICK, "teacher": str(student.path)}
        )


def test_unknown_methods_are_rejected(pictures):
    data = fieldguide.data.read(str(pictures))
    card, size = find("ddpm-8")
    for options, message in (
        ({"method": "magic"}, "method='magic' is unknown"),
        ({"method": "consistency", "weighting": "min-snr"}, "weighting='min-snr' is an option of method=diffusion"),
    ):
        task = ImageGeneration.fit(data, ImageGeneration.Options(**options))
        with pytest.raises(SettingsError, match=message):
            task.objective(card.model(card.resolve_config(size, **task.model_dims(), dim=8, groups=4)), card, Settings())
    videos = object.__new__(VideoGeneration)
    videos.options = VideoGeneration.Options(method="consistency")
    with pytest.raises(SettingsError, match="videos have diffusion only"):
        videos.objective(None, card, Settings())

"""Distillation: both forms by hand, frozen teachers, and students of runs."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fieldguide.data
from fieldguide.automl.fit import NullCallback, build_plan
from fieldguide.core.errors import RunError, SettingsError
from fieldguide.data.preprocessing import ImageTransform
from fieldguide.models.registry import create
from fieldguide.objectives import Classification, Distillation


class Fixed(nn.Module):
    """Returns the same logits for every row and counts its calls."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.asked = nn.Parameter(torch.tensor(logits)), 0
        self.drop = nn.Dropout(0.5)

    def forward(self, image: Tensor) -> Tensor:
        self.asked += 1
        return self.drop(self.logits).expand(len(image), *self.logits.shape)


def cross(logits, target: int) -> float:
    return math.log(sum(math.exp(z) for z in logits)) - logits[target]


def softmax(logits, tau: float = 1.0) -> list[float]:
    total = sum(math.exp(z / tau) for z in logits)
    return [math.exp(z / tau) / total for z in logits]


BATCH = {"image": torch.zeros(2, 3), "target": torch.tensor([0, 2])}
STUDENT, TEACHER = [0.5, -1.0, 2.0], [0.1, 1.5, -0.7]


def objective(student, teacher, **more) -> Distillation:
    return Distillation(Fixed(student), ("image",), Classification(), Fixed(teacher), **more).eval()


def test_hard_distillation_is_equation_3():
    losses = objective(STUDENT, TEACHER)(BATCH)
    truth = (cross(STUDENT, 0) + cross(STUDENT, 2)) / 2
    assert losses["truth"].item() == pytest.approx(truth)
    assert losses["teacher"].item() == pytest.approx(cross(STUDENT, 1))  # the teacher's greatest
    assert losses["loss"].item() == pytest.approx((truth + cross(STUDENT, 1)) / 2)


@pytest.mark.parametrize(("tau", "share"), [(3.0, 0.1), (1.5, 0.7)])
def test_soft_distillation_is_equation_2(tau, share):
    losses = objective(STUDENT, TEACHER, hard=False, temperature=tau, share=share)(BATCH)
    truth = (cross(STUDENT, 0) + cross(STUDENT, 2)) / 2
    p, q = softmax(TEACHER, tau), softmax(STUDENT, tau)
    lesson = tau**2 * sum(a * math.log(a / b) for a, b in zip(p, q))
    assert losses["teacher"].item() == pytest.approx(lesson, rel=1e-5)
    assert losses["loss"].item() == pytest.approx((1 - share) * truth + share * lesson, rel=1e-5)


def test_defaults_are_those_of_the_paper():
    found = objective(STUDENT, TEACHER)
    assert (found.hard, found.temperature, found.share) == (True, 3.0, 0.1)
    with pytest.raises(SettingsError, match="temperature=0"):
        objective(STUDENT, TEACHER, temperature=0)


def test_class_and_distillation_token_have_separate_targets():
    """The class token is trained on labels, the distillation token on the teacher; other ensembles on both."""
    both = [STUDENT, [1.0, 0.0, -1.0]]
    student = objective(both, TEACHER)
    student.model.distillation_head = 1
    losses = student(BATCH)
    assert losses["truth"].item() == pytest.approx((cross(both[0], 0) + cross(both[0], 2)) / 2)
    assert losses["teacher"].item() == pytest.approx(cross(both[1], 1))
    everyone = objective(both, TEACHER)(BATCH)
    assert everyone["teacher"].item() == pytest.approx((cross(both[0], 1) + cross(both[1], 1)) / 2)
    assert everyone["truth"].item() == pytest.approx(sum(cross(z, y) for z in both for y in (0, 2)) / 4)


def test_ensemble_teacher_is_averaged():
    teachers = [[3.0, 0.0, 0.0], [-8.0, 1.0, 0.9]]
    want = [(a + b) / 2 for a, b in zip(softmax(teachers[0]), softmax(teachers[1]))]
    said = objective(STUDENT, teachers).teacher_logits(BATCH)
    torch.testing.assert_close(said.softmax(-1)[0], torch.tensor(want))


def test_deit_trains_its_second_token_on_the_teacher():
    torch.manual_seed(0)
    student, teacher = create("deit-test"), create("resnet-test", channels=2)
    nn.init.normal_(student.head.weight)
    batch = {"image": torch.randn(4, 2, 12, 12), "target": torch.tensor([0, 1, 2, 3])}
    found = Distillation(student, ("image",), Classification(), teacher).train()
    losses = found(batch)
    with torch.no_grad():
        logits, said = student(batch["image"]), teacher(batch["image"]).argmax(1)
    assert not teacher.training and logits.shape == (4, 2, 5)
    torch.testing.assert_close(losses["truth"], nn.functional.cross_entropy(logits[:, 0], batch["target"]))
    torch.testing.assert_close(losses["teacher"], nn.functional.cross_entropy(logits[:, 1], said))
    losses["loss"].backward()
    assert all(p.grad is not None for p in student.parameters()) and all(p.grad is None for p in teacher.parameters())
    assert found.eval().outputs(batch)["probabilities"].shape == (4, 5)


def test_teacher_is_frozen_and_not_saved():
    """Frozen, always in evaluation mode, in no checkpoint and no optimizer, but moved with the student."""
    found = objective(STUDENT, TEACHER)
    teacher = found.frozen_teacher[0]
    before = teacher.logits.clone()
    found.train()
    assert not teacher.training and not teacher.logits.requires_grad
    assert list(found.state_dict()) == ["model.logits"]
    assert [name for phase in found.phases for name, _ in found.phase_parameters(phase)] == ["model.logits"]
    assert [name for name, _ in found.named_parameters()] == ["model.logits"]
    optimizer = torch.optim.SGD(found.parameters(), 1.0, weight_decay=0.5)
    found(BATCH)["loss"].backward()
    optimizer.step()
    assert torch.equal(teacher.logits, before) and teacher.asked == 1
    found.double()
    assert teacher.logits.dtype == torch.float64
    other = copy.deepcopy(found)
    assert other.frozen_teacher[0] is not teacher and torch.equal(other.frozen_teacher[0].logits, teacher.logits)
    found.outputs(BATCH)
    assert teacher.asked == 1  # scores do not ask it


def test_different_number_of_classes_is_rejected():
    with pytest.raises(SettingsError, match="teacher has 2 classes, the student 3"):
        objective(STUDENT, [0.0, 1.0])(BATCH)


def test_images_are_converted_to_the_teachers_preprocessing():
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    mine = ImageTransform(8, 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.1))
    x = mine.apply(pixels)
    assert mine.convert_for(x, ImageTransform(8, 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.1))) is x
    other = ImageTransform(8, 3, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    torch.testing.assert_close(mine.convert_for(x, other), other.apply(pixels))
    grey = ImageTransform(8, 1, (0.5,), (0.2,))
    want = (pixels.float() / 255 * torch.tensor([0.299, 0.587, 0.114]).view(-1, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(mine.convert_for(x, grey), (want - 0.5) / 0.2)
    back = grey.convert_for(grey.apply(pixels[:, :1]), mine)
    torch.testing.assert_close(back, mine.apply(pixels[:, :1].expand(-1, 3, -1, -1)))
    assert mine.convert_for(x, ImageTransform(16, 3)).shape == (2, 3, 16, 16)
    flat = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    torch.testing.assert_close(
        mine.convert_for(mine.apply(flat), ImageTransform(4, 3)), ImageTransform(4, 3).apply(flat[..., :4, :4])
    )


QUICK = {"steps": 2, "batch": 16, "precision": "float32", "evaluate": 1}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Return bright and dark images, 30 of each."""
    folder = tmp_path_factory.mktemp("data")
    for name, low in (("bright", 150), ("dark", 0)):
        (folder / name).mkdir()
        for i in range(30):
            Image.fromarray(np.random.default_rng(i).integers(low, low + 100, (8, 8), dtype=np.uint8)).save(
                folder / name / f"{i}.png"
            )
    return folder


@pytest.fixture(scope="module")
def teacher(pictures):
    return fieldguide.fit(pictures, model="resnet-test", out=pictures.parent / "teacher", settings=QUICK)


def test_run_as_teacher(pictures, teacher, tmp_path, monkeypatch):
    """With a relative path, another image side, and a bit-exact resume; a finished run does not need its teacher."""
    monkeypatch.chdir(teacher.path.parent)
    settings = {**QUICK, "steps": 4, "teacher": "teacher", "task.side": 16}
    run = fieldguide.fit(pictures, model="deit-test", out=tmp_path / "student", settings=settings)
    lines = [line for line in run.losses() if "teacher" in line]
    assert lines and all(line["teacher"] > 0 and line["truth"] > 0 for line in lines)
    assert run.record["settings"]["teacher"] == str(teacher.path)

    class Stop(NullCallback):
        def on_step(self, step, losses):
            if step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fieldguide.fit(pictures, model="deit-test", out=tmp_path / "half", settings=settings, callback=Stop())
    half = fieldguide.resume(tmp_path / "half")
    assert half.scores == run.scores
    assert (half.path / "model.safetensors").read_bytes() == (run.path / "model.safetensors").read_bytes()
    teacher.path.rename(teacher.path.with_name("gone"))
    try:
        assert {record["label"] for record in fieldguide.open_run(run.path).predict(pictures / "dark")} <= {"bright", "dark"}
    finally:
        teacher.path.with_name("gone").rename(teacher.path)


def test_distillation_form_is_a_setting(pictures, teacher):
    source = fieldguide.data.read(str(pictures))
    for distill, hard in (("hard", True), ("soft", False)):
        plan = build_plan(source, model="deit-test", settings={**QUICK, "teacher": str(teacher.path), "distill": distill})
        assert isinstance(plan.objective, Distillation) and plan.objective.hard is hard


def test_teacher_trained_on_test_rows_is_rejected(pictures, teacher):
    with pytest.raises(SettingsError, match=r"trained on \d+ of the \d+ test rows .* --seed 0"):
        build_plan(
            fieldguide.data.read(str(pictures)), model="deit-test", seed=1, settings={**QUICK, "teacher": str(teacher.path)}
        )


def test_invalid_teachers_are_rejected(pictures, teacher, tmp_path):
    source = fieldguide.data.read(str(pictures))
    with pytest.raises(RunError, match="nobody"):
        build_plan(source, model="deit-test", settings={**QUICK, "teacher": str(tmp_path / "nobody")})
    with pytest.raises(SettingsError, match="trained for image-classification"):
        fieldguide.fit("iris", model="mlp", out=tmp_path / "b", settings={**QUICK, "teacher": str(teacher.path)})
    task = copy.deepcopy(teacher.task)
    task.labels = ["a", "b"]
    with pytest.raises(SettingsError, match="must be the same"):
        task.teacher_inputs(teacher.task, teacher.card)
    with pytest.raises(SettingsError, match="distill"):
        build_plan(source, settings={"distill": "boiling"})

"""Advice without training: costs that are measured, margins for slow machines, input sizes, threads, and expected scores."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import fieldguide
from fieldguide.automl import advisor, evidence
from fieldguide.automl.advisor import Variant, rank_networks
from fieldguide.automl.evidence import Training
from fieldguide.automl.step_times import StepTimer
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.data import samples
from fieldguide.models import registry
from fieldguide.tasks.vision.image_classification import ImageClassification
from fieldguide.training import precision

MACHINE = {"device": "cpu", "memory": 24e9, "cores": 2, "flops": {"float32": 1.5e11, "bfloat16": 4e10}}


def variant(side: int, rows: int = 3000, size: int = 0, shrinkage: float = 1.0) -> Variant:
    facts = {"task": "image-classification", "rows": rows, "side": side, "num_classes": 10}
    return Variant(size, facts, {"num_classes": 10, "image": side, "channels": 3}, shrinkage)


def rank(variants, minutes, monkeypatch, names=("resnet20", "resnet18-small", "simplecnn", "mobilenetv2-050"), **more):
    monkeypatch.setattr(registry, "names", lambda: list(names))
    kinds = {"input_types": ("image",), "output_types": ("label",)}
    return rank_networks(variants=variants, minutes=minutes, machine=more.pop("machine", MACHINE), **kinds, **more)


@pytest.fixture(scope="module")
def advice():
    return fieldguide.advise("iris", minutes=2, memory=False)


def test_advice_names_candidates_with_cost_and_reasons(advice):
    assert advice.task == "tabular-classification" and advice.rows["training"] + advice.rows["test"] < 150
    assert advice.best == advice.candidates[0] and advice.best.reasons and all("[" in reason for reason in advice.best.reasons)
    for candidate in advice.candidates:
        assert candidate.parameters > 0 and candidate.epoch_seconds > 0
        assert candidate.epochs == pytest.approx(60 * advice.training_minutes / candidate.epoch_seconds)
    assert 0 < advice.training_minutes < advice.minutes == 2
    assert {"linear", "gradient-boosting"} <= set(advice.baselines)


def test_advice_is_what_fit_does(tmp_path):
    given = fieldguide.advise("iris", settings={"deterministic": True}, minutes=1, memory=False)
    run = fieldguide.fit("iris", settings={"deterministic": True, "steps": 1}, minutes=1, out=tmp_path / "run", task=given.task)
    choice = run.record["choice"]
    assert [choice["first"], *(o["name"] for o in choice["others"][:2])] == [c.name for c in given.candidates[:3]]


def test_advice_of_wrong_requests():
    with pytest.raises(SettingsError, match="unknown task"):
        fieldguide.advise("iris", task="classification")
    with pytest.raises(SettingsError, match="cannot use"):
        fieldguide.advise("iris", model="gpt2")
    with pytest.raises(DataError, match="no such file"):
        fieldguide.advise("gone.csv")


def test_commands_print_advice_and_write_nothing(tmp_path, monkeypatch, capsys):
    from typer.testing import CliRunner

    from fieldguide.cli.commands import app

    monkeypatch.chdir(tmp_path)
    path = str(samples.path("iris"))
    as_json = CliRunner().invoke(app, ["advise", path, "--minutes", "2", "--json"])
    assert as_json.exit_code == 0, as_json.output
    found = json.loads(as_json.stdout)
    assert found["candidates"][0]["peak_bytes"] > 2**20 and found["task"] == "tabular-classification"
    plain = CliRunner().invoke(app, ["fit", path, "--minutes", "2", "--dry-run"])
    assert plain.exit_code == 0 and found["candidates"][0]["name"] in plain.stdout and "first choice" in plain.stdout
    assert not list(tmp_path.iterdir())


def test_measured_time_decides(monkeypatch):
    """A network that is far slower on this machine than its multiply-adds suggest is not chosen."""
    first = rank([variant(32)], 3, monkeypatch).best.name
    seconds = {o.name: o.example_seconds for o in rank([variant(32)], 3, monkeypatch).options}
    asked = []

    def measure(option, of):
        asked.append(option.name)
        return 300 * seconds[option.name] if option.name == first else seconds[option.name]

    second = rank([variant(32)], 3, monkeypatch, measure=measure)
    assert second.best.name != first and first in asked and len(asked) == len(set(asked)) <= advisor.MIN_MEASURED_OPTIONS
    assert second.best.is_measured


def test_nothing_is_measured_if_time_is_plentiful(monkeypatch):
    rank([variant(32, rows=100)], 1e5, monkeypatch, measure=lambda option, of: pytest.fail("measured"))


@pytest.mark.parametrize("minutes", [0.5, 3, 20])
def test_the_choice_leaves_a_margin_for_a_slow_machine(monkeypatch, minutes):
    """What is chosen on one machine still makes a pass if the machine turns out three times slower."""
    best = rank([variant(32, 5000)], minutes, monkeypatch).best
    slow = {**MACHINE, "flops": {name: flops / 3 for name, flops in MACHINE["flops"].items()}}
    again = next(o for o in rank([variant(32, 5000)], minutes, monkeypatch, machine=slow).options if o.name == best.name)
    assert 60 * minutes / (again.seconds / advisor.TARGET_EPOCHS) >= 1


def test_inputs_are_reduced_only_if_time_is_short(monkeypatch):
    sizes = [variant(96), variant(64, size=64, shrinkage=2 / 3), variant(48, size=48, shrinkage=0.5)]
    names = ("resnet20",)
    assert rank(sizes, 1e4, monkeypatch, names).best.input_size == 0
    short = rank(sizes, 1.5, monkeypatch, names).best
    assert short.input_size in (48, 64) and any("smaller input" in reason for reason in short.reasons)


@pytest.mark.slow
def test_reduced_inputs_reach_the_network(tmp_path, monkeypatch):
    """A run whose images are reduced trains, predicts and is read again with the reduced side."""
    rng = np.random.default_rng(0)
    for kind in ("dark", "light"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for i in range(30):
            pixels = rng.integers(0, 120, (64, 64, 3)) + (100 if kind == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / kind / f"{i}.png")
    monkeypatch.setattr(StepTimer, "__call__", lambda self, option, of: 3e-6 * of.facts["side"] ** 4)
    monkeypatch.setattr(advisor, "MAX_ESTIMATE_ERROR", 1e9)
    monkeypatch.setattr(ImageClassification, "baseline_models", ())
    run = fieldguide.fit(tmp_path / "images", minutes=0.2, out=tmp_path / "run", settings={"steps": 2})
    assert run.task.pictures.side < 64
    assert fieldguide.open_run(tmp_path / "run").predict(tmp_path / "images/dark/0.png")[0]["label"] in ("dark", "light")


def test_steps_are_timed_on_this_machine(monkeypatch):
    timer = StepTimer(MACHINE, advisor.get_speed(MACHINE), minutes=1)
    option = advisor.Option("lenet5-modern", "lenet5", 60_000, 400_000)
    seconds = timer(option, variant(32))
    assert seconds is not None and 1e-6 < seconds < 1
    said = []
    failing = StepTimer(MACHINE, advisor.get_speed(MACHINE), minutes=1, log=said.append)
    monkeypatch.setattr(failing, "time_with", lambda *args: torch.zeros(2) + torch.zeros(3))
    assert failing(option, variant(32)) is None and "lenet5-modern is estimated" in said[0]
    timer.left = 0
    assert timer(option, variant(32)) is None


@pytest.mark.parametrize(
    "times, most, chosen",
    [
        ({1: 2.0, 2: 0.9, 4: 1.0}, 4, 2),
        ({1: 2.0, 2: 1.0, 4: 0.6}, 4, 4),
        ({1: 0.5, 2: 0.5}, 4, 1),
        ({1: 2.0, 2: 1.0, 3: 0.7}, 3, 3),
        ({1: 30.0}, 4, 4),  # timing more would take too long
    ],
)
def test_threads_are_chosen_by_timing(monkeypatch, times, most, chosen):
    monkeypatch.setattr(precision, "measure_step_seconds", lambda *a, **k: times[torch.get_num_threads()])
    with precision.use_threads(most):
        threads, timed = precision.choose_threads(None, {}, budget=100.0)
    assert threads == chosen and timed == times


def trainings(task: str = "image-classification") -> list[Training]:
    return [
        Training(data, task, model, architecture, rows, examples, skill)
        for data, rows in (("a", 1000), ("b", 8000))
        for model, architecture in (("resnet20", "resnet"), ("simplecnn", "simplecnn"))
        for examples, skill in ((1e4, 0.5), (1e5, 0.8), (1e6, 0.9))
    ]


def test_expected_skills_grow_with_the_examples_seen():
    skills = [
        evidence.expect("image-classification", "resnet20", "resnet", 2000, n, None, trainings()).median
        for n in (1e4, 1e5, 1e6)
    ]
    assert skills == sorted(skills) and skills[0] < 0.7 < skills[-1]
    found = evidence.expect("image-classification", "resnet20", "resnet", 1000, 1e5, None, trainings())
    assert found.low <= found.median <= found.high and found.data[0] == "a"


def test_a_baseline_shows_how_hard_the_data_is():
    """The network halves the error of the baseline on both recorded data sets."""
    known = [
        Training("easy", "t", "m", "a", 1000, 1e5, skill=0.9, baseline=0.8),
        Training("hard", "t", "m", "a", 1000, 1e5, skill=0.5, baseline=0.0),
    ]
    found = evidence.expect("t", "m", "a", 1000, 1e5, 0.6, known)
    assert found.median == pytest.approx(0.8, abs=0.02) and found.low <= 0.8 <= found.high
    assert 0.5 < evidence.expect("t", "m", "a", 1000, 1e5, None, known).median < 0.9


def test_nothing_is_expected_without_evidence():
    assert evidence.expect("translation", "transformer-s", "transformer", 1000, 1e5, None, trainings()) is None
    assert evidence.expect("image-classification", "resnet20", "resnet", 10**9, 1e12, None, trainings()) is None


@pytest.mark.parametrize(
    "score, trivial, better, skill",
    [(0.9, 0.5, "max", 0.8), (0.1, 0.5, "min", 0.8), (60, 20, "max", 0.5), (0.4, 0.5, "max", -0.2)],
)
def test_skills_and_scores_are_inverse(score, trivial, better, skill):
    assert evidence.to_skill(score, trivial, better) == pytest.approx(skill)
    assert evidence.to_score(skill, trivial, better, score) == pytest.approx(score)


def test_the_recorded_evidence_is_complete():
    """Networks exist under their names, and skills are finite."""
    for training in evidence.load_trainings():
        card, _ = registry.find(training.model)
        assert card.name == training.architecture and math.isfinite(training.skill) and training.examples > 0

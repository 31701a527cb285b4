"""The clock of a run, baselines that become its model, and the race between networks."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

import fieldguide
from fieldguide.automl import clock, further_networks, race, training
from fieldguide.automl.advisor import Advice, Option
from fieldguide.automl.callbacks import NullCallback
from fieldguide.core.errors import TrainingError
from fieldguide.tasks.tabular.tables import TabularClassification
from fieldguide.training.trainer import Trainer
from test_loop import Clock as FakeTime
from test_loop import line, regression, settled, trainer, weights


@pytest.fixture(scope="module")
def product(tmp_path_factory):
    """Return the path of a table whose two classes follow from the product of two numbers, which no linear model can learn."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 3)).round(3)
    path = tmp_path_factory.mktemp("data") / "product.csv"
    pl.DataFrame({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "y": np.where(x[:, 0] * x[:, 1] > 0, "up", "down")}).write_csv(path)
    return path


class Recorder(NullCallback):
    def __init__(self):
        self.lines, self.phases = [], []

    def log(self, text):
        self.lines.append(text)

    def on_phase(self, name, total=None):
        self.phases.append(name)


# ------------------------------------------------------------------------------------------------- the clock


def test_training_gets_what_is_left_after_a_reserve_for_the_test():
    assert clock.get_training_seconds(0, 100.0, 5.0) == 0  # no limit
    seconds = clock.get_training_seconds(3, 20.0, 2.0)
    assert seconds == pytest.approx(180 - 20 - (4 + 0.03 * 180 + 2 * 2))
    assert clock.get_training_seconds(3, 20.0, 1000.0) == pytest.approx(180 - 20 - 0.4 * 180)  # the reserve has a limit
    assert clock.get_training_seconds(3, 20.0, 2.0, 10.0) == pytest.approx(seconds - 10)  # networks that judge are trained
    assert clock.get_training_seconds(1, 100.0, 0.0) == pytest.approx(15)  # training has a least share


def test_parts_of_a_run_add_up_to_its_time():
    recorder = Recorder()
    watch = clock.Clock(recorder)
    for phase in (
        "reading data.csv",
        "fitting the preprocessing",
        "fitting a baseline (linear)",
        "measuring the time of a step",
    ):
        watch.on_phase(phase)
        time.sleep(0.02)
    watch.on_train_start(settled(), 0)
    watch.on_phase("testing on 5 examples", 5)
    parts = watch.summarize()
    assert list(parts) == ["reading", "preparing", "baselines", "planning", "training", "testing"]
    assert sum(parts.values()) == pytest.approx(watch.elapsed, abs=0.05) and parts["baselines"] >= 0.02
    assert recorder.phases[0] == "reading data.csv" and "baselines" in watch.describe()


def test_batches_grow_if_steps_are_faster_than_planned(monkeypatch):
    fake = FakeTime(monkeypatch, 0.0)
    objective = regression()  # one minute holds 6,000 steps of 8 examples
    objective.register_forward_pre_hook(lambda _, args: setattr(fake, "now", fake.now + 0.01 * len(args[0]["target"]) / 8))
    lines = Recorder()
    loop = Trainer(
        objective,
        line(),
        settled(steps=300, minutes=1, batch=8, evaluate=100),
        device=torch.device("cpu"),
        callback=lines,
        max_steps=4000,
        batch_limit=(64, 1000),
    )
    loop.train()
    assert loop.settings.batch_size == 32  # of 64, fewer than 1,000 steps would fit
    assert loop.settings.steps <= 4000 / 4 + 20 and any("32 examples per step" in text for text in lines.lines)
    assert loop.state.batch == 32


def test_a_limit_before_the_next_step_keeps_the_plan(monkeypatch):
    FakeTime(monkeypatch, 0.0)
    loop = trainer(regression(), steps=300, minutes=1)
    loop.state.most = loop.state.step = 40
    loop.pace_start = (40, 0.0)
    loop.limit_time(30.0)
    assert loop.time_limit == 30.0 and loop.settings.steps == 300


def test_paused_training_continues_as_if_there_was_no_pause():
    whole, paused = trainer(regression(), ema=0.9), trainer(regression(), ema=0.9)
    whole.train()
    for _ in range(3):
        paused.train(pause_at=paused.state.seconds)  # after one step each
    assert paused.state.step == 3
    paused.train()
    assert torch.equal(weights(whole.objective), weights(paused.objective))


# ------------------------------------------------------------------------------------------------- baselines


def test_a_better_baseline_becomes_the_model_of_the_run(product, tmp_path):
    lines = Recorder()
    run = fieldguide.fit(product, "y", out=tmp_path / "run", settings={"steps": 2}, callback=lines)
    assert run.card.name == "gradient-boosting" and run.scores["accuracy"] > 0.9
    assert any("gradient-boosting becomes the model of this run" in text for text in lines.lines)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    rivals = {r["name"]: r for r in record["choice"]["rivals"]}
    network = next(r for r in rivals.values() if r["network"])
    assert set(rivals) == {"linear", network["name"]} and network["validation"] < record["choice"]["validation"]
    scores = {b["name"]: b["scores"]["accuracy"] for b in record["scores"]["baselines"]}
    assert set(scores) == {"majority class", *rivals} and scores[network["name"]] < run.scores["accuracy"]
    again = fieldguide.open_run(tmp_path / "run")
    rows = pl.read_csv(product)
    predicted = [p["label"] for p in again.predict(product)]
    assert np.mean(np.array(predicted) == rows["y"].to_numpy()) > 0.95
    assert again.evaluate(product)["scores"]["accuracy"] == pytest.approx(run.scores["accuracy"])
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Compared models" in report and "is the model of this run because" in report


@pytest.mark.parametrize("target", ["y", "z"])
def test_an_ensemble_can_become_the_model_of_the_run(target, tmp_path, monkeypatch):
    """It is saved, predicts the mean of its members, and is tested again if the test failed."""
    from fieldguide.automl import training

    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3)).round(3)
    rows = pl.DataFrame(
        {"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "y": np.where(x.sum(1) > 0, "up", "down"), "z": x.sum(1) * 7 + 1}
    )
    table = rows.select("a", "b", "c", target)
    monkeypatch.setattr(
        training,
        "find_ensemble",
        lambda plan, rivals, own: (next(r for r in rivals if r.name == "gradient-boosting"), 0.25, own),
    )
    test, calls = training.evaluate_and_save, []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise TrainingError("stopped")
        test(*args)

    monkeypatch.setattr(training, "evaluate_and_save", fail_once)
    lines = Recorder()
    with pytest.raises(TrainingError):
        fieldguide.fit(table, target, out=tmp_path / "run", settings={"steps": 30}, callback=lines)
    assert any("become the model of this run together (75 and 25 % of the mean)" in text for text in lines.lines)
    run = fieldguide.resume(tmp_path / "run", data=table, callback=NullCallback())
    assert run.status == "done" and set(run.record["model"]["parts"]) == {"baseline"}
    objective = fieldguide.open_run(run.path).objective
    batch = {
        name: torch.randn(5, 3) if name == "numbers" else torch.zeros(5, 0, dtype=torch.int64) for name in objective.inputs
    }
    mean = objective.outputs(batch)
    name = next(iter(mean))
    own = objective.loss.outputs(objective.model(*batch.values()))[name]
    other = objective.loss.outputs(objective.baseline(batch))[name]
    torch.testing.assert_close(mean[name], 0.75 * own + 0.25 * other)
    assert {b["name"] for b in run.record["scores"]["baselines"]} >= {
        "linear",
        "gradient-boosting",
        run.record["model"]["size"],
    }
    assert "is the mean of" in (run.path / "report.html").read_text(encoding="utf-8")
    assert run.evaluate(table)["scores"] == pytest.approx(run.scores, nan_ok=True)


def test_an_ensemble_must_be_better_than_both_beyond_noise(product, monkeypatch):
    from types import SimpleNamespace

    from fieldguide.automl import ensemble
    from fieldguide.automl.build_plan import build_plan

    plan = build_plan(fieldguide.read(product, target="y"), model="mlp-test", settings={"steps": 1})
    truth = plan.task.targets(plan.source.take(plan.validation_rows))["label"]
    rng = np.random.default_rng(0)
    right = lambda part: np.where(rng.random(len(truth)) < part, truth, 1 - truth)

    def probabilities(codes, sure):
        return {"probabilities": np.where(np.eye(2)[codes] > 0, sure, 1 - sure)}

    first, second = right(0.75), right(0.75)
    sure = np.where(first == truth, 0.9, 0.6)[:, None]  # each is sure where it is right
    sure_of_second = np.where(second == truth, 0.9, 0.6)[:, None]
    given = {
        "network": probabilities(first, sure),
        "good": probabilities(second, sure_of_second),
        "same": probabilities(first, sure),
    }
    monkeypatch.setattr(ensemble, "predict", lambda plan, objective: given[objective.label])
    monkeypatch.setattr(ensemble, "share_batches", lambda a, b: True)
    score = lambda outputs: plan.task.score(outputs, {"label": truth})["accuracy"]

    class Labeled:
        label = "network"

    def rival(label):
        objective = Labeled()
        objective.label = label
        return SimpleNamespace(objective=objective, card=plan.card, score=score(given[label]), name=label, task=plan.task)

    monkeypatch.setattr(ensemble, "Supervised", Labeled)
    plan.objective = Labeled()
    own = score(given["network"])
    found = ensemble.find_ensemble(plan, [rival("good")], own)
    assert found is not None and found[0].name == "good" and found[2] > max(own, score(given["good"]))
    assert ensemble.find_ensemble(plan, [rival("same")], own) is None
    assert ensemble.find_ensemble(plan, [], own) is None


def test_a_requested_network_stays_and_the_report_says_that_it_lost(product, tmp_path):
    run = fieldguide.fit(product, "y", model="mlp", out=tmp_path / "run", settings={"steps": 2}, callback=NullCallback())
    assert run.card.name == "mlp"
    assert "does not beat" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_baseline_can_be_asked_for_and_a_killed_fit_resumed(product, tmp_path, monkeypatch):
    from fieldguide.automl import training

    def fail(*args):
        raise TrainingError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate_and_save", fail)
        with pytest.raises(TrainingError):
            fieldguide.fit(product, "y", model="gradient-boosting", out=tmp_path / "run", callback=NullCallback())
    run = fieldguide.resume(tmp_path / "run", callback=NullCallback())
    assert run.status == "done" and run.card.name == "gradient-boosting" and run.scores["accuracy"] > 0.9


# ------------------------------------------------------------------------------------------------- the race


def outputs(codes, classes=2):
    return {"probabilities": np.eye(classes)[codes] * 0.8 + 0.1}


def test_win_probability_compares_the_same_rows():
    rng = np.random.default_rng(0)
    task = TabularClassification([], TabularClassification.Options())
    task.labels, task.counts = ["a", "b"], [50, 50]
    y = rng.integers(0, 2, 300)
    good, other = y.copy(), y.copy()
    good[:30] ^= 1
    other[:36] ^= 1  # wrong on the same rows and on six more
    compare = lambda a, b: race.compute_win_probability(task, outputs(a), outputs(b), {"label": y}, "accuracy", 1)
    assert compare(good, other) > 0.97 and compare(other, good) < 0.03 and compare(good, good) == 0.5
    independent = y.copy()
    independent[-32:] ^= 1
    assert 0.05 < compare(good, independent) < 0.95


OTHERS = [SimpleNamespace(name=name) for name in ("mlp-test", "fnn-test")]  # options for `build_contender`


@pytest.fixture
def short_race(monkeypatch):
    monkeypatch.setattr(race, "MIN_SECONDS", 1.0)
    monkeypatch.setattr(race, "choose_rules", lambda seconds: replace(race.LONG, points=100.0))


def test_race_picks_a_winner_that_goes_on(product, tmp_path, short_race):
    lines = Recorder()
    started = time.monotonic()
    run = fieldguide.fit(product, "y", minutes=0.15, out=tmp_path / "run", callback=lines)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    contenders = {c["name"]: c for c in record["race"]["contenders"]}
    assert len(contenders) >= 2 and record["race"]["winner"] in contenders
    assert all(c["scores"] and c["steps"] for c in contenders.values())
    assert sum(not c["dropped"] for c in contenders.values()) == 1
    compared = {record["model"]["size"], *(r["name"] for r in record["choice"]["rivals"])}
    assert record["race"]["winner"] in compared  # the winner, or a baseline that is better
    steps = [json.loads(text)["step"] for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert record["cost"]["parts"]["race"] > 0
    assert json.loads((tmp_path / "run" / "race.json").read_text()) == record["race"]
    losers = [c for c in contenders.values() if c["name"] != record["race"]["winner"]]
    assert all(c["probability"] is None or 0 <= c["probability"] <= 1 for c in losers)
    assert "Race" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert any(text.startswith("race, round 1") for text in lines.lines) and run.scores["accuracy"] > 0.5
    assert time.monotonic() - started < 120


@pytest.mark.parametrize("sign", [1, -1])
def test_other_networks_use_the_time_that_training_leaves(product, tmp_path, monkeypatch, sign):
    """With the sign of scores reversed, the winner is another one: it is then the model, with its own log and checkpoint."""
    monkeypatch.setattr(further_networks, "MIN_SECONDS", 1.0)
    monkeypatch.setattr(further_networks, "MIN_TIMES", 0.0)
    monkeypatch.setattr(further_networks, "choose_options", lambda advice: OTHERS)
    taken = []

    def train_further(plan, loop, *rest):
        found = further_networks.train_further(plan, loop, *rest)
        for place, (_, own, _) in enumerate(found):
            own.state.best = loop.state.best + sign * (1 + place)
        taken.extend([plan.size, *(other.size for other, *_ in found)])
        return found

    monkeypatch.setattr(training, "train_further", train_further)
    monkeypatch.setattr(training, "fit_baselines", lambda *rest: [])
    settings = {"patience": 2, "evaluate": 10}
    run = fieldguide.fit(product, "y", minutes=0.3, out=tmp_path / "run", settings=settings, callback=NullCallback())
    assert len(taken) >= 2 and len(set(taken)) == len(taken)
    winner = taken[-1] if sign == 1 else taken[0]
    rivals = {r["name"] for r in run.record["choice"]["rivals"]}
    assert run.record["model"]["size"] == winner and rivals >= set(taken) - {winner}
    steps = [json.loads(text)["step"] for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert len(fieldguide.open_run(tmp_path / "run").predict(product)) == 600


def test_contenders_are_other_architectures_and_a_size_with_nearly_equal_points():
    options = lambda *points: [Option(name, name.split("-")[0], points=value, parameters=10) for name, value in points]
    choose = lambda *points, rules=race.LONG: [o.name for o in race.choose_options(Advice(options(*points), []), rules)]
    assert choose(("a-s", 9.0), ("a-m", 8.5), ("a-l", 8.4), ("b-s", 8.0), ("c-s", 7.0)) == ["a-m", "b-s"]
    assert choose(("a-s", 9.0), ("a-m", 7.5), ("b-s", 7.0), ("b-m", 7.0), ("c-s", 6.0)) == ["b-s", "c-s"]
    assert choose(("a-s", 9.0), ("b-s", 2.9)) == []
    short, long = race.choose_rules(120), race.choose_rules(600)
    assert choose(("a-s", 9.0), ("b-s", 8.5), ("c-s", 8.4), rules=long) == ["b-s", "c-s"]
    assert choose(("a-s", 9.0), ("b-s", 8.5), ("c-s", 8.4), rules=short) == ["b-s"]
    assert choose(("a-s", 9.0), ("b-s", 7.5), rules=long) == ["b-s"] and choose(("a-s", 9.0), ("b-s", 7.5), rules=short) == []
    assert sum(short.rounds) < sum(long.rounds) < 1 / 4  # what each that loses costs


@pytest.mark.slow
def test_a_race_names_its_contenders(product, tmp_path, short_race, monkeypatch):
    """The first choice keeps its name if another network wins."""
    monkeypatch.setattr(race, "choose_options", lambda *_: OTHERS)
    monkeypatch.setattr(race.Race, "find_leader", lambda self: self.contenders[-1])
    run = fieldguide.fit(product, "y", minutes=0.15, out=tmp_path / "run", callback=NullCallback())
    names = [c["name"] for c in run.record["race"]["contenders"]]
    assert len(set(names)) == len(names) and run.record["race"]["winner"] == names[-1]


@pytest.mark.parametrize("seconds", [0.001, 0.4])
def test_a_slow_test_takes_a_sample_of_the_rows(product, monkeypatch, seconds):
    from fieldguide.automl import run_writer
    from fieldguide.automl.build_plan import build_plan
    from fieldguide.inference.predictor import TaskPredictor

    monkeypatch.setattr(run_writer, "MIN_TEST_ROWS", 20)
    plan = build_plan(fieldguide.read(product, target="y"), model="mlp-test", settings={"minutes": 1})
    fake = FakeTime(monkeypatch, 0.0)
    fake.perf_counter = fake.monotonic
    monkeypatch.setattr(run_writer, "time", fake)
    monkeypatch.setattr(clock, "time", fake)

    def run_batches(self, task, batches, *rest):
        fake.now += seconds * len(batches)

    monkeypatch.setattr(TaskPredictor, "run_batches", run_batches)
    watch = clock.Clock(Recorder())
    fake.now += 30
    found = run_writer.choose_test_rows(plan, TaskPredictor(plan.task, plan.card, plan.objective), watch)
    left = 60 - 30 - seconds * run_writer.TIMED_TEST_ROWS
    assert found is None if seconds < 0.1 else found == pytest.approx(run_writer.TEST_TIME_FRACTION * left / seconds, abs=1)


def test_interrupted_race_leaves_the_leader_to_resume(product, tmp_path, short_race):
    class Impatient(Recorder):
        def on_phase(self, name, total=None):
            super().on_phase(name, total)
            if name.startswith("racing"):
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises((KeyboardInterrupt, TrainingError)):
            fieldguide.fit(product, "y", minutes=0.3, out=tmp_path / "run", callback=Impatient())
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "run" / "run.json").exists()
    run = fieldguide.resume(tmp_path / "run", settings={"minutes": 0.1}, callback=NullCallback())
    assert run.status == "done"


def test_no_race_without_time_or_if_the_network_is_requested(product, tmp_path):
    lines = Recorder()
    fieldguide.fit(product, "y", minutes=0.02, out=tmp_path / "a", callback=lines)
    fieldguide.fit(product, "y", model="mlp", settings={"steps": 3}, out=tmp_path / "b", callback=lines)
    assert not any("race" in name or "racing" in name for name in lines.phases)


# ------------------------------------------------------------------------------------------------- training again


@pytest.mark.parametrize("model", ["mlp", "linear", "gradient-boosting"])
def test_refit_trains_on_training_and_validation_rows(model, product, tmp_path):
    changes = {"refit": True, **({"steps": 12, "eval_steps": 4} if model == "mlp" else {})}
    lines = Recorder()
    run = fieldguide.fit(product, "y", model=model, out=tmp_path / "run", settings=changes, callback=lines)
    plain = {key: value for key, value in changes.items() if key != "refit"}
    once = fieldguide.fit(product, "y", model=model, out=tmp_path / "once", settings=plain, callback=NullCallback())
    split = run.record["data"]["split"]
    assert run.record["refit"]["rows"] == split["train"] + split["validation"] and "refit" not in once.record
    assert any(name.startswith("training again on") for name in lines.phases)
    if model == "mlp":
        assert run.record["refit"]["steps"] == round(
            run.record["cost"]["best_step"] * (1 + split["validation"] / split["train"])
        )
    if model == "gradient-boosting":
        assert run.scores["accuracy"] > 0.9
    ours, theirs = run.objective.state_dict(), once.objective.state_dict()
    assert any(ours[key].shape != theirs[key].shape or not torch.equal(ours[key], theirs[key]) for key in ours)
    assert fieldguide.open_run(tmp_path / "run").evaluate(product)["scores"] == pytest.approx(run.scores, nan_ok=True)


def test_refit_uses_the_batches_that_training_ended_with(product, monkeypatch):
    """They may have grown since the plan."""
    from fieldguide.automl import refit
    from fieldguide.automl.build_plan import build_plan
    from fieldguide.training.state import State

    plan = build_plan(fieldguide.read(product, target="y"), model="mlp-test", settings={"steps": 4, "batch_size": 8})
    used, make = [], refit.Trainer
    monkeypatch.setattr(
        refit,
        "Trainer",
        lambda objective, batches, settings, **rest: used.append(settings) or make(objective, batches, settings, **rest),
    )
    ended = plan.settings.with_({"batch_size": 32})
    found = refit.refit(plan, ended, State(step=4, best_step=4), None, NullCallback())
    assert used[0].batch_size == 32 and used[0].steps == found["steps"] > 4


def test_a_network_that_failed_does_not_win():
    contest = race.Race.__new__(race.Race)
    contest.sign = 1
    failed = SimpleNamespace(scores=[0.9], outputs=None)
    other = SimpleNamespace(scores=[0.6], outputs={})
    contest.contenders = [other, failed]
    assert contest.find_leader() is other


@pytest.mark.parametrize("sign", [1, -1])
def test_the_leader_has_the_best_score_of_any_round(sign):
    contest = race.Race.__new__(race.Race)
    contest.sign = sign
    make = lambda *scores: SimpleNamespace(scores=[sign * score for score in scores], outputs={})
    worse, best, same = make(0.2, 0.3), make(0.5, 0.4), make(0.1, 0.4)
    contest.contenders = [worse, best, same]
    assert contest.find_leader() is best


def test_none_is_dropped_before_something_is_learnt():
    contest = race.Race.__new__(race.Race)
    contest.sign = 1
    first, other = (SimpleNamespace(scores=[score], outputs={}, dropped="") for score in (0.005, 0.04))
    contest.contenders = [first, other]
    assert contest.drop([first, other]) == [first, other]

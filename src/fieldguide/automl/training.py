"""From a plan to a tested run: baselines, race, training, calibration, training again, and the test."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fieldguide.automl import frozen_features, profile
from fieldguide.automl.baselines import Baseline, SolverLoop, find_better, fit_baselines, fit_downloaded
from fieldguide.automl.build_plan import Plan
from fieldguide.automl.callbacks import NullCallback
from fieldguide.automl.clock import Clock, get_training_seconds
from fieldguide.automl.ensemble import find_ensemble
from fieldguide.automl.further_networks import describe, train_further
from fieldguide.automl.race import Race, is_open, is_possible
from fieldguide.automl.refit import TIME_FRACTION, refit
from fieldguide.automl.run_writer import MIN_TEST_ROWS, evaluate_and_save, save_trained
from fieldguide.core import distributed
from fieldguide.core.errors import RunError
from fieldguide.core.run_files import update_run
from fieldguide.core.run_record import write_record
from fieldguide.inference.run import Run, open_run
from fieldguide.objectives import Objective
from fieldguide.training import peft
from fieldguide.training.inference_loop import collect
from fieldguide.training.state import Interrupted, State
from fieldguide.training.trainer import Trainer
from fieldguide.training.validation_loss import ValidationLoss


def build_trainer(plan: Plan, callback: NullCallback, folder: Path | None = None) -> Trainer | SolverLoop:
    """Return the training loop of a plan, which scores its validation rows."""
    if plan.card.solver:
        return SolverLoop(plan, callback)
    task, metric, device = plan.task, plan.task.monitored_metric(), distributed.device()
    targets = task.targets(plan.source.take(plan.validation_rows))
    examples, plain = plan.settings.resolved_batch_size, plan.settings.with_({"augmentation": "none", "mixup": 0})
    validation_loss = ValidationLoss(
        lambda: task.loss_batches(plan.source.take(plan.validation_rows[:examples]), plan.card, plain),
        batch=examples,
        device=device,
        precision=plan.settings.precision,
        log=callback.log,
    )

    def evaluate(objective: Objective) -> dict[str, float]:
        if loop.folder and distributed.rank() == 0:  # not `folder`: the winner of a race gets its folder later
            from fieldguide.report.eval_samples import EvalSamples

            EvalSamples(loop.folder).sample(loop.state.step, loop.settings, lambda: task.log_eval_samples(objective))
        batch_size, precision = max(64, plan.settings.resolved_batch_size), plan.settings.precision
        outputs = collect(objective, plan.validation, batch=batch_size, device=device, precision=precision)
        scores = task.score(outputs, targets)
        return {metric.name: scores[metric.name], **scores, **validation_loss.compute(objective)}  # the main one first

    loop = Trainer(
        plan.objective,
        plan.train_batches,
        plan.settings,
        device=device,
        callback=callback,
        folder=folder,
        evaluate=evaluate,
        metric=(metric.name, metric.better),
        max_steps=plan.max_steps,
        time_limit=plan.training_seconds,
        batch_limit=plan.batch_limit,
    )
    return loop


def race(path: Path, record: dict[str, Any], plan: Plan, callback: Clock) -> Trainer | None:
    """Let networks race, and return the training loop of the winner, which is then in the plan; None without a race."""
    contest = Race(plan, build_trainer, callback)
    is_interrupted = False
    try:
        if not contest.run():
            return None
    except Interrupted:
        is_interrupted = True
    loop = contest.winner.loop
    loop.attach(path)
    describe_choice(record, plan, loop)
    record["race"] = contest.to_record()
    if plan.weights is not None:  # resume starts from them too
        record["request"]["weights"] = plan.weights
    if (frozen := contest.winner.frozen) is not None:
        record["choice"]["frozen"] = frozen.describe()
    with update_run(path, record) as staging:
        plan.task.save(staging / "preprocess")
        (staging / "race.json").write_text(json.dumps(record["race"], indent=2, ensure_ascii=False), encoding="utf-8")
    if is_interrupted:
        loop.save_and_stop()
    return loop


def describe_choice(record: dict[str, Any], plan: Plan, loop: Trainer) -> None:
    """Put the network that was chosen into the record of a run."""
    record["model"], record["settings"] = plan.describe_model(), loop.settings.to_dict()
    record["cost"] |= {"training_seconds": plan.training_seconds, "max_steps": plan.max_steps}


def use_remaining_time(
    path: Path, record: dict[str, Any], plan: Plan, loop: Trainer, rivals: list[Baseline], callback: Clock
) -> Trainer:
    """Train other networks in the time that is left, put the best one into the plan, and return its loop.

    The others are appended to `rivals` if the task compares its networks with fitted baselines.
    """
    others = train_further(plan, loop, build_trainer, callback)
    if not others:
        return loop
    metric = plan.task.monitored_metric()
    sign = 1 if metric.better == "max" else -1
    trained = [(copy.copy(plan), loop, loop.state.seconds), *others]
    rank = lambda entry: -math.inf if entry[1].state.best is None else sign * entry[1].state.best
    best = max(trained, key=rank)
    if plan.task.baseline_models:  # predictions of the others can be scored like those of a baseline
        rivals += [describe(*entry) for entry in trained if entry is not best]
    shown = "; ".join(
        f"{p.size} {metric.text(t.state.best) if t.state.best is not None else 'no score'}" for p, t, _ in trained
    )
    callback.log(f"{metric.heading} on validation rows: {shown}; {best[0].size} is kept")
    if best[1] is loop:
        return loop
    plan.become(best[0])
    shutil.rmtree(path / "checkpoints", ignore_errors=True)  # of the first network
    (path / "metrics.jsonl").unlink(missing_ok=True)
    best[1].attach(path)
    best[1].callback = callback
    best[1].save()
    describe_choice(record, plan, best[1])
    return best[1]


def estimate_test_seconds(plan: Plan) -> float:
    """Return the seconds of predicting the test rows: a third of the time of a training step for each forward pass of a batch.

    If predictions are generated, only `MIN_TEST_ROWS` are certain to be predicted.
    """
    task = plan.task
    rows = min(len(plan.splits.test), task.max_test_examples or len(plan.splits.test))
    if task.prediction_passes > 1:
        rows = min(rows, MIN_TEST_ROWS)
    seconds = plan.seconds_per_step if plan.seconds_per_step == plan.seconds_per_step else 0.0  # NaN if it was not measured
    return rows / plan.settings.resolved_batch_size * task.prediction_passes * seconds / 3


def train(plan: Plan, loop: Trainer | SolverLoop) -> State:
    """Train, and calibrate on the validation rows."""
    return settle(plan, loop.train())


def settle(
    plan: Plan,
    state: State,
    save: Callable[[State], None] | None = None,
    rivals: list[Baseline] | None = None,
    log: Callable[[str], None] = lambda text: None,
    can_join: bool = True,
) -> State:
    """Choose the model of the run after training, and calibrate it on the validation rows. `save` is called in between.

    If the mean with one of the fitted `rivals` is clearly better, both become the model, where `can_join`; else, if a rival has a
    better validation score, it changes places with the network.
    """
    plan.updates = peft.merge(plan.objective.model)
    if rivals and can_join and (joined := find_ensemble(plan, rivals, state.best)) is not None:
        baseline, weight, score = joined
        metric = plan.task.monitored_metric()
        log(
            f"{plan.size} and {baseline.name} become the model of this run together ({100 * (1 - weight):.0f} and "
            f"{100 * weight:.0f} % of the mean): {metric.heading} {metric.text(score)} on the validation rows, alone "
            f"{metric.text(state.best)} and {metric.text(baseline.score)}"
        )
        rivals.append(plan.join(baseline, weight, state.best))
        state.best = score
    elif rivals and (better := find_better(plan, rivals, state.best)) is not None:
        metric = plan.task.monitored_metric()
        log(
            f"{better.name} becomes the model of this run: {metric.heading} {metric.text(better.score)} on the validation rows, "
            f"{plan.size} {metric.text(state.best)}"
        )
        rivals[rivals.index(better)] = plan.adopt(better, state.best)
        state.best = better.score
    if save is not None:
        save(state)
    rows = plan.source.take(plan.validation_rows)
    batches = plan.task.batches(rows, plan.card)
    # In float32, whatever the precision of training: the same on every machine.
    outputs = collect(plan.objective, batches, batch=max(64, plan.settings.resolved_batch_size), device=distributed.device())
    plan.task.calibrate(outputs, plan.task.targets(rows))
    return state


def score_untrained(plan: Plan, loop: Trainer) -> float | None:
    """Score a pretrained network without new parameters before its first step, and keep its weights unless training is better.

    Returns None if the task does not ask for it.
    """
    if not plan.task.scores_untrained or plan.fresh != [] or loop.state.step or not loop.evaluate:
        return None
    loop.objective.to(distributed.device())
    loop.evaluate_and_keep_best()
    return loop.state.best


def train_and_test(
    path: Path, record: dict[str, Any], plan: Plan, callback: Clock, resume: bool = False, more_steps: bool = True
) -> Run:
    """Train a plan in its run folder, test it, and return the run."""
    is_left_open = record["choice"].get("is_open", False)  # whether the user left the model open
    baselines = fit_baselines(plan, callback)
    if is_left_open and (downloaded := fit_downloaded(plan, callback)) is not None:
        baselines.append(downloaded)
    is_begun = resume and any((path / "checkpoints").glob("step-*.json"))
    wants_frozen = record["choice"].get("frozen_features", False) and more_steps and not is_begun
    frozen = frozen_features.fit_frozen(plan, callback) if wants_frozen else None
    if not resume and plan.settings.minutes:
        scoring = plan.task.estimate_scoring_seconds()
        seconds = get_training_seconds(plan.settings.minutes, callback.elapsed, estimate_test_seconds(plan), scoring)
        plan.training_seconds = (1 - TIME_FRACTION) * seconds if plan.settings.refit else seconds
        record["cost"]["training_seconds"] = round(plan.training_seconds, 2)
        if distributed.rank() == 0:
            write_record(path, record)
    raced = race(path, record, plan, callback) if not resume and is_possible(plan, record["request"]) else None
    can_continue = more_steps and not resume and not plan.settings.refit and not plan.part_networks and plan.weights is None
    can_continue = can_continue and is_left_open and is_open(plan, record["request"])
    loop = raced or build_trainer(plan, callback, path)
    if resume and loop.resume():
        callback.log(f"resumed at step {loop.state.step} of {loop.settings.steps}")
    elif not more_steps and not plan.card.solver:
        raise RunError(f"{path} was stopped before its first checkpoint, so there is nothing to test. Resume it instead.")
    if frozen is not None and isinstance(loop, Trainer):
        record["choice"]["frozen"] = frozen.describe()
        loop.start_from_scored(frozen.score)
    if more_steps and isinstance(loop, Trainer) and raced is None and (untrained := score_untrained(plan, loop)) is not None:
        metric = plan.task.monitored_metric()
        callback.log(
            f"{plan.weights or plan.size} without training: {metric.heading} {metric.text(untrained)} on validation rows"
        )
        record["choice"]["untrained"] = untrained
    if more_steps:
        callback.on_train_start(loop.settings, loop.state.step)

    def save(state: State) -> None:
        record["settings"] = loop.settings.to_dict()  # the number of steps may have been replanned
        record["model"] = plan.describe_model()  # it may be a baseline by now
        record["choice"]["validation"] = state.best
        record["choice"]["rivals"] = [rival.describe() for rival in baselines]
        record["cost"]["parameters"] = profile.count_parameters(plan.objective.model)
        if plan.card.solver:  # its lookups and sums are not counted
            record["cost"]["multiply_adds"] = 0
        if distributed.rank() == 0:
            save_trained(path, record, plan, state)

    finished = False
    try:
        state = loop.train() if more_steps else loop.finish()
        if can_continue and isinstance(loop, Trainer):
            loop = use_remaining_time(path, record, plan, loop, baselines, callback)
        minutes = math.inf if plan.settings.deterministic else plan.settings.minutes or math.inf
        can_join = callback.elapsed < 60 * minutes  # all validation rows are predicted again
        state = settle(plan, loop.state, save, baselines if is_left_open else None, callback.log, can_join)
        if state.stopped:
            callback.log(f"stopped at step {state.step}: {state.stopped}")
        if frozen is not None:
            callback.log(frozen_features.describe_outcome(plan, frozen, state))
        if plan.settings.refit:
            record["refit"] = refit(plan, loop.settings, state, record["request"]["weights"], callback)
        save(state)  # again, now calibrated
        try:
            evaluate_and_save(path, record, plan, callback, baselines)
        except Exception:
            callback.log(
                f"the test failed, but the trained network is saved: `fieldguide predict {path}` works, and "
                f"`fieldguide fit --resume {path}` repeats the test"
            )
            raise
        if loop.tracker:
            loop.tracker.log_metrics({"step": state.step, "test": record["scores"]["test"]})
        finished = True
    finally:
        if loop.tracker:
            loop.tracker.close(finished)
    run = open_run(path)
    callback.on_end(run)
    return run

"""The plan of a run: everything that is decided and built before the first training step.

A new run decides with `build_plan`; a stopped run takes its decisions from its record with `Plan.from_run`. Both build
batches, networks and objective through the same two steps, `Plan.build_batches` and `Plan.build_objective`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fieldguide.automl import distillation, finetune
from fieldguide.automl.advisor import Advice, Option, build_config
from fieldguide.automl.baselines import Baseline, share_batches
from fieldguide.automl.callbacks import NullCallback
from fieldguide.automl.choose_network import adapt_to_checkpoint, choose_network
from fieldguide.automl.clock import Clock, get_training_seconds
from fieldguide.automl.time_budget import ENOUGH_STEPS, choose_batch_size, resolve_settings
from fieldguide.checkpoints import load
from fieldguide.checkpoints.backbone import use_as_backbone
from fieldguide.core import distributed
from fieldguide.core.card import PRETRAINED_SOLVER, Card
from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data.dataset import Data
from fieldguide.data.loader import Batches
from fieldguide.data.splits import Splits, sample_rows
from fieldguide.inference.run import BASELINE_PART, Run
from fieldguide.models import registry
from fieldguide.objectives import Objective
from fieldguide.objectives.ensemble import Ensemble, Member
from fieldguide.objectives.supervised import Supervised
from fieldguide.tasks import Task
from fieldguide.training import peft

VALIDATION_ROWS_PER_MINUTE = 5000  # of the given time: more rows take time that training needs, and hardly change the choice


@dataclass
class Plan:
    """The plan of a run: data, task, splits, network, settings and objective."""

    source: Data
    task: Task
    why: str  # the reason for this task
    splits: Splits
    card: Card
    size: str
    config: Any
    settings: Settings
    advice: Advice = field(default_factory=lambda: Advice([], []))
    part_networks: dict[str, tuple[Card, str, Any]] = field(default_factory=dict)  # such as a generator's critic
    weights: str | None = None  # location of the checkpoint that `--weights auto` chose
    fresh: list[str] | None = None  # parameters that the initial checkpoint did not fill; None without a checkpoint
    seconds_per_step: float = 0.0
    training_seconds: float | None = None  # limit of the training, over all sessions; None for the minutes of the settings
    batch_limit: tuple[int, int] = (0, 0)  # largest batch, and steps that must still fit into the time (see `Trainer`)
    max_steps: int = 0  # an upper limit of the steps if they follow from the minutes; else 0
    parameters: Mapping[str, Any] = field(default_factory=dict)  # of a model that is fitted without gradient descent
    requested: dict[str, Any] = field(default_factory=dict)  # settings that the user gave
    task_options: dict[str, Any] = field(default_factory=dict)  # options of the task that the user gave
    updates: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # the factors of LoRA, once merged
    objective: Objective = field(init=False)
    train_batches: Batches = field(init=False)
    validation: Batches = field(init=False)
    validation_rows: np.ndarray = field(init=False)  # rows of `source` that `validation` holds

    @classmethod
    def from_run(cls, run: Run, source: Data, settings: Settings, callback: Any) -> Plan:
        """Return the plan of a run that was stopped, with batches and objective built as when it was started.

        `source` is the data as it was read for the run.
        """
        splits = run.read_splits()
        task, model, request = run.task, run.record["model"], run.record["request"]
        plan = cls(
            source=task.build_examples(task.select_columns(source), task.options),
            task=task,
            why=run.record["choice"]["why"],
            splits=splits,
            card=run.card,
            size=model["size"],
            config=run.config,
            settings=settings,
            part_networks={name: part for name, part in run.part_networks.items() if name != BASELINE_PART},
            fresh=model.get("fresh"),
            seconds_per_step=run.record["cost"]["seconds_per_step"] or 0.0,
            max_steps=run.record["cost"].get("max_steps", 0),
            training_seconds=run.record["cost"].get("training_seconds"),
        )
        callback.on_data(plan.source, type(task), plan.why)
        checkpoint = None
        has_trained = any((run.path / "checkpoints").glob("step-*.json"))
        if plan.fresh is not None and (task.needs_reference or not has_trained):
            name = None if request["model"] == "auto" else request["model"]
            checkpoint = load.inspect_checkpoint(request["weights"], name, callback.log, download=False)
            checkpoint = use_as_backbone(checkpoint, plan.card.output_types)
        plan.build_batches(callback)
        plan.build_objective(callback, checkpoint, {"finetune": settings.finetune})
        if plan.card.solver == PRETRAINED_SOLVER and checkpoint is None:  # a rival that became the model of the run
            plan.objective.model.load_state_dict(run.model.state_dict())
        return plan

    def build_batches(self, callback: Any) -> None:
        """Build the training batches and those of the validation rows that are scored during training."""
        task, splits = self.task, self.splits
        self.train_batches = task.train_batches(self.source.take(splits.train), self.card, self.settings)
        most = task.max_validation_examples
        if self.settings.minutes and not self.settings.deterministic:
            in_time = int(VALIDATION_ROWS_PER_MINUTE * max(1.0, self.settings.minutes))
            most = in_time if most is None else min(most, in_time)
        self.validation_rows = sample_rows(splits.validation, most, self.settings.seed)
        if len(self.validation_rows) < len(splits.validation):
            callback.log(
                f"scored during training: {len(self.validation_rows):,} of {len(splits.validation):,} validation rows, "
                "a random sample"
            )
        self.validation = task.batches(self.source.take(self.validation_rows), self.card, self.settings)

    def complete(
        self,
        requested: Mapping[str, Any],
        callback: Any,
        *,
        checkpoint: load.Checkpoint | None = None,
        clock: Clock | None = None,
        nominal_seconds: float = 0.0,
        shared: Plan | None = None,
    ) -> None:
        """Choose the settings for task, network and data, build batches and objective, and measure the time of a step.

        `requested` are the settings that the user gave. `nominal_seconds` is the time of one example in a deterministic run.
        `shared` is a plan of the same data whose batches are used if they suit this network.
        """
        task, self.requested = self.task, dict(requested)
        chosen = Settings().with_(task.recipe).with_(self.card.recipe)
        if self.card.solver == PRETRAINED_SOLVER and checkpoint is None:
            raise SettingsError(
                f"{self.card.name} predicts only with pretrained weights. Pass --weights auto, or name a checkpoint: --weights PATH."
            )
        if checkpoint is not None and not self.card.solver:
            rows = len(self.splits.train)
            chosen = finetune.choose_settings(chosen, requested, rows, checkpoint, callback, type(task))
        if requested.get("teacher"):
            chosen = chosen.with_(task.student_recipe)
        chosen = distillation.with_absolute_teacher(chosen.override(requested))
        if chosen.deterministic and chosen.threads is None:
            chosen = chosen.with_({"threads": torch.get_num_threads()})  # a repetition uses as many
        self.settings = chosen
        if shared is not None and share_batches(self.card, shared.card) and has_same_batches(chosen, shared.settings):
            self.train_batches, self.validation = shared.train_batches, shared.validation
            self.validation_rows = shared.validation_rows
        else:
            callback.on_phase("preparing the examples")
            self.build_batches(callback)
        largest = min(task.max_batch_size, finetune.MAX_BATCH_SIZE) if checkpoint else task.max_batch_size
        self.settings = choose_batch_size(chosen, len(self.train_batches), task.min_batch_size, largest)
        enough = finetune.MIN_STEPS if checkpoint else ENOUGH_STEPS
        if "batch_size" not in requested:
            self.batch_limit = (self.settings.resolved_batch_size, enough)
        self.build_objective(callback, checkpoint, requested)
        if self.card.solver:  # nothing is trained by steps
            fixed = {"precision": "float32", "channels_last": False, "steps": 1, "eval_steps": 1}
            self.settings = self.settings.with_(fixed)
            return
        callback.on_phase("measuring the time of a step")
        minutes = 0.0 if self.settings.deterministic else self.settings.minutes  # nothing may depend on the time so far
        self.settings, self.seconds_per_step, self.max_steps = distributed.broadcast(
            resolve_settings(
                self.settings,
                self.objective,
                self.train_batches,
                len(self.validation),
                callback,
                min_batch_size=self.settings.resolved_batch_size if "batch_size" in requested else task.min_batch_size,
                enough_steps=enough,
                nominal_seconds=nominal_seconds,
                time_limit=get_training_seconds(minutes, clock.elapsed, 0.0) if clock and minutes else None,
                keep_optimizer="optimizer" in requested or "lr" in requested,
            )
        )

    def build_contender(self, option: Option, callback: Any) -> Plan:
        """Return a plan for another architecture on the same examples."""
        card, size = registry.find(option.name)
        dims = {"output_type": self.task.output_types, **self.task.model_dims()}
        parts = {
            name: configure_part(part, self.task.model_dims(), card, size) for name, part in self.task.part_names(card).items()
        }
        config = build_config(card, size, dims)
        plan = Plan(self.source, self.task, self.why, self.splits, card, size, config, Settings(), self.advice, parts)
        plan.complete(self.requested, callback, shared=self)
        plan.training_seconds = self.training_seconds
        return plan

    def build_pretrained(self, location: str, callback: Any) -> Plan:
        """Return a plan that fine-tunes a checkpoint on the same examples, with the preprocessing that belongs to it."""
        kind, train_rows = type(self.task), self.source.take(self.splits.train)
        checkpoint = load.inspect_checkpoint(location, None, callback.log, download=False)
        options = finetune.get_default_options(kind, checkpoint, self.task_options, callback)
        task = kind.fit(train_rows, kind.options_from(options))
        task, config = adapt_to_checkpoint(task, train_rows, checkpoint, options, {}, callback)
        task.metric = self.task.metric
        dims = {"output_type": task.output_types, **task.model_dims()}
        config = config or build_config(checkpoint.card, checkpoint.size, dims)
        parts = {
            name: configure_part(part, task.model_dims(), checkpoint.card, checkpoint.size)
            for name, part in task.part_names(checkpoint.card).items()
        }
        plan = Plan(
            self.source,
            task,
            self.why,
            self.splits,
            checkpoint.card,
            checkpoint.size,
            config,
            Settings(),
            self.advice,
            parts,
            location,
        )
        plan.complete(self.requested, callback, checkpoint=checkpoint)
        plan.training_seconds = self.training_seconds
        return plan

    def become(self, other: Plan) -> None:
        """Take over network, settings, preprocessing and batches of another plan of the same examples."""
        for name in ("task", "card", "size", "config", "settings", "part_networks", "objective", "train_batches", "validation"):
            setattr(self, name, getattr(other, name))
        self.seconds_per_step, self.max_steps, self.batch_limit = other.seconds_per_step, other.max_steps, other.batch_limit
        self.weights, self.fresh = other.weights, other.fresh

    def adopt(self, baseline: Baseline, own: float | None) -> Baseline:
        """Make a fitted baseline the model of the run, and return the network that it replaces, with its score `own`."""
        network = Baseline(
            card=self.card,
            config=self.config,
            objective=self.objective,
            score=float("nan") if own is None else own,
            chosen="the network that was trained",
            seconds=0.0,
            task=self.task,
            size=self.size,
            is_replaced=True,
        )
        self.card, self.size, self.config, self.objective = baseline.card, baseline.name, baseline.config, baseline.objective
        self.part_networks, self.fresh, self.parameters = {}, None, baseline.parameters
        self.task = baseline.task
        return network

    def join(self, baseline: Baseline, weight: float, own: float | None) -> Baseline:
        """Make an ensemble with a fitted baseline the model of the run, and return the network alone, with its score `own`."""
        network = Baseline(
            card=self.card,
            config=self.config,
            objective=self.objective,
            score=float("nan") if own is None else own,
            chosen="the network alone",
            seconds=0.0,
            task=self.task,
            size=self.size,
            is_replaced=True,
        )
        member = Member(baseline.objective.model, baseline.card.inputs, weight)
        assert isinstance(self.objective, Supervised)
        self.objective = Ensemble(self.objective, member).to(distributed.device()).eval()
        self.part_networks = {**self.part_networks, BASELINE_PART: (baseline.card, baseline.name, baseline.config)}
        return network

    def describe_model(self) -> dict[str, Any]:
        """Return the entry "model" of run.json."""
        return {
            "architecture": self.card.name,
            "size": self.size,
            "config": asdict(self.config),
            "parts": {
                name: {"architecture": card.name, "size": size, "config": asdict(config)}
                for name, (card, size, config) in self.part_networks.items()
            },
            **({"fresh": self.fresh} if self.fresh is not None else {}),
        }

    def build_objective(self, callback: Any, checkpoint: load.Checkpoint | None, requested: Mapping[str, Any]) -> None:
        """Build the networks and the objective around them, with initial weights from `checkpoint` if there is one.

        `requested` are the settings that the user gave. The random weights depend on the seed alone.
        """
        torch.manual_seed(self.settings.seed)
        config = self.config
        if checkpoint is not None and self.card.solver == PRETRAINED_SOLVER:
            config = replace(
                config, context=0
            )  # the files of a checkpoint have no context; that of a stopped run is stored again
        network = self.card.make(config)
        if checkpoint is not None:
            self.fresh = finetune.load_weights(network, checkpoint, callback, self.task.class_names)
            rate = self.task.finetune_rate
            self.settings = finetune.resolve_finetune(self.settings, self.fresh, checkpoint, requested, callback, rate)
        frozen = {}
        if self.task.needs_reference:  # before LoRA is added: the network as it is at the start
            frozen["reference"] = copy.deepcopy(network).requires_grad_(False).eval()
        peft.prepare(network, self.settings, self.fresh)
        parts = {name: card.make(config) for name, (card, _, config) in self.part_networks.items()} | frozen
        objective = self.task.objective(network, self.card, self.settings, **parts)
        self.objective = distillation.add_teacher(objective, self.task, self.settings, self.source, self.splits)


def build_plan(
    source: Data,
    *,
    task: str | None = None,
    why: str = "requested",
    model: str = "auto",
    minutes: float | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    splits: Splits | None = None,
    callback: Any = None,
    weights: str | Path | None = None,
    clock: Clock | None = None,
) -> Plan:
    """Choose task, splits, preprocessing, network and settings for data that has been read; nothing is trained.

    `why` is the reason for `task`. `weights` is a checkpoint to start from, which then determines the network, or "auto" (see
    `pretrained`). `clock` knows how much of the minutes has passed; without it, training may take all of them. Raises `DataError`
    and `SettingsError` as `fit` does.
    """
    callback = callback or NullCallback()
    choice = choose_network(
        source,
        task=task,
        why=why,
        model=model,
        minutes=minutes,
        seed=seed,
        settings=settings,
        splits=splits,
        callback=callback,
        weights=weights,
        clock=clock,
    )
    best, checkpoint, fitted = choice.advice.best, choice.checkpoint, choice.task
    if best.input_size:
        fitted = fitted.with_input_size(best.input_size)
        callback.log(
            f"note: inputs are reduced to {best.input_size}, since a pass over larger ones takes too long for the minutes"
        )
    dims = {"output_type": fitted.output_types, **fitted.model_dims()}
    card, size = (checkpoint.card, checkpoint.size) if checkpoint else registry.find(best.name)
    try:
        config = choice.config or build_config(card, size, dims, choice.model_fields)
    except TypeError as error:
        raise SettingsError(f"--set model.FIELD: {error}") from None
    callback.on_plan(choice.advice, config)
    parts = {name: configure_part(part, fitted.model_dims(), card, size) for name, part in fitted.part_names(card).items()}
    plan = Plan(
        choice.source, fitted, choice.why, choice.splits, card, size, config, Settings(), choice.advice, parts, choice.location
    )
    plan.task_options = choice.task_options
    plan.complete(choice.requested, callback, checkpoint=checkpoint, clock=clock, nominal_seconds=best.example_seconds)
    if plan.settings.deterministic:
        callback.log(describe_determinism(plan.settings))
    return plan


def describe_determinism(settings: Settings) -> str:
    """Return what a deterministic run guarantees, and what it does not."""
    return (
        f"deterministic: {settings.steps:,} steps of {settings.batch_size} examples, {settings.precision}, {settings.threads} "
        "threads; nothing is measured, so the minutes determine the number of steps at a nominal speed, and do not limit the time. "
        "Repeated on this machine with the same versions, the run gives the same scores, whatever else the machine does. On another "
        "CPU or GPU, or with other versions, the last digits and what follows from them may differ"
    )


def has_same_batches(a: Settings, b: Settings) -> bool:
    """Return whether two settings give the same training examples."""
    return all(getattr(a, name) == getattr(b, name) for name in ("augmentation", "mixup"))


def configure_part(name: str, dims: Mapping[str, Any], whole: Card, whole_size: str) -> tuple[Card, str, Any]:
    """Return card, size and config of a further network that a card names, such as a generator's critic.

    The size is the one with the same ending as that of the network it belongs to, if there is one.
    """
    card, size = registry.find(name)
    same = f"{card.name}-{whole_size.removeprefix(whole.name).rpartition('-')[2]}"
    size = same if same in card.sizes else size
    return card, size, build_config(card, size, dims)

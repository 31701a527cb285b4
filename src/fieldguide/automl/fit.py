"""fit: from data to a trained, tested network in a run folder. Each step here is one call into the parts below."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fieldguide.automl import distillation, finetune, profile
from fieldguide.automl.advisor import Advice, advise, configured
from fieldguide.automl.request import address, grouped, read_for, read_request
from fieldguide.automl.time_budget import ENOUGH, resolve, with_batch
from fieldguide.checkpoints import load
from fieldguide.core import distributed
from fieldguide.core.card import Card
from fieldguide.core.errors import RunError, SettingsError
from fieldguide.core.files import write_atomically
from fieldguide.core.hardware import peak_memory
from fieldguide.core.run_record import SCHEMA, write_record
from fieldguide.core.settings import Settings
from fieldguide.core.version import __version__
from fieldguide.data.dataset import Data
from fieldguide.data.loader import Batches
from fieldguide.data.samples import SAMPLES
from fieldguide.data.splits import Splits, drawn, split
from fieldguide.inference.run import Run, open_run
from fieldguide.models import registry
from fieldguide.objectives import Objective
from fieldguide.tasks import Task, asked_for, infer
from fieldguide.training import peft
from fieldguide.training.checkpoint import separate
from fieldguide.training.inference_loop import collect
from fieldguide.training.trainer import State, Trainer

# Settings that may change when a run is resumed; all others would make it another run.
CHANGEABLE = {
    "minutes",
    "lr",
    "weight_decay",
    "grad_clip",
    "patience",
    "checkpoint_seconds",
    "num_workers",
    "precision",
    "tracker",
}


class NullCallback:
    """Sees everything, says nothing."""

    def log(self, text: str) -> None: ...
    def on_data(self, data: Data, task: type[Task], why: str) -> None: ...
    def on_plan(self, advice: Advice, config: Any) -> None: ...
    def on_train_start(self, settings: Settings, done: int) -> None: ...
    def on_step(self, step: int, losses: dict[str, float]) -> None: ...
    def on_evaluate(self, step: int, scores: dict[str, float], best: bool) -> None: ...
    def on_replan(self, steps: int) -> None: ...
    def on_end(self, run: Run) -> None: ...


@dataclass
class Plan:
    """Everything decided before the first step: what is trained, on what, and how."""

    source: Data
    task: Task
    why: str  # the reason that this is the task
    parts: Splits
    advice: Advice
    card: Card
    size: str
    config: Any
    settings: Settings
    objective: Objective
    batches: Batches  # training examples
    validation: Batches
    scored: np.ndarray  # validation rows that these are
    seconds_a_step: float = 0.0
    most: int = 0  # where the minutes decide on the steps: so many are enough
    further: dict[str, tuple[Card, str, Any]] = field(default_factory=dict)  # networks beside the one that answers
    fresh: list[str] | None = None  # of a network that begins with a checkpoint: what that did not fill


def build_plan(
    source: Data,
    *,
    task: str | None = None,
    model: str = "auto",
    minutes: float | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    parts: Splits | None = None,
    callback: Any = None,
    weights: str | Path | None = None,
) -> Plan:
    """Chooses task, split, preparation, network and settings for data that is read; trains nothing. `weights` is a
    checkpoint to begin with, which then says which network it is.

    Raises `DataError` and `SettingsError` as `fit` does.
    """
    callback = callback or NullCallback()
    training, of_model, of_task, *_ = grouped(settings or {})
    if minutes is not None:
        training["minutes"] = minutes
    elif "steps" in training:
        training.setdefault("minutes", 0)  # the user counts steps, not time
    training["seed"] = seed
    budget = Settings().with_(training).minutes or float("inf")
    kind, why = (asked_for(task, source), "you asked for it") if task else infer(source)
    source = kind.select_columns(source)
    callback.on_data(source, kind, why)
    begun = None
    if weights is not None:
        begun = load.inspect_checkpoint(weights, None if model == "auto" else model, callback.log)
        model = begun.size
        of_task = finetune.offered(kind, begun, of_task, callback)
    options = kind.options_from(of_task)
    source = kind.build_examples(source, options)
    parts = parts or split(source, seed=seed)
    callback.log(f"split: {parts.how}")
    learnt = kind.fit(source.take(parts.train), options)
    needs = {"output_type": kind.output_types, **learnt.model_dims()}
    config = begun.config(needs, of_model) if begun and set(begun.card.output_types) & set(kind.output_types) else None
    if begun:
        learnt = finetune.readable(learnt, source.take(parts.train), config, begun, of_task, callback)
        needs = {"output_type": kind.output_types, **learnt.model_dims()}
    for note in learnt.notes:
        callback.log(f"note: {note}")
    advice = advise(
        facts={"task": kind.name, "rows": len(parts.train), **learnt.data_facts()},
        needs=learnt.model_dims(),
        input_types=kind.input_types,
        output_types=kind.output_types,
        minutes=budget,
        machine=distributed.broadcast(profile.machine()),
        model=model,
        config=config,
    )
    card, size = (begun.card, model) if begun else registry.find(advice.best.name)
    try:
        config = config or configured(card, size, needs, of_model)
    except TypeError as error:
        raise SettingsError(f"--set model.…: {error}") from None
    callback.on_plan(advice, config)
    recipe = Settings().with_(kind.recipe).with_(card.recipe)
    chosen = finetune.gentle(recipe, training, len(parts.train), begun, callback) if begun else recipe
    chosen = distillation.named(chosen.overruled(training))
    batches = learnt.train_batches(source.take(parts.train), card, chosen)
    scored = drawn(parts.validation, learnt.validated, seed)
    if len(scored) < len(parts.validation):
        callback.log(
            f"scored while it learns: {len(scored):,} of the {len(parts.validation):,} validation rows, drawn by chance"
        )
    validation = learnt.batches(source.take(scored), card, chosen)
    chosen = with_batch(chosen, len(batches), learnt.fewest, min(learnt.most, finetune.BATCH) if begun else learnt.most)
    torch.manual_seed(seed)
    network = card.make(config)
    fresh = None
    if begun:
        fresh, chosen = finetune.init_checkpoint(network, begun, chosen, training, callback)
    else:
        peft.prepare(network, chosen, fresh)
    further = {name: settled_part(part, learnt.model_dims()) for name, part in card.parts.items()}
    objective = learnt.objective(network, card, chosen, **{n: p.make(c) for n, (p, _, c) in further.items()})
    objective = distillation.taught(objective, learnt, chosen, source, parts)
    chosen, cost, enough = distributed.broadcast(
        resolve(
            chosen,
            objective,
            batches,
            len(validation),
            callback,
            fewest=chosen.batch_size if "batch_size" in training else learnt.fewest,
            enough=finetune.ENOUGH if begun else ENOUGH,
        )
    )
    return Plan(
        source,
        learnt,
        why,
        parts,
        advice,
        card,
        size,
        config,
        chosen,
        objective,
        batches,
        validation,
        scored,
        cost,
        enough,
        further,
        fresh,
    )


def settled_part(name: str, needs: Mapping[str, Any]) -> tuple[Card, str, Any]:
    """A further network that a card names, sized for the data: its card, size and config."""
    card, size = registry.find(name)
    return card, size, configured(card, size, needs)


def fit(
    data: Any,
    *,
    target: str | None = None,
    task: str | None = None,
    model: str = "auto",
    minutes: float | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    group: str | None = None,
    time_column: str | None = None,
    allow_bad: bool = False,
    callback: Any = None,
    settings: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
) -> Run:
    """Reads data, chooses a network, trains and tests it, and returns the run folder.

    `data` is a path, the name of a sample, or a data frame. `settings` holds training settings by name, a network's
    own fields as model.FIELD, the task's as task.FIELD, and kinds of columns as column.NAME. `weights` is a checkpoint to
    begin with (see `fieldguide.load`). Raises `DataError` where
    the data cannot be used and `SettingsError` where a setting cannot work; both say what to do.
    """
    callback = callback or NullCallback()
    training, _, _, kinds, roles = grouped(settings or {})
    Settings().with_(training)  # complain of settings before reading data
    if minutes is None and not {"minutes", "steps"} & set(training) and isinstance(data, str) and data in SAMPLES:
        minutes = SAMPLES[data].minutes
    request = {
        "data": address(data),
        "target": target,
        "group": group,
        "time": time_column,
        "allow_bad": allow_bad,
        "kinds": kinds,
        "roles": roles,
        "task": task,
        "weights": address(weights) if weights is not None else None,
        "model": model,
    }
    if out is not None:
        refuse_taken(Path(out))
    with distributed.processes():
        source, _, _ = read_for(request, data)
        plan = build_plan(
            source,
            task=request["task"],
            model=model,
            minutes=minutes,
            seed=seed,
            settings=settings,
            callback=callback,
            weights=weights,
        )
        path = distributed.broadcast(new_folder(out, source) if distributed.rank() == 0 else None)
        record = first_record(plan, request)
        if distributed.rank() == 0:
            parts = plan.parts
            plan.task.save(path / "preprocess")
            np.savez(path / "splits.npz", train=parts.train, validation=parts.validation, test=parts.test)
            (path / "manifest.json").write_text(json.dumps([asdict(f) for f in source.manifest.files]))
            write_record(path, record)
        return train_and_test(path, record, plan, callback, resume=False)


def first_record(plan: Plan, request: Mapping[str, Any]) -> dict[str, Any]:
    """run.json before training."""
    source, parts, best = plan.source, plan.parts, plan.advice.best
    return {
        "schema": SCHEMA,
        "status": "training",
        "task": plan.task.name,
        "request": request,
        "model": {
            "architecture": plan.card.name,
            "size": plan.size,
            "config": asdict(plan.config),
            "parts": {
                name: {"architecture": card.name, "size": size, "config": asdict(config)}
                for name, (card, size, config) in plan.further.items()
            },
            **({"fresh": plan.fresh} if plan.fresh is not None else {}),
        },
        "settings": plan.settings.to_dict(),
        "choice": {
            "why": plan.why,
            "reasons": best.reasons,
            "against": best.against,
            "others": [asdict(o) for o in (plan.advice.options[1:] + plan.advice.rejected)][:20],
        },
        "data": {
            **source.manifest.summary(),
            "source": source.source,
            "rows": len(source),
            "columns": source.schema(),
            "findings": [asdict(f) for f in source.findings],
            "notes": plan.task.notes,
            "split": {
                "how": parts.how,
                "train": len(parts.train),
                "validation": len(parts.validation),
                "test": len(parts.test),
            },
        },
        "cost": {
            "parameters": profile.parameters(plan.objective.model),
            "multiply_adds": best.multiply_adds,
            "seconds_a_step": plan.seconds_a_step,
            "most_steps": plan.most,
            "processes": distributed.world(),
        },
        "machine": profile.machine(),
        "versions": versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def resume(path: str | Path, *, data: Any = None, callback: Any = None, settings: Mapping[str, Any] | None = None) -> Run:
    """Goes on with a run that was stopped, as if it had never been.

    Raises `RunError` where the data has changed since, and `SettingsError` for changes that would make another run.
    """
    callback = callback or NullCallback()
    run = open_run(path)
    if run.status == "done":
        callback.log(f"{path} is finished already.")
        return run
    with distributed.processes():
        chosen = run.settings
        changed = (
            {
                k: v
                for k, v in Settings().with_(settings or {}).to_dict().items()
                if k in (settings or {}) and v != getattr(chosen, k)
            }
            if settings
            else {}
        )
        if refused := set(changed) - CHANGEABLE:
            raise SettingsError(
                f"{', '.join(sorted(refused))} cannot change when a run is resumed; it would be another "
                "run. Start one with `fieldguide fit`."
            )
        if (before := run.record["cost"]["processes"]) != distributed.world():
            callback.log(
                f"begun with {before} processes, resumed with {distributed.world()}: the same examples a step, but "
                "chance falls otherwise"
            )
        for key, value in changed.items():
            callback.log(
                f"changed on resume: {key} {getattr(chosen, key)} -> {value}; from here the run differs from one "
                "that was never stopped"
            )
        chosen = chosen.with_(changed)
        if run.record["request"]["data"] is None and data is None:
            raise RunError(f"{path} was trained from data in memory; hand the same data to resume(data=...).")
        source = read_request(run.record["request"], data)
        if source.manifest.digest != run.record["data"]["digest"]:
            raise RunError(
                f"{source.source} has changed since {path} began (another digest); a resumed run must see the "
                "same data. Put it back, or start a new run."
            )
        with np.load(run.path / "splits.npz", allow_pickle=False) as saved:
            parts = Splits(saved["train"], saved["validation"], saved["test"], run.record["data"]["split"]["how"])
        task, card = run.task, run.card
        source = task.build_examples(task.select_columns(source), task.options)
        scored = drawn(parts.validation, task.validated, chosen.seed)
        callback.on_data(source, type(task), run.record["choice"]["why"])
        torch.manual_seed(chosen.seed)
        network = run.fresh()
        fresh = run.record["model"].get("fresh")
        if fresh is None or any((run.path / "checkpoints").glob("step-*.json")):
            peft.prepare(network, chosen, fresh)
        else:  # it was stopped before it had kept a step
            name = run.record["request"]["model"]
            begun = load.inspect_checkpoint(run.record["request"]["weights"], None if name == "auto" else name, callback.log)
            finetune.init_checkpoint(network, begun, chosen, {"finetune": chosen.finetune}, callback)
        plan = Plan(
            source,
            task,
            run.record["choice"]["why"],
            parts,
            Advice([], []),
            card,
            run.record["model"]["size"],
            network.config if hasattr(network, "config") else None,
            chosen,
            distillation.taught(task.objective(network, card, chosen, **run.fresh_parts()), task, chosen, source, parts),
            task.train_batches(source.take(parts.train), card, chosen),
            task.batches(source.take(scored), card, chosen),
            scored,
            most=run.record["cost"].get("most_steps", 0),
        )
        run.record["settings"] = chosen.to_dict()
        return train_and_test(run.path, run.record, plan, callback, resume=True)


def trainer(plan: Plan, callback: Any, folder: Path | None = None) -> Trainer:
    """The loop for a plan, scoring on its validation part."""
    task, metric, device = plan.task, plan.task.monitored_metric(), distributed.device()
    truth = task.targets(plan.source.take(plan.scored))

    def evaluate(objective: Objective) -> dict[str, float]:
        if folder and distributed.rank() == 0:
            from fieldguide.report.eval_samples import Glimpses

            Glimpses(folder).look(loop.state.step, loop.settings, lambda: task.log_eval_samples(objective))
        return task.score(
            collect(
                objective,
                plan.validation,
                batch=max(64, plan.settings.batch_size),
                device=device,
                precision=plan.settings.precision,
            ),
            truth,
        )

    loop = Trainer(
        plan.objective,
        plan.batches,
        plan.settings,
        device=device,
        callback=callback,
        folder=folder,
        evaluate=evaluate,
        metric=(metric.name, metric.better),
        most=plan.most,
    )
    return loop


def train(plan: Plan, loop: Trainer) -> State:
    """Trains, then calibrates on the validation part."""
    state = loop.train()
    peft.merge(plan.objective)
    rows = plan.source.take(plan.scored)
    plan.task.calibrate(raw_answer(plan, rows), plan.task.targets(rows))
    return state


def train_and_test(path: Path, record: dict[str, Any], plan: Plan, callback: Any, resume: bool) -> Run:
    loop = trainer(plan, callback, path)
    if resume and loop.resume():
        callback.log(f"resumed at step {loop.state.step} of {loop.settings.steps}")
    callback.on_train_start(loop.settings, loop.state.step)
    state = train(plan, loop)
    record["settings"] = loop.settings.to_dict()  # the steps may have been counted anew
    if state.stopped:
        callback.log(f"stopped at step {state.step}: {state.stopped}")
    finish(path, record, plan, state, callback)
    run = open_run(path)
    callback.on_end(run)
    return run


def raw_answer(plan: Plan, rows: Data) -> dict[str, np.ndarray]:
    """The trained network's outputs, in float32: the same on every machine."""
    return collect(
        plan.objective, plan.task.batches(rows, plan.card), batch=max(64, plan.settings.batch_size), device=distributed.device()
    )


def answer(plan: Plan, rows: Data) -> dict[str, np.ndarray]:
    """What the network answers when it is asked as a user asks it."""
    return plan.task.postprocess(
        collect(
            plan.objective,
            plan.task.batches(rows, plan.card),
            ask=plan.task.predict_step(plan.objective),
            batch=max(64, plan.settings.batch_size),
            device=distributed.device(),
        )
    )


def finish(path: Path, record: dict[str, Any], plan: Plan, state: State, callback: Any) -> None:
    """Tests on rows never touched before, beside the baselines, and writes all that a finished run holds."""
    from safetensors.torch import save as pack

    from fieldguide.report import pages

    task = plan.task
    test = drawn(plan.parts.test, task.tested, plan.settings.seed)
    held, rows = plan.source.take(test), plan.source.take(plan.parts.train)
    share = "" if len(test) == len(plan.parts.test) else f" of {len(plan.parts.test):,}, drawn by chance"
    callback.log(f"testing on {len(held):,} examples{share} that no step of training has seen")
    task.prepare_test(rows, held)
    task.prepare_scoring(len(held))
    outputs = answer(plan, held)
    if distributed.rank() == 0:
        truth = task.targets(held)
        record["scores"] = {
            "test": task.score(outputs, truth),
            "intervals": task.intervals(outputs, truth),
            "baselines": [
                {"name": b.name, "what": b.what, "bound": b.bound, "scores": task.score(b.outputs, truth)}
                for b in task.baselines(rows, held)
            ],
            "tested": len(held),
        }
        record["cost"] |= {
            "seconds": round(state.seconds, 2),
            "steps": state.step,
            "best_step": state.best_step,
            "stopped": state.stopped,
            "peak_memory": peak_memory(),
        }
        for name in plan.objective.keep:
            content = pack(separate(getattr(plan.objective, name).state_dict()), metadata={"format": "pt"})
            write_atomically(path / f"{name}.safetensors", content)
        task.save(path / "preprocess")
        record["status"] = "done"
        write_record(path, record)
        pages.write(open_run(path), task.exhibits(held, outputs, truth, plan.objective))
    if distributed.world() > 1:
        torch.distributed.barrier()


def refuse_taken(path: Path) -> None:
    """Raises `RunError` where something is in the way of a new run folder."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if (path / "run.json").exists():
        raise RunError(
            f"{path} exists and is not empty. Choose another --out, or go on with it by `fieldguide fit --resume {path}`."
        )
    if path.exists():
        raise RunError(f"{path} exists and is {'not empty' if path.is_dir() else 'a file'}. Choose another --out.")


def new_folder(out: str | Path | None, source: Data) -> Path:
    """The run folder, made: `out`, or the next free number under runs/. Raises `RunError` where it is taken."""
    if out is not None:
        path = Path(out)
        refuse_taken(path)
        path.mkdir(parents=True, exist_ok=True)
        return path
    name = Path(source.source).stem or "data"
    for number in range(1, 1_000_000):
        path = Path("runs") / f"{name}-{number}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
    raise RunError("no free name under runs/")


def versions() -> dict[str, str]:
    return {
        "fieldguide": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }

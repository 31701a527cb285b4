"""Fine-tuning: preprocessing, learning rates and trainable parts of a fit that starts from a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from fieldguide.automl import profile
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.classes import copy_classes, list_classes
from fieldguide.checkpoints.load import Checkpoint
from fieldguide.core.errors import SettingsError, WeightsWarning
from fieldguide.core.settings import Settings
from fieldguide.data.dataset import Data
from fieldguide.tasks import Task

MIN_STEPS = 300  # if the time allows fewer steps, batches become smaller
MIN_EXAMPLES_TO_TUNE_BACKBONE = 300  # with fewer, only a new head is trained
MAX_MEMORY_FRACTION = 0.5  # that full fine-tuning may need; above it, LoRA
BYTES_PER_PARAMETER = 16  # in training: weight, gradient and two moments, in float32
MAX_BATCH_SIZE = 64
MAX_NAMED_CLASSES = 10  # in the log
# Measured on MiniLM: a new head learns ten times as fast as the lowest layers. Larger networks take smaller steps, with the
# square root of their size, as in table 6 of ELECTRA (Clark et al. 2020, arXiv:2003.10555).
RATES = {"whole": {"lr": 1e-3, "layer_decay": 0.65}, "lora": {"lr": 1e-3}, "frozen": {"lr": 5e-3}}
PARAMETERS_OF_MEASURED_RATE = 22_000_000


def get_default_options(
    kind: type[Task], checkpoint: Checkpoint, requested: Mapping[str, Any], callback: Any
) -> dict[str, Any]:
    """Return task options that the checkpoint determines, such as its tokenizer and normalization, then those requested.

    Warns if the checkpoint has a vocabulary and its tokenizer cannot be found.
    """
    known = {f.name for f in fields(kind.Options)}
    options = {**{k: v for k, v in checkpoint.preprocessing_defaults().items() if k in known}, **requested}
    if "tokenizer" in known and "tokenizer" not in options and "tokens" in checkpoint.card.inputs:
        reason = checkpoint.find_tokenizer()[1]
        reason = f" ({reason})" if reason else ""
        callback.log(
            f"WARNING: no tokenizer found for {checkpoint.path}{reason}. A new one is fitted to your texts, so the "
            "pretrained embeddings are lost and trained from scratch. Put the original tokenizer.json next to the weights "
            "(or vocab.txt, vocab.json with merges.txt, or the SentencePiece file), or set --set task.tokenizer=PATH."
        )
    return options


def limit_length(
    task: Task, rows: Data, config: Any, checkpoint: Checkpoint, requested: Mapping[str, Any], callback: Any
) -> Task:
    """Return the task, fitted again with shorter rows if they are longer than the checkpoint's network can read.

    Raises `SettingsError` if the user requested longer rows.
    """
    card, dims = checkpoint.card, task.model_dims()
    if config is None or card.endless or "vocab_size" not in dims or not card.accepts("length"):
        return task
    limit, length = getattr(config, card.names.get("length", "length")), dims.get("length", 0)
    if length <= limit:
        return task
    if "length" in requested:
        raise SettingsError(
            f"task.length={length:,} exceeds the {limit:,} tokens that {checkpoint.path} can read. Set a smaller value or "
            "leave it out."
        )
    callback.log(f"task.length={limit:,}: the maximum of {checkpoint.path}")
    return type(task).fit(rows, type(task).options_from({**requested, "length": limit}))


def choose_settings(
    settings: Settings, requested: Mapping[str, Any], rows: int, checkpoint: Checkpoint, callback: Any, task: type[Task] = Task
) -> Settings:
    """Return training settings for a pretrained network, including which of its parts are trained, and log the reason.

    `task` may determine that part, and has a factor of the learning rates.
    """
    size = sum(t.numel() for t in checkpoint.state.values())
    memory = size * BYTES_PER_PARAMETER / profile.measure_machine()["memory"]
    if "finetune" in requested:
        mode, why = requested["finetune"], "requested"
    elif task.finetune_mode is not None:
        mode, why = task.finetune_mode, f"the default of {task.name}"
    elif memory > MAX_MEMORY_FRACTION:
        mode, why = "lora", f"full fine-tuning would need {100 * memory:.0f} % of the memory"
    elif rows < MIN_EXAMPLES_TO_TUNE_BACKBONE:
        mode, why = "frozen", f"with {rows:,} examples, training more than a new head would overfit"
    else:
        mode, why = "whole", f"{rows:,} examples are enough to train all layers, lower ones with smaller rates"
    callback.log(f"finetune={mode}: {why}")
    return settings.with_(
        {
            "optimizer": "adamw",
            "beta1": 0.9,
            "beta2": 0.999,
            "weight_decay": 0.01,
            "schedule": "linear",
            "warmup": 0.1,
            "grad_clip": 1.0,
            "ema": 0.0,
            "finetune": mode,
            **get_learning_rates(mode, size, task.finetune_rate),
        }
    )


def get_learning_rates(mode: str, parameters: int, rate: float = 1.0) -> dict[str, float]:
    """Return `lr` and `layer_decay` for a fine-tuning mode and a network size; `rate` is a factor of `lr`."""
    rates = dict(RATES.get(mode, {}))
    if "lr" in rates:
        rates["lr"] *= rate
    if mode == "whole":
        rates["lr"] *= min(1.0, (PARAMETERS_OF_MEASURED_RATE / max(parameters, 1)) ** 0.5)
    return rates


def load_weights(network: nn.Module, checkpoint: Checkpoint, callback: Any, classes: Sequence[str] = ()) -> list[str]:
    """Load the checkpoint into a network and return the names of the parameters that it does not hold, such as a new head.

    `classes` are the names of the network's classes; a new head starts from the rows of those that the checkpoint knows.
    """
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", WeightsWarning)
        fresh = weights.load(network, checkpoint.state, checkpoint.origin, head="skip")
    callback.log(f"starting from {checkpoint.path}" + (f"; newly initialized: {', '.join(fresh)}" if fresh else ""))
    if fresh and classes:
        there = list_classes(checkpoint.path, getattr(checkpoint.card.config(**checkpoint.values), "num_classes", 0))
        state = weights.read_ours(network, checkpoint.state, checkpoint.origin)
        if shared := copy_classes(network, state, there, classes, fresh):
            named = ", ".join(shared[:MAX_NAMED_CLASSES]) + (", ..." if len(shared) > MAX_NAMED_CLASSES else "")
            callback.log(f"{len(shared)} of {len(classes)} classes start from those of the checkpoint: {named}")
    for warning in raised:
        callback.log(str(warning.message))
    return fresh


def resolve_finetune(
    settings: Settings,
    fresh: list[str],
    checkpoint: Checkpoint,
    requested: Mapping[str, Any],
    callback: Any,
    rate: float = 1.0,
) -> Settings:
    """Return the settings, with full fine-tuning in place of `frozen` if no parameter is new and the user did not ask."""
    if settings.finetune == "frozen" and not fresh and "finetune" not in requested:
        size = sum(t.numel() for t in checkpoint.state.values())
        settings = settings.with_({"finetune": "whole", **get_learning_rates("whole", size, rate), **requested})
        callback.log("finetune=whole instead: the checkpoint fills the whole network, so no new head is left to train")
    return settings

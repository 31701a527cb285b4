"""Fits that begin with a checkpoint: what must be prepared as it was for it, how gently it is trained, and why so."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from fieldguide.automl import profile
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.load import Checkpoint
from fieldguide.core.errors import SettingsError, WeightsWarning
from fieldguide.core.settings import Settings
from fieldguide.data.dataset import Data
from fieldguide.tasks import Task
from fieldguide.training import peft

ENOUGH = 300  # steps that such a fit should have: where time allows fewer, batches are made smaller
FEW = 300  # examples below which a pretrained network keeps its weights, and a new head alone learns
SHARE = 0.5  # of the memory: what training all of a network may fill
BYTES = 16  # a parameter in training: weight, gradient and two moments, in float32
BATCH = 64  # examples a step at most
# Tried on MiniLM: a new head learns ten times as fast as the layers far below it. Larger networks go by smaller steps, with the
# root of their size, as in table 6 of ELECTRA (Clark et al. 2020, arXiv:2003.10555).
RATES = {"whole": {"lr": 1e-3, "layer_decay": 0.65}, "lora": {"lr": 1e-3}, "frozen": {"lr": 5e-3}}
TRIED = 22_000_000


def offered(kind: type[Task], begun: Checkpoint, asked: Mapping[str, Any], callback: Any) -> dict[str, Any]:
    """Options of a task: those that follow from the checkpoint, such as its tokenizer and its scale of colours, and those that
    were asked for. It is said where the words are not known that a network of words has learnt with."""
    known = {f.name for f in fields(kind.Options)}
    found = {**{k: v for k, v in begun.preprocessing_defaults().items() if k in known}, **asked}
    if "tokenizer" in known and "tokenizer" not in found and begun.card.accepts("vocab_size"):
        why = begun.words()[1]
        why = f" ({why})" if why else ""
        callback.log(
            f"WARNING: the words that {begun.path} has learnt are not known{why}. Others are made from your texts, so "
            "what it knows of words is lost: its embeddings begin anew, with other meanings. "
            "Put the tokenizer.json that it was trained with beside its weights (or vocab.txt, or vocab.json and "
            "merges.txt, or SentencePiece's file), or name it: --set task.tokenizer=PATH"
        )
    return found


def readable(learnt: Task, rows: Data, config: Any, begun: Checkpoint, asked: Mapping[str, Any], callback: Any) -> Task:
    """The task with rows no longer than the checkpoint's network reads, learnt anew where they were. Raises `SettingsError`
    where longer ones were asked for."""
    card, wanted = begun.card, learnt.model_dims()
    if config is None or card.endless or "vocab_size" not in wanted or not card.accepts("length"):
        return learnt
    room, length = getattr(config, card.names.get("length", "length")), wanted.get("length", 0)
    if length <= room:
        return learnt
    if "length" in asked:
        raise SettingsError(
            f"task.length={length:,} is more than the {room:,} tokens that {begun.path} reads at most: ask for "
            "no more than these, or leave it to the checkpoint."
        )
    callback.log(f"task.length={room:,}: {begun.path} reads no longer rows")
    return type(learnt).fit(rows, type(learnt).options_from({**asked, "length": room}))


def gentle(settings: Settings, training: Mapping[str, Any], rows: int, begun: Checkpoint, callback: Any) -> Settings:
    """Settings for a network that knows much already, and which of its parts learn, with the reason."""
    size = sum(t.numel() for t in begun.state.values())
    share = size * BYTES / profile.machine()["memory"]
    if "finetune" in training:
        way, why = training["finetune"], "you asked for it"
    elif share > SHARE:
        way, why = "lora", f"weights, gradients and optimiser of all of it would fill {100 * share:.0f} % of the memory"
    elif rows < FEW:
        way, why = "frozen", f"{rows:,} examples would be learnt by heart by more than a new head"
    else:
        way, why = "whole", f"{rows:,} examples suffice to move all of it, lower layers less than higher ones"
    callback.log(f"tune={way}: {why}")
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
            "finetune": way,
            **rates(way, size),
        }
    )


def rates(way: str, size: int) -> dict[str, float]:
    """How fast what learns, of a network of so many parameters."""
    said = dict(RATES.get(way, {}))
    if way == "whole":
        said["lr"] *= min(1.0, (TRIED / max(size, 1)) ** 0.5)
    return said


def init_checkpoint(
    network: nn.Module, begun: Checkpoint, settings: Settings, training: Mapping[str, Any], callback: Any
) -> tuple[list[str], Settings]:
    """Fills a network from the checkpoint and marks what learns; returns what the checkpoint did not fill, and the settings:
    all learns where a new head alone was to, there is none, and nobody asked for that (`training`)."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", WeightsWarning)
        fresh = weights.load(network, begun.state, begun.origin, head="skip")
    callback.log(f"begins with {begun.path}" + (f"; new and yet to learn: {', '.join(fresh)}" if fresh else ""))
    for warning in said:
        callback.log(str(warning.message))
    if settings.finetune == "frozen" and not fresh and "finetune" not in training:
        settings = settings.with_(
            {"finetune": "whole", **rates("whole", sum(t.numel() for t in begun.state.values())), **training}
        )
        callback.log("tune=whole instead: the checkpoint fills all of the network, and nothing would be left to learn")
    peft.prepare(network, settings, fresh)
    return fresh, settings

"""Fits that begin with a checkpoint: what must be prepared as it was for it, how gently it is trained, and why so."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from fieldguide import measure, weights
from fieldguide.errors import WeightsWarning
from fieldguide.pretrained import Checkpoint
from fieldguide.tasks import Task
from fieldguide.train import tuning
from fieldguide.train.settings import Settings

ENOUGH = 300       # steps that such a fit should have: where time allows fewer, batches are made smaller
FEW = 300          # examples below which a pretrained network keeps its weights, and a new head alone learns
SHARE = 0.5        # of the memory: what training all of a network may fill
BYTES = 16         # a parameter in training: weight, gradient and two moments, in float32
BATCH = 64         # examples a step at most
# Tried on MiniLM: a new head learns ten times as fast as the layers far below it. Larger networks go by smaller steps, with the
# root of their size, as in table 6 of ELECTRA (Clark et al. 2020, arXiv:2003.10555).
RATES = {"whole": {"lr": 1e-3, "layer_decay": 0.65}, "lora": {"lr": 1e-3}, "frozen": {"lr": 5e-3}}
TRIED = 22_000_000


def offered(kind: type[Task], begun: Checkpoint) -> dict[str, Any]:
    """Options of a task that follow from the checkpoint: its tokenizer, its scale of colours."""
    known = {f.name for f in fields(kind.Options)}
    return {k: v for k, v in begun.offers().items() if k in known}


def gentle(settings: Settings, training: Mapping[str, Any], rows: int, begun: Checkpoint, watch: Any) -> Settings:
    """Settings for a network that knows much already, and which of its parts learn, with the reason."""
    size = sum(t.numel() for t in begun.state.values())
    share = size * BYTES / measure.machine()["memory"]
    if "tune" in training:
        way, why = training["tune"], "you asked for it"
    elif share > SHARE:
        way, why = "lora", f"weights, gradients and optimiser of all of it would fill {100 * share:.0f} % of the memory"
    elif rows < FEW:
        way, why = "frozen", f"{rows:,} examples would be learnt by heart by more than a new head"
    else:
        way, why = "whole", f"{rows:,} examples suffice to move all of it, lower layers less than higher ones"
    watch.say(f"tune={way}: {why}")
    return settings.with_({"optimizer": "adamw", "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "schedule": "linear",
                           "warmup": 0.1, "clip": 1.0, "ema": 0.0, "tune": way, **rates(way, size)})


def rates(way: str, size: int) -> dict[str, float]:
    """How fast what learns, of a network of so many parameters."""
    said = dict(RATES.get(way, {}))
    if way == "whole":
        said["lr"] *= min(1.0, (TRIED / max(size, 1)) ** 0.5)
    return said


def filled(network: nn.Module, begun: Checkpoint, settings: Settings, training: Mapping[str, Any],
           watch: Any) -> tuple[list[str], Settings]:
    """Fills a network from the checkpoint and marks what learns; returns what the checkpoint did not fill, and the settings:
    all learns where a new head alone was to, there is none, and nobody asked for that (`training`)."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", WeightsWarning)
        fresh = weights.load(network, begun.state, begun.origin, head="skip")
    watch.say(f"begins with {begun.path}" + (f"; new and yet to learn: {', '.join(fresh)}" if fresh else ""))
    for warning in said:
        watch.say(str(warning.message))
    if settings.tune == "frozen" and not fresh and "tune" not in training:
        settings = settings.with_({"tune": "whole", **rates("whole", sum(t.numel() for t in begun.state.values())), **training})
        watch.say("tune=whole instead: the checkpoint fills all of the network, and nothing would be left to learn")
    tuning.prepare(network, settings, fresh)
    return fresh, settings

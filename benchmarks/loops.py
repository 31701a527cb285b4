"""Loops that benchmarks time: our training loop, a plain PyTorch loop over the same batches, and inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from common import Run
from torch import Tensor, nn

from fieldguide.automl.fit import NullCallback
from fieldguide.automl.time_budget import is_update_too_slow
from fieldguide.core import distributed
from fieldguide.core.settings import Settings
from fieldguide.data.loader import Batches
from fieldguide.models.registry import find
from fieldguide.objectives import Classification, Objective, Supervised
from fieldguide.training.optim import measure_orthogonalization_seconds
from fieldguide.training.precision import choose_precision
from fieldguide.training.trainer import Trainer

LIKE = {"lr": 1e-3, "clip": 1.0}  # of like-for-like runs, in which both sides use fused AdamW in float32


def run_trainer(objective: Objective, batches: Batches, batch: int, **settings: Any) -> Run:
    """Return a function that runs a number of steps of our training loop, including batching, schedule, clipping and checks.

    With precision="auto", precision, layout and optimizer are chosen by timing, as `fit` does.
    """
    chosen = Settings().with_({"minutes": 0, "batch": batch, "channels_last": False, **settings})
    if chosen.precision == "auto":
        first = batches.make(torch.arange(batch).numpy(), None)
        precision, last, times = choose_precision(objective, first, distributed.device(), print)
        chosen = chosen.with_({"precision": precision, "channels_last": last})
        if chosen.optimizer == "muon":
            update = measure_orthogonalization_seconds(objective, distributed.device())
            if is_update_too_slow(update, times[f"{precision}{' channels-last' if last else ''}"]):
                chosen = chosen.override({"optimizer": "adamw"})
    print("our settings:", chosen.optimizer, chosen.precision, "channels-last" if chosen.channels_last else "contiguous")
    trainers: dict[int, Trainer] = {}

    def run(steps: int) -> None:
        if steps not in trainers:
            trainers[steps] = Trainer(
                objective, batches, chosen.with_({"steps": steps}), device=distributed.device(), callback=NullCallback()
            )
        trainers[steps].state.step = 0
        trainers[steps].train()

    return run


def read_recipe(size: str) -> dict[str, Any]:
    """Return the settings that `fit` takes from the card of a network."""
    return dict(find(size)[0].recipe)


def run_ours(
    model: nn.Module, inputs: tuple[str, ...], batches: Batches, batch: int, objective: Objective | None = None, **settings: Any
) -> Run:
    """Return `run_trainer` for a network and an objective, by default classification."""
    return run_trainer(objective or Supervised(model, inputs, Classification()), batches, batch, **settings)


def repeat_batches(*batches: Mapping[str, Tensor]) -> Batches:
    """Return batches for `run_trainer` with batch=1, where row i is the whole i-th batch."""
    return Batches(len(batches), lambda rows, generator=None: dict(batches[rows[0]]))


def run_plain_steps(
    model: nn.Module, loss: Callable[[Any], Tensor], batches: Sequence[Any], *, clip: float = 0.0, **optimizer: Any
) -> Run:
    """Return a function that runs a number of steps of a plain training loop with AdamW; `loss` takes a batch."""
    made = torch.optim.AdamW(model.parameters(), **optimizer)

    def run(steps: int) -> None:
        model.train()
        for step in range(steps):
            value = loss(batches[step % len(batches)])
            made.zero_grad()
            value.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            made.step()
            value.item()

    return run


def run_plain(
    model: nn.Module,
    inputs: tuple[str, ...],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    **options: Any,
) -> Run:
    """Return `run_plain_steps` for a network whose loss compares its output with the target."""
    return run_plain_steps(model, lambda b: loss(model(*(b[name] for name in inputs)), b["target"]), batches, **options)


def run_inference(model: nn.Module, answer: Callable[[], object]) -> Run:
    """Return a function that calls `answer` a number of times, without dropout and gradients."""
    model.eval()

    def run(steps: int) -> None:
        with torch.inference_mode():
            for _ in range(steps):
                answer()

    return run

"""What the training benchmarks share: our loop and a plain PyTorch loop over the same batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.data.batches import Batches
from fieldguide.fitting import Silent
from fieldguide.objectives import Classification, Objective, Supervised
from fieldguide.train import distributed
from fieldguide.train.loop import Trainer
from fieldguide.train.precision import fastest
from fieldguide.train.settings import Settings


def ours(model: nn.Module, inputs: tuple[str, ...], batches: Batches, batch: int, objective: Objective | None = None,
         **settings) -> Callable[[int], None]:
    """Runs so many steps of our loop, all of it: batching, schedule, clipping, checks of finiteness. The objective is
    classification where none is given.

    precision="auto" chooses precision and layout by timing, as `fit` does.
    """
    objective = objective or Supervised(model, inputs, Classification())
    chosen = Settings().with_({"minutes": 0, "batch": batch, "channels_last": False, **settings})
    if chosen.precision == "auto":
        first = batches.make(torch.arange(batch).numpy(), None)
        precision, last, _ = fastest(objective, first, distributed.device(), print)
        chosen = chosen.with_({"precision": precision, "channels_last": last})
    print("our settings:", chosen.precision, "channels-last" if chosen.channels_last else "contiguous")
    trainers: dict[int, Trainer] = {}

    def run(steps: int) -> None:
        if steps not in trainers:
            trainers[steps] = Trainer(objective, batches, chosen.with_({"steps": steps}), device=distributed.device(),
                                      watch=Silent())
        trainers[steps].state.step = 0
        trainers[steps].train()

    return run


def plain(model: nn.Module, inputs: tuple[str, ...], batches: Sequence[dict[str, Tensor]], *, clip: float = 0.0,
          loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy, **optimizer) -> Callable[[int], None]:
    """Runs so many steps as anyone writes them."""
    made = torch.optim.AdamW(model.parameters(), **optimizer)

    def run(steps: int) -> None:
        model.train()
        for step in range(steps):
            batch = batches[step % len(batches)]
            value = loss(model(*(batch[name] for name in inputs)), batch["target"])
            made.zero_grad()
            value.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            made.step()
            value.item()

    return run

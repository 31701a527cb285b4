"""Outputs of a trained network over many examples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fieldguide.data.batches import Batches, in_order
from fieldguide.objectives import Objective
from fieldguide.train import distributed
from fieldguide.train.precision import autocast, place


@torch.inference_mode()
def collect(objective: Objective, batches: Batches, *, batch: int, device: torch.device, precision: str = "float32",
            watch: Callable[[int], None] = lambda done: None) -> dict[str, np.ndarray]:
    """Outputs by name, one row an example in its own order. Several processes share the work, and all get the whole."""
    mine = np.arange(len(batches))[distributed.rank()::distributed.world()]
    rows, parts, training = [], [], objective.training
    objective.eval()
    for index, tensors in in_order(batches, batch, mine):
        with autocast(device, precision):
            outputs = objective.outputs(place(tensors, device))
        rows.append(index)
        parts.append({name: t.float().cpu().numpy() for name, t in outputs.items()})
        watch(sum(map(len, rows)))
    objective.train(training)
    gathered = distributed.gather((rows, parts))
    rows = np.concatenate([i for r, _ in gathered for i in r])
    joined = {name: np.concatenate([p[name] for _, ps in gathered for p in ps]) for name in gathered[0][1][0]}
    order = np.argsort(rows)
    return {name: values[order] for name, values in joined.items()}

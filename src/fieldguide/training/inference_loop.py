"""Batched inference over a data set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fieldguide.core import distributed
from fieldguide.data.loader import Batches, iterate_in_order
from fieldguide.objectives import Objective
from fieldguide.training.precision import autocast, move_batch


@torch.inference_mode()
def collect(
    objective: Objective,
    batches: Batches,
    *,
    batch: int,
    device: torch.device,
    precision: str = "float32",
    callback: Callable[[int], None] = lambda done: None,
    step: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
    shared: bool = True,
) -> dict[str, np.ndarray]:
    """Return the outputs by name, one row per example, in the order of the examples.

    Several processes share the work, and each gets the whole result, unless `shared` is False: then the calling process does
    everything alone. `step` computes the outputs of a batch; `objective.outputs` by default. Outputs of batches may differ in
    width, such as the longest text: narrower ones are padded with -1, or NaN for floating-point outputs. `callback` gets the
    number of examples done by this process.
    """
    step = step or objective.outputs
    mine = np.arange(len(batches))
    mine = mine[distributed.rank() :: distributed.get_world_size()] if shared else mine
    training = objective.training
    rows: list[np.ndarray] = []
    parts: list[dict[str, np.ndarray]] = []
    if switch := any(
        module.training for module in objective.modules()
    ):  # a switch takes longer than small networks need for a row
        objective.eval()
    for index, tensors in iterate_in_order(batches, batch, mine):
        with autocast(device, precision):
            outputs = step(move_batch(tensors, device))
        rows.append(index)
        parts.append({name: (t.float() if t.is_floating_point() else t).cpu().numpy() for name, t in outputs.items()})
        callback(sum(map(len, rows)))
    if switch:
        objective.train(training)
    gathered = distributed.gather((rows, parts)) if shared else [(rows, parts)]
    places = np.concatenate([i for r, _ in gathered for i in r])
    joined = {name: concatenate_padded([p[name] for _, ps in gathered for p in ps]) for name in gathered[0][1][0]}
    order = np.argsort(places)
    return {name: values[order] for name, values in joined.items()}


def concatenate_padded(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenate arrays along the first axis, padded to the largest size along the others."""
    shape = np.max([p.shape[1:] for p in parts], axis=0).astype(int)
    if all(p.shape[1:] == tuple(shape) for p in parts):
        return np.concatenate(parts)
    whole = np.full((sum(map(len, parts)), *shape), np.nan if parts[0].dtype.kind == "f" else -1, dtype=parts[0].dtype)
    first = 0
    for part in parts:
        whole[(slice(first, first + len(part)), *map(slice, part.shape[1:]))] = part
        first += len(part)
    return whole

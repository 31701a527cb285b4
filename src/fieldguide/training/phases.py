"""Phases of a training step: the parameters, optimizers and module of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fieldguide.core import distributed
from fieldguide.core.settings import Settings
from fieldguide.objectives.base import Objective, Phase
from fieldguide.training.optim import build_optimizers, get_lr_factor
from fieldguide.training.peft import get_layer_depths, get_lowest_trainable_depth, get_tower_prefixes


class PhaseModule(nn.Module):
    """A phase as a module, so that the hooks of DDP run for everything that the objective calls."""

    def __init__(self, objective: Objective, phase: Phase):
        super().__init__()
        self.objective, self.phase = objective, phase.name

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.objective.with_auxiliary_losses(self.objective(batch, self.phase), self.phase)


class PhaseRunner:
    """A phase with its parameters, its optimizers and its module, wrapped in DDP if there are several processes."""

    def __init__(self, objective: Objective, phase: Phase, settings: Settings, device: torch.device):
        self.phase, self.settings = phase, settings.with_(dict(phase.settings))
        named = [(n, p) for n, p in objective.phase_parameters(phase) if p.requires_grad]
        self.parameters = [p for _, p in named]
        depth, self.top = get_layer_depths((name for name, _ in named), get_tower_prefixes(objective))
        self.depth = [depth[name] for name, _ in named]
        self.optimizers = build_optimizers(objective, named, self.settings)
        self.lr = 0.0
        self.module: nn.Module = PhaseModule(objective, phase)
        if distributed.get_world_size() > 1:
            with require_grad_only(
                self.parameters, objective
            ):  # DDP reduces the parameters that require a gradient at construction
                self.module = DistributedDataParallel(self.module, [device] if device.type == "cuda" else None)

    def set_lr(self, step: int) -> float:
        """Set the learning rate of a step in all parameter groups and return it."""
        rate = self.settings.lr * get_lr_factor(self.settings, step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
        return rate

    def mask_frozen_grads(self, step: int) -> None:
        """Drop the gradients of layers that are not unfrozen yet."""
        lowest = get_lowest_trainable_depth(self.settings, step, self.top)
        for p, depth in zip(self.parameters, self.depth):
            if depth < lowest:
                p.grad = None


@contextmanager
def require_grad_only(parameters: list[nn.Parameter], objective: nn.Module) -> Iterator[None]:
    """Make only these parameters require a gradient inside."""
    chosen = {id(p) for p in parameters}
    others = [p for p in objective.parameters() if p.requires_grad and id(p) not in chosen]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)

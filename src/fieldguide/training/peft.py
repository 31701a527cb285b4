"""Fine-tuning: which parts of a pretrained network learn, and how fast.

`whole` trains everything, lower layers more slowly where `layer_decay` is below 1; `frozen` trains new layers alone; `lora`
trains a low-rank change of every linear layer (Hu et al. 2021, arXiv:2106.09685, section 4.1), merged when it is done.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings

LAYER_NAME = re.compile(r"^(.*?\.\d+(?:\.\d+)?)(?=\.)")  # blocks.3, stages.0.1: what comes before it in a name, too


class LowRank(nn.Module):
    """A weight W, out x in, with b a added: b out x r begins at zero, a r x in at Kaiming's uniform; times `scale`."""

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__()
        out, into = weight.shape
        self.a = nn.Parameter(torch.empty(rank, into, device=weight.device))
        self.b = nn.Parameter(torch.zeros(out, rank, device=weight.device))
        self.scale = scale
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:  # out x in -> out x in
        return weight + self.scale * (self.b @ self.a)


def prepare(model: nn.Module, settings: Settings, fresh: Iterable[str] | None) -> None:
    """Marks what of a network learns. `fresh` names the parameters that no checkpoint filled: these always do; None: there
    was no checkpoint.

    Raises `SettingsError` where nothing would learn, and for a network from nothing of which a part only is to learn.
    """
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if settings.finetune == "whole":
        return
    if fresh is None:
        raise SettingsError(
            f"tune={settings.finetune} keeps the weights of a network that has learnt already, and this one begins "
            "with chance: name a checkpoint by --weights."
        )
    fresh = set(fresh)
    for name, p in model.named_parameters():
        p.requires_grad_(name in fresh)
    if settings.finetune == "lora":
        shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and f"{name}.weight" not in fresh and id(module.weight) not in shared:
                parametrize.register_parametrization(
                    module, "weight", LowRank(module.weight, settings.lora_rank, settings.lora_scale)
                )
    if not any(p.requires_grad for p in model.parameters()):
        raise SettingsError(
            "tune=frozen trains new layers alone, and this network has none: the checkpoint fills it all. "
            "Choose tune=whole or tune=lora."
        )


def merge(model: nn.Module) -> None:
    """Adds low-rank changes to the weights that they change; what is left is a plain network."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0], LowRank):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def get_frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Modules none of whose parameters learn: they stay as in evaluation, statistics and all."""
    learns = lambda m: [p.requires_grad for p in m.parameters()]
    return [m for m in model.modules() if learns(m) and not any(learns(m))]


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Blocks keep their inputs alone for the way back, and compute the rest again (Chen et al. 2016, arXiv:1604.06174).
    Blocks are what stands in a row and is more than a layer of torch.

    Raises `SettingsError` for a network that has no blocks.
    """
    rows = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    found = [block for row in rows for block in row if not type(block).__module__.startswith("torch.")]
    inner = {id(m) for block in found for m in block.modules() if m is not block}
    found = list({id(block): block for block in found if id(block) not in inner}.values())
    if not found:
        raise SettingsError(f"recompute=true: {type(model).__name__} has no blocks that could be computed again")
    for block in found:
        block.forward = _CheckpointedForward(block)


class _CheckpointedForward:
    """A block's forward pass that is made a second time on the way back, with the same dropout."""

    def __init__(self, block: nn.Module):
        self.block, self.forward = block, block.forward

    def __call__(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(
            self.forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), freeze_batch_norm_statistics(self.block)), **kwargs
        )


@contextmanager
def freeze_batch_norm_statistics(block: nn.Module) -> Iterator[None]:
    """Inside, normalisations take no account of batches in their running statistics: those have been counted."""
    norms = [(m, m.momentum) for m in block.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for norm, _ in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked.sub_(1)  # which the pass adds again
    try:
        yield
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum


def get_tower_prefixes(network: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of parts that stand side by side, as networks name them in `towers`: neither is on top."""
    return tuple(
        f"{prefix}.{tower}.".removeprefix(".")
        for prefix, module in network.named_modules()
        for tower in getattr(type(module), "towers", ())
    )


def get_layer_depths(names: Iterable[str], towers: tuple[str, ...] = ()) -> tuple[dict[str, int], int]:
    """How deep each parameter lies, and how deep the deepest: 0 for what stands before the blocks, the last for what stands
    behind them. Names are in the order of the network; names that begin with one of `towers` are counted by themselves, so
    that the last blocks of all towers lie equally high."""
    names = list(names)
    parts = {tower: get_layer_depths(name for name in names if name.startswith(tower)) for tower in towers}
    if any(found for found, _ in parts.values()):
        top = max(own for _, own in parts.values())
        risen = {name: level + top - own for found, own in parts.values() for name, level in found.items()}
        return {name: risen.get(name, top) for name in names}, top
    found: dict[str, int] = {}
    out, last = {}, 0
    for name in names:
        hit = LAYER_NAME.match(name)
        if hit:
            last = found.setdefault(hit[1], len(found) + 1)
        out[name] = last if hit or not found else -1  # behind the first block, and in none: settled below
    top = len(found) + 1 if found else 0  # a new head alone is the top
    return {name: top if level < 0 else level for name, level in out.items()}, top


def get_lowest_trainable_depth(settings: Settings, step: int, top: int) -> int:
    """The lowest level that learns at a step: from the top down, all after a part `unfreeze` of the steps (Howard and
    Ruder 2018, arXiv:1801.06146, section 3.3)."""
    if not settings.unfreeze_fraction:
        return 0
    done = step / max(1.0, settings.unfreeze_fraction * settings.steps)
    return max(0, top - int(done * (top + 1)))

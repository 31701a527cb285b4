"""Fine-tuning: the trainable parts of a pretrained network and their learning rates.

`whole` trains everything, lower layers more slowly if `layer_decay` is below 1, except parts that are frozen as published (class
attribute `frozen_parts` of the network) unless `keep_frozen` is False; `frozen` trains only new layers; `lora`
trains a low-rank update of every linear layer (Hu et al. 2021, arXiv:2106.09685, section 4.1), merged after training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings

LAYER_NAME = re.compile(r"^(.*?\.\d+(?:\.\d+)?)(?=\.)")  # name up to the block index: blocks.3, stages.0.1


class LowRank(nn.Module):
    """LoRA parametrization of a weight W, out x in: W + scale * b a, with b (out x r) zero and a (r x in) Kaiming-uniform."""

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.empty(rank, columns, device=weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        self.scale = scale
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:  # out x in -> out x in
        return weight + self.scale * (self.b @ self.a)


def prepare(model: nn.Module, settings: Settings, fresh: Iterable[str] | None) -> None:
    """Set up a network for fine-tuning: mark the trainable parameters and add LoRA and gradient checkpointing if set.

    Args:
        fresh: names of the parameters that the checkpoint did not fill, which are always trained; None if there is no
            checkpoint.

    Raises:
        SettingsError: if no parameter would be trained, or if there is no checkpoint for `frozen` or `lora`.
    """
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if settings.finetune == "whole":
        if fresh is not None and settings.keep_frozen:
            freeze_parts(model, set(fresh))
        return
    if fresh is None:
        raise SettingsError(
            f"finetune={settings.finetune} needs pretrained weights, but this network is initialized randomly. "
            "Pass a checkpoint with --weights."
        )
    fresh = set(fresh)
    for name, p in model.named_parameters():
        p.requires_grad_(name in fresh)
    if settings.finetune == "lora":
        shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        frozen = tuple(f"{part}." for part in getattr(model, "frozen_parts", ())) if settings.keep_frozen else ()
        for name, module in list(model.named_modules()):
            if f"{name}.".startswith(frozen):
                continue
            if isinstance(module, nn.Linear) and f"{name}.weight" not in fresh and id(module.weight) not in shared:
                parametrize.register_parametrization(
                    module, "weight", LowRank(module.weight, settings.lora_rank, settings.lora_scale)
                )
    if not any(p.requires_grad for p in model.parameters()):
        raise SettingsError(
            "finetune=frozen trains only new layers, but the checkpoint fills all layers of this network. "
            "Choose finetune=whole or finetune=lora."
        )


def freeze_parts(model: nn.Module, fresh: set[str]) -> None:
    """Freeze the parts of a network that are frozen in fine-tuning as published, except parameters that are new."""
    for part in getattr(model, "frozen_parts", ()):
        for name, p in model.get_submodule(part).named_parameters(part):
            p.requires_grad_(name in fresh)


def merge(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Merge the low-rank updates into the weights, which leaves a plain network.

    Returns the two factors of each update, out x r and r x in, by the name of the weight.
    """
    updates = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight") and isinstance(
            update := module.get_submodule("parametrizations.weight.0"), LowRank
        ):
            updates[f"{name}.weight"] = (update.scale * update.b).detach(), update.a.detach()
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return updates


def get_frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules without trainable parameters, which stay in evaluation mode."""
    trainable = lambda m: [p.requires_grad for p in m.parameters()]
    return [m for m in model.modules() if trainable(m) and not any(trainable(m))]


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute the activations of blocks in the backward pass (Chen et al. 2016, arXiv:1604.06174).

    Blocks are the outermost elements of `ModuleList`s and `Sequential`s that are not plain torch layers. Raises
    `SettingsError` if the network has no blocks.
    """
    rows = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    found = [block for row in rows for block in row if not type(block).__module__.startswith("torch.")]
    inner = {id(m) for block in found for m in block.modules() if m is not block}
    found = list({id(block): block for block in found if id(block) not in inner}.values())
    if not found:
        raise SettingsError(f"gradient_checkpointing=true is not supported: {type(model).__name__} has no blocks")
    for block in found:
        block.forward = _CheckpointedForward(block)


class _CheckpointedForward:
    """Forward method of a block that is recomputed in the backward pass, with the same dropout."""

    def __init__(self, block: nn.Module):
        self.block, self.forward = block, block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(
            self.forward,
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), freeze_batch_norm_statistics(self.block)),
            **kwargs,
        )


@contextmanager
def freeze_batch_norm_statistics(block: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms unchanged during recomputation, because the batch was counted already."""
    norms = [(m, m.momentum) for m in block.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for norm, _ in norms:
        norm.momentum = 0.0
        assert norm.num_batches_tracked is not None  # since it tracks statistics
        norm.num_batches_tracked.sub_(1)  # the recomputation adds it again
    try:
        yield
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum


def get_tower_prefixes(network: nn.Module) -> tuple[str, ...]:
    """Return the name prefixes of parallel parts of a network, such as image and text encoder (class attribute `towers`)."""
    return tuple(
        f"{prefix}.{tower}.".removeprefix(".")
        for prefix, module in network.named_modules()
        for tower in getattr(type(module), "towers", ())
    )


def get_layer_depths(names: Iterable[str], towers: tuple[str, ...] = ()) -> tuple[dict[str, int], int]:
    """Return the depth of each parameter and the maximum depth.

    The depth is 0 before the blocks, 1, 2, ... in the blocks, and the maximum after them. `names` are in the order of the
    network. Parameters of each prefix in `towers` are counted separately and shifted so that all towers end at the same
    depth.
    """
    names = list(names)
    parts = {tower: get_layer_depths(name for name in names if name.startswith(tower)) for tower in towers}
    if any(found for found, _ in parts.values()):
        top = max(own for _, own in parts.values())
        shifted = {name: depth + top - own for found, own in parts.values() for name, depth in found.items()}
        return {name: shifted.get(name, top) for name in names}, top
    found: dict[str, int] = {}
    out, last = {}, 0
    for name in names:
        hit = LAYER_NAME.match(name)
        if hit:
            last = found.setdefault(hit[1], len(found) + 1)
        out[name] = last if hit or not found else -1  # -1: outside the blocks, after the first one; replaced below
    top = len(found) + 1 if found else 0  # a single head has depth 0
    return {name: top if depth < 0 else depth for name, depth in out.items()}, top


def get_lowest_trainable_depth(settings: Settings, step: int, top: int) -> int:
    """Return the lowest depth that is trained at a step (gradual unfreezing, Howard and Ruder 2018, arXiv:1801.06146,
    section 3.3). All depths are trained after a fraction `unfreeze_fraction` of the steps."""
    if not settings.unfreeze_fraction:
        return 0
    done = step / max(1.0, settings.unfreeze_fraction * settings.resolved_steps)
    return max(0, top - int(done * (top + 1)))

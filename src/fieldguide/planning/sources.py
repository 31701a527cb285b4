"""What is planned: a network by name or config, or an existing objective with one of its batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.models import registry
from fieldguide.planning.workload import Shape, Workload, build_network, build_workload
from fieldguide.training.peft import prepare

LARGEST_LENGTH = 1 << 20
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
Make = Callable[[Shape], Workload]


def from_card(
    name: str, config: Any = None, dtype: str = "float32", settings: Settings | None = None, **overrides: Any
) -> tuple[Make, Card, Any]:
    """Return a function that builds the steps of a published size, or of a config of its architecture; its card and config.

    `dtype` is that of the stored weights. `settings` may ask for fine-tuning or gradient checkpointing.
    Raises `SettingsError` for an unknown name, field or dtype.
    """
    if dtype not in DTYPE_BYTES:
        raise SettingsError(f"dtype={dtype!r} is none of {', '.join(DTYPE_BYTES)}.")
    card, size = registry.find(name)
    try:
        config = card.resolve_config(size, **overrides) if config is None else config
    except TypeError as error:
        raise SettingsError(str(error)) from None
    networks: dict[str, Any] = {}  # by device; tracing copies a network and leaves it alone

    def make(shape: Shape) -> Workload:
        if shape.device not in networks:
            network = build_network(card, config, shape.device).to(getattr(torch, dtype))
            if settings is not None:
                head = list(network.state_dict())[-1].rpartition(".")[0]
                fresh = (
                    [n for n, _ in network.named_parameters() if n.startswith(head)] if settings.finetune == "frozen" else ()
                )
                prepare(network, settings, fresh)
            networks[shape.device] = network
        return build_workload(card, config, shape, networks[shape.device])

    return make, card, config


def from_example(
    objective: Any,
    batch: dict[str, Tensor],
    predict: Callable[[Any, dict[str, Tensor]], Any] | None = None,
    examples: int | None = None,
) -> Make:
    """Return a function that builds the steps of an existing objective from one of its batches, with any number of rows.

    `examples` is the number of examples in the batch, if it may differ from the number of rows of its largest tensor, such as two
    answers for each prompt. Then all tensors grow in proportion.
    """
    rows = max((len(t) for t in batch.values() if t.ndim), default=1)

    def make(shape: Shape) -> Workload:
        if examples in (None, rows):
            resized = {name: resize(tensor, rows, shape.batch) for name, tensor in batch.items()}
        else:
            grown = lambda tensor: math.floor(len(tensor) * shape.batch / examples + 0.5)
            resized = {name: resize(t, len(t), grown(t)) if t.ndim and len(t) else t for name, t in batch.items()}
        return Workload(objective, resized, predict) if predict else Workload(objective, resized)

    return make


def resize(tensor: Tensor, rows: int, wanted: int) -> Tensor:
    """Return a tensor with another number of rows: repeated integers, and no values for floating-point numbers."""
    if not tensor.ndim or len(tensor) != rows:
        return tensor
    if tensor.is_floating_point():
        return torch.empty(wanted, *tensor.shape[1:], dtype=tensor.dtype, device="meta")
    return tensor[torch.arange(wanted) % rows]


def find_longest(card: Card, config: Any) -> int:
    """Return the longest sequence that a network takes; 0 if it takes none."""
    if card.input_type not in ("tokens", "pair", "speech", "speech-text", "waveform", "sequence"):
        return 0
    length = getattr(config, card.names.get("length", "length"), None)
    return LARGEST_LENGTH if card.endless or not length else int(length)

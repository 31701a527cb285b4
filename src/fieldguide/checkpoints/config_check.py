"""Checks of a config that came with a checkpoint, before its network is created.

`check_fields` compares each value with its type and with what networks have. `check_network` then creates the network without
memory (on torch's meta device) and stops as soon as it outgrows the tensors of the checkpoint. Together they reject a config
with a billion layers or a vocabulary of a billion tokens within milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fieldguide.core.card import Card
from fieldguide.core.errors import FieldguideError, WeightsError
from fieldguide.core.validation import AGAIN, guard
from fieldguide.models.initialization import SkipInitialization
from fieldguide.models.registry import cards

MAX_INTEGER = 1 << 20  # of a field without another limit, such as the width or the vocabulary
MAX_ROTARY_LENGTH = 1 << 24  # tokens, of networks that store no table of positions
MAX_DEPTH = 10_000  # layers
MAX_ENTRIES = 10_000  # of a list
DEPTH_WORDS = ("depth", "layers")  # in names of fields that count layers
# May be 0 although no size has it: ids of tokens, unused blocks.
ZERO_FIELDS = ("pad", "begin", "end", "picture", "above", "dense_layers")
SPARE_TENSORS, SPARE_ELEMENTS = 1_000, 1 << 26  # beyond twice the checkpoint: new heads, positions, buffers
FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.linspace, torch.eye}


def check_fields(
    card: Card,
    values: Mapping[str, Any],
    where: object,
    keys: Mapping[str, str] | None = None,
    error: type[FieldguideError] = WeightsError,
) -> None:
    """Raise `error` for the first value of a config that has the wrong type or cannot belong to a network.

    `keys` maps fields to their names in the file `where`.
    """
    kinds = {field.name: str(field.type) for field in fields(card.config)}
    for name, value in values.items():
        if name not in kinds:
            raise error(f"{where}: {card.name} has no field {name!r}. Its fields are {', '.join(sorted(kinds))}.")
        if expected := find_fault(card, name, kinds[name], value):
            shown = repr(value)
            shown = f"{shown[:60]}..." if len(shown) > 60 else shown
            raise error(f"{where}: {(keys or {}).get(name, name)}={shown} must be {expected}.")


def find_fault(card: Card, name: str, kind: str, value: Any) -> str | None:
    """Return what the value of a field must be, or None if it is that."""
    if kind.endswith(" | None"):
        if value is None:
            return None
        kind = kind.removesuffix(" | None")
    if kind.startswith("tuple["):
        inner = kind.removeprefix("tuple[").partition(",")[0]
        if not isinstance(value, tuple | list) or len(value) > MAX_ENTRIES:
            return f"a list of at most {MAX_ENTRIES:,} values"
        faults = (find_fault(card, name, inner, item) for item in value)
        return next((f"a list of values, each {fault}" for fault in faults if fault), None)
    if " | " in kind:
        either = [find_fault(card, name, one, value) for one in kind.split(" | ")]
        return " or ".join(fault for fault in either if fault) if all(either) else None
    if kind == "int":
        least, most = get_limits(card.name, name)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        return None if is_integer and least <= value <= most else f"an integer from {least} to {most:,}"
    if kind == "float":
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if is_number and abs(value) < float("inf") else "a finite number"  # False for NaN
    if kind == "bool":
        return None if isinstance(value, bool) else "true or false"
    if kind == "str":
        return None if isinstance(value, str) else "a text"
    return None


@cache
def get_limits(architecture: str, name: str) -> tuple[int, int]:
    """Return the smallest and the largest value of an integer field. 0 is possible if a size of the architecture has it."""
    card = cards()[architecture]
    known = [getattr(card.config(**size.overrides), name) for size in card.sizes.values()]
    has_zero = name in ZERO_FIELDS or any(0 in value if isinstance(value, tuple) else value == 0 for value in known)
    if any(word in name for word in DEPTH_WORDS):
        return int(not has_zero), MAX_DEPTH
    is_rotary_length = name == card.names.get("length", "length") and card.accepts("rope_theta")
    return int(not has_zero), MAX_ROTARY_LENGTH if is_rotary_length else MAX_INTEGER


class NetworkBudget(TorchFunctionMode):
    """Stops the creation of a network that has many more tensors or numbers than a checkpoint."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors = 2 * len(state) + SPARE_TENSORS
        self.elements = 2 * sum(tensor.numel() for tensor in state.values()) + SPARE_ELEMENTS

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, Tensor):
            if func in FACTORIES:
                self.tensors -= 1
                self.elements -= result.numel()
            if self.tensors < 0 or result.numel() > self.elements:
                raise NetworkTooLargeError
        return result


class NetworkTooLargeError(WeightsError):
    """The network outgrew its budget."""


def check_network(card: Card, config: Any, state: Mapping[str, Tensor], where: object) -> None:
    """Raise `WeightsError` if a config cannot be that of a network with these tensors: it fails, or is much larger."""
    try:
        place = f"{where}: the config of {card.name}"
        with guard(place, WeightsError), torch.device("meta"), NetworkBudget(state), SkipInitialization():
            card.make(config)
    except NetworkTooLargeError:
        longest = max((axis for tensor in state.values() for axis in tensor.shape), default=0)
        values = {field.name: getattr(config, field.name) for field in fields(config)}
        limits = {name: len(state) if any(word in name for word in DEPTH_WORDS) else longest for name in values}
        large = [f"{n}={v}" for n, v in values.items() if type(v) is int and v > limits[n] and n not in ("length", "window")]
        held = f"{len(state):,} tensors with {sum(t.numel() for t in state.values()):,} numbers"
        raise WeightsError(
            f"{where}: the config describes a network that is much larger than the checkpoint, which holds {held}"
            f"{': check ' + ', '.join(large) if large else ''}. {AGAIN}"
        ) from None

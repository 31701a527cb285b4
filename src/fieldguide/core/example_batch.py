"""Random tensors that a network accepts, made from its signature."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fieldguide.core.errors import SettingsError, nearest
from fieldguide.core.signature import Axis, Signature, TensorSpec

DEFAULT_SIZE = 64  # of dynamic axes that may be as long
BATCH = "batch"


def build_example_batch(
    signature: Signature, batch: int, sizes: Mapping[str, int], device: str, seed: int
) -> dict[str, Tensor]:
    """Return random tensors for the arguments of the network; see `Signature.example_batch`."""
    dynamic = signature.dynamic_axes
    for name, size in {BATCH: batch, **sizes}.items():
        if name not in dynamic:
            known = ", ".join(dynamic) or "none"
            raise SettingsError(f"sizes: {name!r} is not a dynamic axis.{nearest(name, dynamic)} Dynamic axes are: {known}.")
        check_size(dynamic[name], size)
    chosen = {name: choose_size(axis) for name, axis in dynamic.items()} | dict(sizes) | {BATCH: batch}
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: build_tensor(spec, chosen, generator).to(device) for spec in signature.forward_tensors}


def check_size(axis: Axis, size: int) -> None:
    """Raise `SettingsError` if a size is out of the range of an axis."""
    if size < axis.least or (axis.most is not None and size > axis.most) or size % axis.multiple:
        limit = f"at least {axis.least:,}" if axis.most is None else f"from {axis.least:,} to {axis.most:,}"
        multiple = f" and a multiple of {axis.multiple}" if axis.multiple > 1 else ""
        raise SettingsError(f"{axis.name}={size:,} must be {limit}{multiple}.")


def choose_size(axis: Axis) -> int:
    """Return the default size of a dynamic axis."""
    size = max(axis.least, min(DEFAULT_SIZE, axis.most or DEFAULT_SIZE))
    down = size // axis.multiple * axis.multiple
    return down if down >= axis.least else down + axis.multiple


def build_tensor(spec: TensorSpec, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    """Return random values of a tensor, with the given sizes of dynamic axes."""
    shape = [sizes[axis.name] if axis.size is None else axis.size for axis in spec.axes]
    if spec.dtype == "bool":
        return torch.ones(shape, dtype=torch.bool)  # all entries are real
    if spec.counts:
        return torch.full(shape, sizes[spec.counts])
    if spec.codes:
        columns = [torch.randint(count, (*shape[:-1], 1), generator=generator) for count in spec.codes]
        return torch.cat(columns, -1)
    low, high = spec.low or 0.0, spec.high
    if spec.dtype == "int64":
        values = torch.randint(int(low), int(1 if high is None else high) + 1, shape, generator=generator)
        return place_tokens(spec, values)
    if spec.std:
        pixels = torch.randint(256, shape, generator=generator) / 255
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (spec.mean, spec.std))
        return (pixels - mean) / std
    if spec.low is None or high is None:
        return torch.randn(shape, generator=generator)
    return low + (high - low) * torch.rand(shape, generator=generator)


def place_tokens(spec: TensorSpec, values: Tensor) -> Tensor:
    """Return token ids in which the tokens that each row must have occur as often as the rules say."""
    reserved = {rule.token for rule in spec.tokens}
    other = next((i for i in range(1, int(spec.high or 1) + 1) if i not in reserved), 0)
    for rule in spec.tokens:
        values[values == rule.token] = other
    for rule in spec.tokens:
        if rule.at == "end":
            values[:, values.shape[1] - rule.count :] = rule.token
        else:
            values[:, 1 : 1 + rule.count] = rule.token
    return values

"""The graph of a network alone: the tensors of its signature, without the steps of a task."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from fieldguide.core.card import Card
from fieldguide.core.network_tensors import describe_network
from fieldguide.exporting.graph import Graph


class NetworkGraph(nn.Module):
    """Call a method of a network, and return its outputs as a tuple of tensors."""

    def __init__(self, network: nn.Module, method: str):
        super().__init__()
        self.network, self.method = network, method

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(flatten(getattr(self.network, self.method)(*tensors)))


def flatten(value: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in flatten(part)]


def build_network_graph(card: Card, config: Any, network: nn.Module) -> Graph:
    """Return the graph of a network of a card, for which there is no program."""
    known = describe_network(card, config, network)
    module = NetworkGraph(copy.deepcopy(network).eval().requires_grad_(False), known.method)
    names = tuple(spec.name for spec in known.outputs)
    return Graph(module, known.forward_tensors, names, parts=())
